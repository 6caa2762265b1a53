"""Policies to compare with: `static` and `by-layer`; `prompt`; and what others published: `lru` (SparseFlow), `ema`
(SparkInfer, Kairox), as published and mended, and `core` (CoreInfer).

They do not look at the balance: what is in a slot is computed there. A copy that is replaced is given up when the copy
into its slot begins.
"""

import numpy as np

from warmfront.coordinator.balancing.interface import (
    BalancerState,
    Bools,
    Floats,
    Ints,
    Owners,
    PromptLoad,
    Rebalance,
    Used,
    make_rebalance,
)

__all__ = ["ByLayer", "ByPrompt", "Core", "Ema", "EmaPublished", "Lru", "Static"]

_NEVER = 1 << 30


class Static:
    """Changes nothing: the GPU keeps what it begins with, which is what the profile or a plan says."""

    name = "static"
    interval = stride = _NEVER

    def __init__(self, long_run: Floats, group_bytes: int) -> None:
        pass

    def read(self, prompt: PromptLoad) -> None:
        """Nothing to learn."""

    def observe(self, used: Used) -> None:
        """Nothing to learn."""

    def decide(self, state: BalancerState) -> Rebalance:
        """Everything stays."""
        return make_rebalance(state.owner.copy(), state.home, [], [])


class ByLayer(Static):
    """What llama.cpp's `--n-cpu-moe` and `-ngl` do: the GPU begins with whole layers, in order, and keeps them."""

    name = "by-layer"


class Lru:
    """SparseFlow's neuron cache: groups that were used and are in no slot replace those least recently used."""

    name = "lru"
    interval = stride = 1

    def __init__(self, long_run: Floats, group_bytes: int) -> None:
        self._token = 0
        self._used = np.full(long_run.shape, -1, np.int64)  # [L, G]: the token of the last use, -1 = never
        self._active = np.zeros(long_run.shape)

    def read(self, prompt: PromptLoad) -> None:
        """A prompt uses nearly everything: what it used last, or most, is no part of the cache as published."""

    def observe(self, used: Used) -> None:
        """Note which groups were used."""
        self._token += 1
        self._active[:] = used.active()
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
        return make_rebalance(_on_caches(state), state.home, drops, moves)


class Ema:
    """SparkInfer's balancing as in its code: in each layer the groups with the highest scores, swapped every token.

    The score is s <- 0.67 s + 0.33 share of the neurons that fired. At most so many groups of a layer are swapped at a
    time: at first as many as it has slots; that rises by 5 % while copies come in time, and falls by 5 % while they
    come late. What is swapped goes by the groups' numbers, not by their scores.
    """

    name = "ema"
    interval = stride = 1
    _KEPT = 0.67

    def __init__(self, long_run: Floats, group_bytes: int) -> None:
        self._group_bytes = group_bytes
        self._score = long_run / group_bytes
        self._swaps: Floats | None = None  # [L]

    def read(self, prompt: PromptLoad) -> None:
        """Update the scores as by so many tokens that all used the same."""
        kept = self._KEPT**prompt.tokens
        self._score *= kept
        self._score += (1 - kept) * prompt.bytes_read / self._group_bytes

    def observe(self, used: Used) -> None:
        """Update the scores."""
        self._score *= self._KEPT
        self._score += (1 - self._KEPT) * used.active()

    def decide(self, state: BalancerState) -> Rebalance:
        """Swap what is in the slots for what should be."""
        owner = _on_caches(state)
        if state.is_home.all():
            return make_rebalance(owner, state.home, [], [])
        resident, in_flight = (_cached(copies, state).any(0) for copies in (state.resident, state.in_flight))
        # Swaps are within a layer, so each keeps as many slots as it began with.
        slots = (resident | in_flight).sum(1)
        if self._swaps is None:
            self._swaps = slots.astype(np.float64)
        self._swaps = np.clip(self._rounded(self._swaps * (0.95 if state.copies_late else 1.05)), 1, slots)
        order = np.argsort(-self._score, axis=1, kind="stable")
        best = np.zeros_like(resident)
        np.put_along_axis(best, order, np.arange(order.shape[1]) < slots[:, None], 1)
        # The i-th of a layer to come takes the slot of the i-th to go; copies under way may leave fewer of these.
        entering, leaving = best & ~resident & ~in_flight, resident & ~best
        pairs = np.minimum(np.minimum(entering.sum(1), leaving.sum(1)), self._swaps.astype(np.int64))[:, None]
        places, ranks = zip(*(_first(mask, pairs) for mask in (entering, leaving)), strict=True)
        # No layer before the others: each has its budget in the published system.
        turns = np.argsort(ranks[0], kind="stable")[: state.copy_budget]
        entering_at, leaving_at = (each[turns] for each in places)
        worker = state.resident[~state.is_home][:, leaving_at[:, 0], leaving_at[:, 1]].argmax(0) + state.is_home.sum()
        drops, moves = (np.column_stack((worker, groups)) for groups in (leaving_at, entering_at))
        return make_rebalance(owner, state.home, [drops], [moves])

    def _rounded(self, swaps: Floats) -> Floats:
        return swaps


class EmaPublished(Ema):
    """The same as published: by decoded tokens alone, and with a budget that is a whole number: below 20 it cannot
    rise, and it ends at one swap a layer."""

    name = "ema-published"

    def read(self, prompt: PromptLoad) -> None:
        """Nothing to learn."""

    def _rounded(self, swaps: Floats) -> Floats:
        return np.floor(swaps)


class _Ranked:
    """The slots are to hold the groups that are first in a ranking; what they do not hold is computed at home."""

    interval = stride = 1

    def __init__(self, long_run: Floats, group_bytes: int) -> None:
        self._rank: Ints = np.zeros(long_run.shape, np.int64)  # [L, G]: 0 for the group that is wanted most

    def _order(self, order: Ints) -> None:
        """Rank the groups: their numbers, counted through all layers, the one that is wanted most first."""
        self._rank.flat[order] = np.arange(order.size)

    def decide(self, state: BalancerState) -> Rebalance:
        """Copy what is wanted most into free slots and those of groups that are not."""
        owner, caches = _on_caches(state), np.flatnonzero(~state.is_home)
        held = _cached(state.resident | state.in_flight, state)
        wanted = self._rank < held.sum() + state.free_slots[caches].sum()
        places = np.argwhere(wanted & ~held.any(0))
        incoming = places[np.argsort(self._rank[tuple(places.T)])][: state.copy_budget]
        moves, drops, start = [], [], 0
        for worker in caches.tolist():
            old, free = np.argwhere(state.resident[worker] & ~wanted), int(state.free_slots[worker])
            chosen = incoming[start : start + free + len(old)]
            start += len(chosen)
            moves.append(_rows(worker, chosen))
            drops.append(_rows(worker, old[: max(0, len(chosen) - free)]))
        return make_rebalance(owner, state.home, drops, moves)


class Core(_Ranked):
    """CoreInfer's: behind a prompt the GPU takes the text's core, the groups with the most of its neurons.

    It keeps that until another core is chosen.
    """

    name = "core"

    def __init__(self, long_run: Floats, group_bytes: int) -> None:
        super().__init__(long_run, group_bytes)
        # Between groups with as many neurons of the core; below 1, so that these go first.
        self._activity = long_run / (long_run.max() + 1)
        self._asked = np.zeros(0, np.uint32)

    def read(self, prompt: PromptLoad) -> None:
        """The core says all."""

    def observe(self, used: Used) -> None:
        """Rank the groups anew if the core is another."""
        if not np.array_equal(used.asked, self._asked):
            self._asked = used.asked.copy()
            wanted = np.bitwise_count(used.asked) + self._activity
            self._order(np.argsort(-wanted, axis=None, kind="stable"))


class ByPrompt(_Ranked):
    """Behind a prompt the GPU takes what the prompt's tokens have read most, and keeps that until the next prompt."""

    name = "prompt"

    def __init__(self, long_run: Floats, group_bytes: int) -> None:
        super().__init__(long_run, group_bytes)
        self.interval = _NEVER
        self._long_run = long_run.ravel()
        self._read = np.zeros(long_run.shape)  # bytes, by the prompt so far
        self._is_new = self._is_over = False  # the prompt has not been decided on; tokens have been decoded since

    def read(self, prompt: PromptLoad) -> None:
        """Add up the jobs of a prompt."""
        if self._is_over:
            self._read[:] = 0
        self._read += prompt.tokens * prompt.bytes_read
        self.interval, self._is_new, self._is_over = 1, True, False

    def observe(self, used: Used) -> None:
        """The prompt has ended."""
        self._is_over = True

    def decide(self, state: BalancerState) -> Rebalance:
        """With the first token behind a prompt rank the groups, then copy until all are there."""
        if not self._is_over:
            return make_rebalance(state.owner.copy(), state.home, [], [])
        if self._is_new:
            held = _cached(state.resident | state.in_flight, state).any(0)
            self._order(np.lexsort((~held.ravel(), -self._long_run, -self._read.ravel())))
            self._is_new = False
        decision = super().decide(state)
        if not (len(decision.moves) or state.in_flight.any()):
            self.interval = _NEVER
        return decision


def _cached(copies: Bools, state: BalancerState) -> Bools:
    """`copies` [W, L, G] but those at homes."""
    return copies & ~state.is_home[:, None, None]


def _rows(worker: int, groups: Ints) -> Ints:
    """[n, 3] of (worker, layer, group)."""
    return np.column_stack((np.full(len(groups), worker), groups))


def _on_caches(state: BalancerState) -> Owners:
    """Owners such that every cache computes what it holds."""
    owner = state.home.copy()
    for worker in np.flatnonzero(~state.is_home):
        owner[state.resident[worker]] = worker
    return owner


def _first(mask: Bools, counts: Ints) -> tuple[Ints, Ints]:
    """The first `counts` [L, 1] groups of `mask` [L, G] in each layer, [n, 2], and their numbers there, [n]."""
    rank = np.cumsum(mask, axis=1) - 1
    chosen = mask & (rank < counts)
    return np.argwhere(chosen), rank[chosen]
