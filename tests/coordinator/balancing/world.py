"""A small world that does what policies say, and checks that they keep to the rules of `interface.py`."""

from collections.abc import Callable
from itertools import pairwise

import numpy as np

from warmfront.coordinator.balancing.interface import BalancerState, Policy, Rebalance, Used
from warmfront.coordinator.balancing.policies import make_policy

LAYERS, GROUPS, GROUP_BYTES = 4, 48, 100_000
CPU, GPU = (5_000.0, 0.2), (20_000.0, 0.02)


def used(counts: np.ndarray) -> Used:
    """What a token uses if so many neurons of each group [L, G] were to be computed, and were."""
    words = np.array([(1 << count) - 1 for count in range(33)], np.uint32)[counts]
    # In branches, as a mixture's: those without a neuron are not used.
    groups = counts.shape[-1]
    bounds = np.array([0, groups // 3, groups // 2, groups])
    uses = np.array([[row[low:high].any() for low, high in pairwise(bounds)] for row in counts.reshape(-1, groups)])
    return Used(words, words, uses.astype(np.uint8), bounds, GROUP_BYTES // 128, GROUP_BYTES // 32 - GROUP_BYTES // 128)


class World:
    """Workers that hold copies. `rates` [L, G]: the share of its bytes that a token reads of each group on average."""

    def __init__(self, rates: np.ndarray, caches: int, slots: int, homes: int = 1, seed: int = 0) -> None:
        self.rates, self.rng = rates, np.random.default_rng(seed)
        self.workers = homes + caches
        self.is_home = np.arange(self.workers) < homes
        self.costs = np.array([CPU] * homes + [GPU] * caches)
        self.home = np.tile((np.arange(GROUPS) * homes // GROUPS).astype(np.uint8), (LAYERS, 1))
        self.resident = self.home == np.arange(self.workers)[:, None, None]
        # The groups that the profile has read most, dealt out to the caches.
        best = np.argsort(-rates, axis=None)[: slots * caches]
        for number, place in enumerate(best):
            self.resident[homes + number % caches].flat[place] = True
        self.owner = np.where(
            self.resident[homes:].any(0), self.resident[homes:].argmax(0) + homes if caches else 0, self.home
        ).astype(np.uint8)
        self.in_flight = np.zeros_like(self.resident)
        self.slots = np.array([LAYERS * GROUPS] * homes + [slots] * caches)
        self.flips = self.moves = 0
        self.budget = 1000
        self.noisy = True

    def free(self) -> np.ndarray:
        return self.slots - (self.resident | self.in_flight).sum((1, 2))

    def draw(self) -> Used:
        """What a token uses, of 32 neurons a group that fire by chance."""
        return used(self.rng.binomial(32, self.rates) if self.noisy else np.rint(32 * self.rates).astype(int))

    def state(self) -> BalancerState:
        return BalancerState(
            owner=self.owner,
            home=self.home,
            resident=self.resident,
            in_flight=self.in_flight,
            free_slots=self.free(),
            is_home=self.is_home,
            costs=self.costs,
            transfer_ns=20_000.0,
            copy_budget=self.budget,
            copies_late=False,
        )

    def land(self) -> None:
        """The copies in flight have come, and are owned where they are; of two homes the new one stays."""
        for worker, layer, group in np.argwhere(self.in_flight):
            self.resident[worker, layer, group] = True
            if self.is_home[worker]:
                self.resident[self.home[layer, group], layer, group] = False
                self.home[layer, group] = worker
            self.owner[layer, group] = worker
        self.in_flight[:] = False

    def apply(self, decision: Rebalance) -> None:
        """Check the decision against the rules, then do it."""
        held = np.take_along_axis(self.resident, decision.owner[None].astype(int), 0)[0]
        assert held.all()
        for worker, layer, group in decision.drops:
            assert not self.is_home[worker]
            assert self.resident[worker, layer, group]
            assert decision.owner[layer, group] != worker
            self.resident[worker, layer, group] = False
        assert len(np.unique(decision.drops, axis=0)) == len(decision.drops)
        self.flips += int((decision.owner != self.owner).sum())
        self.owner = decision.owner.copy()
        free, begun = self.free(), 0
        assert len(np.unique(decision.moves[:, 1:], axis=0)) == len(decision.moves)
        for worker, layer, group in decision.moves:
            assert not self.resident[worker, layer, group]
            assert not self.in_flight[:, layer, group].any()
            assert self.is_home[worker] or not self.resident[~self.is_home, layer, group].any()
            if free[worker] > 0 and begun < self.budget:
                self.in_flight[worker, layer, group] = True
                free[worker] -= 1
                begun += 1
        self.moves += begun

    def run(self, policy: Policy, tokens: int, after: Callable[[], None] | None = None) -> None:
        for token in range(tokens):
            drawn = self.draw()
            if token % policy.stride == policy.stride - 1:
                policy.observe(drawn)
            if token % policy.interval == policy.interval - 1:
                self.land()
                state = self.state()
                tables = (state.owner, state.home, state.resident, state.in_flight)
                before = [table.copy() for table in tables]
                decision = policy.decide(state)
                # They are the engine's own.
                for table, was in zip(tables, before, strict=True):
                    np.testing.assert_array_equal(table, was)
                self.apply(decision)
                if after is not None:
                    after()

    def times(self) -> np.ndarray:
        """ns [W, L] that a token takes on average."""
        loads = np.stack([np.where(self.owner == w, self.rates * GROUP_BYTES, 0).sum(1) for w in range(self.workers)])
        return self.costs[:, :1] + self.costs[:, 1:] * loads

    def hit(self) -> float:
        return float(self.rates[~self.is_home[self.owner]].sum() / self.rates.sum())


def skewed(seed: int = 0) -> np.ndarray:
    """Rates of which a fifth of the groups has the largest part."""
    rng = np.random.default_rng(seed)
    rates = 0.8 / (1 + 8 * np.arange(GROUPS) / GROUPS) ** 1.5
    return np.stack([rng.permutation(rates) for _ in range(LAYERS)])


def policy_for(name: str, world: World) -> Policy:
    return make_policy(name, world.rates * GROUP_BYTES, GROUP_BYTES)
