"""Emulated GPUs of a known number of slots, and a policy that never leaves a group where it is."""

from typing import Any

import numpy as np
import pytest

from tests.tables import assert_tables_hold
from warmfront.coordinator.balancing.interface import BalancerState, PromptLoad, Rebalance, Used, make_rebalance
from warmfront.coordinator.engine.engine import Engine
from warmfront.gpu_worker.host import HostDevice
from warmfront.shared.model.bundle import BundleLayout
from warmfront.shared.model.formats import Kind

# Tokens of the longest job of a dense model, and of a mixture of experts.
DENSE, MIXTURE = 288, 576


def budget_for(
    slots: int, *, hidden: int, ffn: int, context: int = 512, kind: Kind = Kind.F32, longest: int = DENSE
) -> int:
    """Bytes of device memory for so many groups of one weight type, with all else that the worker puts there."""
    layout = BundleLayout(hidden=hidden, ffn=ffn, gate_kind=kind, down_kind=kind)
    return sum(HostDevice().ledger(layout, slots, min(longest, -(-context // 16) * 16)).values())


class Restless:
    """At every token, by chance: some copies on the GPU are dropped, some not used, some groups copied or rehomed."""

    name = "restless"
    stride = 1

    def __init__(self, seed: int = 0, *, interval: int = 1, some: float = 0.1) -> None:
        self.interval, self._some = interval, some
        self._rng = np.random.default_rng(seed)

    def read(self, prompt: PromptLoad) -> None:
        """Nor here."""

    def observe(self, used: Used) -> None:
        """Nothing is learnt."""

    def decide(self, state: BalancerState) -> Rebalance:
        """Whatever the tables allow."""
        chance = self._rng.random(state.resident.shape)
        home, owner = state.home, state.owner.copy()
        caches = ~state.is_home
        drops = np.argwhere(state.resident & caches[:, None, None] & (chance < self._some))
        for worker in np.flatnonzero(caches):
            here = state.resident[worker]
            owner[here] = np.where(chance[worker][here] > 0.2, worker, home[here])
        wanted = ~state.resident & ~state.in_flight & (chance < self._some)
        # A group changes its home once at a time.
        wanted[state.is_home] &= ~state.in_flight[state.is_home].any(0)
        wanted[state.is_home] &= wanted[state.is_home].cumsum(0) == 1
        moves = self._rng.permutation(np.argwhere(wanted))
        return make_rebalance(owner, home, [drops], [moves])


class Still(Restless):
    """Nothing ever moves."""

    def __init__(self) -> None:
        super().__init__(interval=1 << 60)


def watch(engine: Engine, policy: Any, patch: pytest.MonkeyPatch) -> None:
    """Have `policy` decide from now on, and check the tables at every boundary."""
    ownership = engine.ownership
    boundary = ownership.boundary

    def checked() -> None:
        boundary()
        there = zip(ownership.names, ownership._present, strict=True)
        assert_tables_hold(
            ownership,
            {name: engine.session.runtime.supervisor.readies[name].slots for name, present in there if present},
        )

    ownership.policy = policy
    patch.setattr(ownership, "boundary", checked)
