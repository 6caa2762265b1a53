"""Policies to compare with: `static`, and two that others published, `lru` (SparseFlow) and `ema` (SparkInfer, Kairox).

These two do not look at the balance: what is in a slot is computed there. A copy that is replaced is given up when the
copy into its slot begins.
"""

import numpy as np

from warmfront.coordinator.balancing.interface import (
    BalancerState,
    Bools,
    Floats,
    Ints,
    Owners,
    Reals,
    Rebalance,
    home_of,
    make_rebalance,
)

__all__ = ["Ema", "Lru", "Static"]


class Static:
    """Changes nothing."""

    name = "static"
    interval = 1 << 30

    def __init__(self, long_run: Floats, group_bytes: int) -> None:
        pass

    def observe(self, bytes_read: Reals, active: Reals) -> None:
        """Nothing to learn."""

    def decide(self, state: BalancerState) -> Rebalance:
        """Everything stays."""
        return make_rebalance(state.owner.copy(), home_of(state), [], [])


class Lru:
    """SparseFlow's neuron cache: groups that were used and are in no slot replace those least recently used."""

    name = "lru"
    interval = 1

    def __init__(self, long_run: Floats, group_bytes: int) -> None:
        self._token = 0
        self._used = np.full(long_run.shape, -1, np.int64)  # [L, G]: the token of the last use, -1 = never
        self._active = np.zeros(long_run.shape)

    def observe(self, bytes_read: Reals, active: Reals) -> None:
        """Note which groups were used."""
        self._token += 1
        self._active[:] = active
        self._used[self._active > 0] = self._token

    def decide(self, state: BalancerState) -> Rebalance:
        """Copy what the last token used, most active first, into free slots and those of groups it did not use."""
        held = _cached(state.resident | state.in_flight, state)
        wanted = (self._used == self._token) & ~held.any(0) & (self._active > 0)
        incoming = np.argwhere(wanted)[np.argsort(-self._active[wanted], kind="stable")][: state.copy_budget]
        moves, drops, start = [], [], 0
        for worker in np.flatnonzero(~state.is_home).tolist():
            old = state.resident[worker] & (self._used < self._token)
            free = int(state.free_slots[worker])
            chosen = incoming[start : start + free + int(old.sum())]
            start += len(chosen)
            oldest = np.argsort(self._used[old], kind="stable")[: max(0, len(chosen) - free)]
            moves.append(_rows(worker, chosen))
            drops.append(_rows(worker, np.argwhere(old)[oldest]))
        return make_rebalance(*_all_on_caches(state), drops, moves)


class Ema:
    """SparkInfer's balancing as in its code: in each layer the groups with the highest scores, swapped every token.

    The score is s <- k s + (1 - k) share of the neurons that fired; k rises while copies come late, else it falls.
    """

    name = "ema"
    interval = 1

    def __init__(self, long_run: Floats, group_bytes: int) -> None:
        self._score = long_run / group_bytes
        self._kept = 0.67

    def observe(self, bytes_read: Reals, active: Reals) -> None:
        """Update the scores."""
        self._score *= self._kept
        self._score += (1 - self._kept) * active

    def decide(self, state: BalancerState) -> Rebalance:
        """Swap what is in the slots for what should be, best first."""
        self._kept = min(max(self._kept * (1.05 if state.copies_late else 0.95), 0.05), 0.95)
        if state.is_home.all():
            return make_rebalance(state.owner.copy(), home_of(state), [], [])
        resident, in_flight = (_cached(copies, state).any(0) for copies in (state.resident, state.in_flight))
        # Swaps are within a layer, so each keeps as many slots as it began with.
        slots = (resident | in_flight).sum(1)
        order = np.argsort(-self._score, axis=1, kind="stable")
        rank = np.empty_like(order)
        np.put_along_axis(rank, order, np.arange(order.shape[1])[None], 1)
        best = rank < slots[:, None]
        incoming, outgoing = best & ~resident & ~in_flight, resident & ~best
        # The i-th of a layer to come takes the slot of the i-th to go; copies under way may leave fewer of these.
        leaving = _in_layers(outgoing, rank)
        entering = _in_layers(incoming & (_position(incoming, rank) < outgoing.sum(1)[:, None]), rank)
        gain = self._score[tuple(entering.T)] - self._score[tuple(leaving.T)]
        chosen = np.argsort(-gain, kind="stable")[: state.copy_budget]
        entering, leaving = entering[chosen], leaving[chosen]
        worker = state.resident[~state.is_home][:, leaving[:, 0], leaving[:, 1]].argmax(0) + state.is_home.sum()
        drops, moves = (np.column_stack((worker, groups)) for groups in (leaving, entering))
        return make_rebalance(*_all_on_caches(state), [drops], [moves])


def _cached(copies: Bools, state: BalancerState) -> Bools:
    """`copies` [W, L, G] but those at homes."""
    return copies & ~state.is_home[:, None, None]


def _rows(worker: int, groups: Ints) -> Ints:
    """[n, 3] of (worker, layer, group)."""
    return np.column_stack((np.full(len(groups), worker), groups))


def _all_on_caches(state: BalancerState) -> tuple[Owners, Owners]:
    """Owners such that every cache computes what it holds, and the homes."""
    home = home_of(state)
    owner = home.copy()
    for worker in np.flatnonzero(~state.is_home):
        owner[state.resident[worker]] = worker
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
