"""Policies that others published, to compare with: `static`, `lru` (SparseFlow), `ema` (SparkInfer, Kairox).

The last two keep no eye on the balance: what is in a slot is computed there. A slot that changes hands is given up when
the copy into it begins.
"""

import numpy as np
import numpy.typing as npt

from warmfront.coordinator.balancing.interface import (
    BalancerState,
    Bools,
    Floats,
    Ints,
    Owners,
    Rebalance,
    decision_of,
    home_of,
)

__all__ = ["Ema", "Lru", "Static"]

Reals = npt.NDArray[np.floating]


class Static:
    """Changes nothing."""

    name = "static"
    every = 1 << 30

    def observe(self, bytes_read: Reals, active: Reals) -> None:
        """Nothing to learn."""

    def decide(self, situation: BalancerState) -> Rebalance:
        """Everything stays."""
        return decision_of(situation.owner.copy(), home_of(situation), [], [])


class Lru:
    """SparseFlow's neuron cache: what was used and is in no slot comes in for what was used least recently."""

    name = "lru"
    every = 1

    def __init__(self, long_run: Floats) -> None:
        self._token = 0
        self._used = np.full(long_run.shape, -1, np.int64)  # the token of the last use
        self._active = np.zeros(long_run.shape)

    def observe(self, bytes_read: Reals, active: Reals) -> None:
        """Note who was used."""
        self._token += 1
        self._active[:] = active
        self._used[self._active > 0] = self._token

    def decide(self, situation: BalancerState) -> Rebalance:
        """Of what the last token used, the most active first, as much as there are slots of older use."""
        held = _cached(situation.resident | situation.coming, situation)
        wanted = (self._used == self._token) & ~held.any(0) & (self._active > 0)
        incoming = np.argwhere(wanted)[np.argsort(-self._active[wanted], kind="stable")][: situation.budget]
        moves, drops, start = [], [], 0
        for worker in np.flatnonzero(~situation.homes).tolist():
            old = situation.resident[worker] & (self._used < self._token)
            free = int(situation.free[worker])
            chosen = incoming[start : start + free + int(old.sum())]
            start += len(chosen)
            oldest = np.argsort(self._used[old], kind="stable")[: max(0, len(chosen) - free)]
            moves.append(_of(worker, chosen))
            drops.append(_of(worker, np.argwhere(old)[oldest]))
        return decision_of(*_all_on_caches(situation), drops, moves)


class Ema:
    """SparkInfer's balancing as in its code: in each layer the groups with the highest scores, swapped every token.

    The score is s <- k s + (1 - k) share of the neurons that fired; k rises while copies come late, else it falls.
    """

    name = "ema"
    every = 1

    def __init__(self, long_run: Floats, group_bytes: int) -> None:
        self._score = long_run / group_bytes
        self._kept = 0.67

    def observe(self, bytes_read: Reals, active: Reals) -> None:
        """Update the scores."""
        self._score *= self._kept
        self._score += (1 - self._kept) * active

    def decide(self, situation: BalancerState) -> Rebalance:
        """Swap what is in the slots for what should be, best first."""
        self._kept = min(max(self._kept * (1.05 if situation.late else 0.95), 0.05), 0.95)
        if situation.homes.all():
            return decision_of(situation.owner.copy(), home_of(situation), [], [])
        resident, coming = (_cached(copies, situation).any(0) for copies in (situation.resident, situation.coming))
        slots = (resident | coming).sum(1)
        order = np.argsort(-self._score, axis=1, kind="stable")
        rank = np.empty_like(order)
        np.put_along_axis(rank, order, np.arange(order.shape[1])[None], 1)
        best = rank < slots[:, None]
        incoming, outgoing = best & ~resident & ~coming, resident & ~best
        # The i-th of a layer to come takes the slot of the i-th to go; copies under way may leave fewer of these.
        goes = _in_layers(outgoing, rank)
        comes = _in_layers(incoming & (_position(incoming, rank) < outgoing.sum(1)[:, None]), rank)
        gain = self._score[tuple(comes.T)] - self._score[tuple(goes.T)]
        chosen = np.argsort(-gain, kind="stable")[: situation.budget]
        comes, goes = comes[chosen], goes[chosen]
        worker = situation.resident[~situation.homes][:, goes[:, 0], goes[:, 1]].argmax(0) + situation.homes.sum()
        drops, moves = (np.column_stack((worker, pairs)) for pairs in (goes, comes))
        return decision_of(*_all_on_caches(situation), [drops], [moves])


def _cached(copies: Bools, situation: BalancerState) -> Bools:
    """`copies` [W, L, G] but those at homes."""
    return copies & ~situation.homes[:, None, None]


def _of(worker: int, groups: Ints) -> Ints:
    return np.column_stack((np.full(len(groups), worker), groups))


def _all_on_caches(situation: BalancerState) -> tuple[Owners, Owners]:
    """Owners such that every cache computes what it holds, and the homes."""
    home = home_of(situation)
    owner = home.copy()
    for worker in np.flatnonzero(~situation.homes):
        owner[situation.resident[worker]] = worker
    return owner, home


def _position(mask: Bools, rank: Ints) -> Ints:
    """[L, G]: how many of the `mask` of the layer have a better rank."""
    order = np.argsort(rank, axis=1)
    before = np.cumsum(np.take_along_axis(mask, order, 1), axis=1) - 1
    return np.take_along_axis(before, rank, 1)


def _in_layers(mask: Bools, rank: Ints) -> Ints:
    """[n, 2]: the groups in `mask`, layer by layer and there by rank."""
    groups = np.argwhere(mask)
    return groups[np.lexsort((rank[mask], groups[:, 0]))]
