"""What the balancer is told and what it answers.

L layers of G groups; W workers: the CPU workers ("homes"), then the GPU workers ("caches"). Every group has one home
that holds its full copy; caches hold further copies in slots. The owner computes the group and holds a copy of it.
Changing the owner among holders is free; a copy costs a transfer. A copy that comes to another home makes that one the
group's home, and the old home's copy goes.
"""

from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

__all__ = [
    "BATCH",
    "BalancerState",
    "Bools",
    "Floats",
    "Ints",
    "Owners",
    "Policy",
    "Rebalance",
    "budget_of",
    "decision_of",
    "held_by",
    "home_of",
]

Owners = npt.NDArray[np.uint8]
Bools = npt.NDArray[np.bool_]
Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
BATCH = 16  # groups that are copied at one request
_COPYING = 0.25  # part of the time that copies may take


class BalancerState(NamedTuple):
    """What is true at a token boundary."""

    owner: Owners  # [L, G]
    resident: Bools  # [W, L, G]: complete copies
    coming: Bools  # [W, L, G]: copies under way
    free: Ints  # [W]: free slots now
    homes: Bools  # [W]: the CPU workers
    costs: Floats  # [W, 2]: ns per job, ns per byte, as fitted
    transfer_ns: float  # per group copied, as measured
    budget: int  # groups whose copying may begin now
    late: bool  # copies begun at the last decision are not finished
    decision_tokens: float = 0.0  # how many tokens' time a decision takes, as measured


class Rebalance(NamedTuple):
    """What is to happen at this token boundary, in this order."""

    owner: Owners  # [L, G]: a worker with a complete copy, everywhere
    drops: Ints  # [n, 3]: (worker, layer, group): copies in slots to give up now; their worker does not own the group
    moves: Ints  # [m, 3]: (worker, layer, group): copies to begin, best first, as many as slots and budget allow


class Policy(Protocol):
    """Decides who computes what. `every`: tokens between decisions."""

    name: str
    every: int

    def observe(self, bytes_read: npt.NDArray[np.floating], active: npt.NDArray[np.floating]) -> None:
        """After each decoded token, both [L, G]: bytes read of each group, share of its neurons that fired (0..1)."""

    def decide(self, situation: BalancerState) -> Rebalance:
        """Every `every` tokens."""


def budget_of(until_next_ns: float, transfer_ns: float, moving: int) -> int:
    """Groups whose copying may begin, `moving` being under way, if the next decision is `until_next_ns` away."""
    return max(0, max(BATCH, int(_COPYING * until_next_ns / transfer_ns)) - moving)


def home_of(situation: BalancerState) -> Owners:
    """uint8 [L, G]: the home of each group; of two that hold it, the owner."""
    first = situation.resident[situation.homes].argmax(0)
    home = np.flatnonzero(situation.homes).astype(np.uint8)[first]
    owned = situation.homes[situation.owner] & held_by(situation.resident, situation.owner)
    return np.where(owned, situation.owner, home)


def held_by(held: Bools, worker: npt.NDArray[np.integer]) -> Bools:
    """bool [L, G]: whether `worker` [L, G] is among those of `held` [W, L, G]."""
    return np.asarray(np.take_along_axis(held, worker[None].astype(np.intp), 0)[0])


def decision_of(owner: Owners, home: Owners, drops: list[Ints], moves: list[Ints]) -> Rebalance:
    """The decision with these drops and moves ([n, 3] each); what is dropped goes back to its `home`."""
    dropped, moved = (np.concatenate([np.empty((0, 3), np.int64), *parts]) for parts in (drops, moves))
    worker, layer, group = dropped.T
    lost = owner[layer, group] == worker
    owner[layer[lost], group[lost]] = home[layer[lost], group[lost]]
    return Rebalance(owner, dropped, moved)
