"""The race of distances of fetching ahead: the kernels that a run uses read memory that no cache holds, in turns.

A thread on each cpu, pinned, has a share of a block that is larger than the caches. A turn reads a part of it: weights
one behind the other, or a random tenth of the neurons in ascending order; as many turns on end as there are parts read
different ones. The candidates of one use alternate, so that what else the machine does meets all alike, and a thread's
time is its processor's: while others have its core, it reads nothing. Who is far behind drops out.
"""

import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from warmfront.shared.errors import ResourceError
from warmfront.shared.kernels.atomics import address_of
from warmfront.shared.kernels.attention.kv_tiles import Heads, Tile, add_values, multiply_keys, quantise_heads
from warmfront.shared.kernels.byte_dot import quantise_input, quantised_bytes
from warmfront.shared.kernels.feed_forward.bundles import Bundles, bundles_at
from warmfront.shared.kernels.feed_forward.ffn import (
    Batch,
    Selection,
    batch_scratch_bytes,
    listed_neurons,
    open_gates,
    whole_groups,
)
from warmfront.shared.kernels.fetching import (
    ANNOUNCED,
    BUNDLES,
    CACHED_TILES,
    GATE_ROWS,
    LOWBIT_ROWS,
    MATRIX_ROWS,
    SCATTERED,
    Fetch,
    Use,
    no_fetching,
)
from warmfront.shared.kernels.gemm import Panels
from warmfront.shared.kernels.jit import kernel
from warmfront.shared.kernels.lowbit import lowbit_bytes, lowbit_dot
from warmfront.shared.kernels.rows import dot_two, prefetch, row_stride
from warmfront.shared.kernels.tiles import TILE, in_tiles, multiply_tiles
from warmfront.shared.machine.memory import address, anonymous, zeros
from warmfront.shared.machine.process import pin
from warmfront.shared.machine.topology import read_caches, read_topology
from warmfront.shared.model.architecture import FeedForward
from warmfront.shared.model.bundle import GROUP, BundleLayout
from warmfront.shared.model.formats import Kind, row_bytes
from warmfront.shared.model.kv_layout import TILE as POSITIONS
from warmfront.shared.model.kv_layout import tile_bytes

__all__ = ["Rates", "race"]

Bytes = npt.NDArray[np.uint8]
# Reads `part` as `fetch` says; returns the bytes of weights that it has read.
Turn = Callable[[Fetch, int], int]
# GB/s of each candidate, round by round; who dropped out has fewer.
Rates = dict[Fetch, list[float]]

ROUNDS = 5
# After so many rounds one that was never faster than this, relative to the fastest, drops out: more than what disturbs.
_TRIAL, _BEHIND = 2, 0.85
# Parts of a share, so large that the call of a kernel, 0.1 ms, is little beside what it reads.
_PARTS = 8
# Weights of a row: as models of a few billion weights have them.
_COLS = 2048
# Cached keys and values: tiles of each, numbers of a head, and query heads that share them.
_TILES, _HEAD, _QUERIES = 32, 128, 3
# Memory: of one thread, and of all together at least.
_SHARE, _LEAST = 1 << 26, 1 << 28
# A byte of which every weight type makes normal numbers: arithmetic with subnormal ones is slower.
_FILLER = 0x3C
_RELU = FeedForward(activation="relu")


@kernel
def _multiply(kind: int, at: int, rows: int, x: int, q: int, ahead: int) -> Any:
    """Rows, a multiple of 32, of a matrix times a vector, as `decode/linear.py` does it; the sum of some."""
    stride, total, part = row_stride(kind, _COLS), np.float32(0), np.empty((2, TILE), np.float32)
    if in_tiles(kind):
        half = rows // (2 * TILE) * TILE
        for r in range(0, half, TILE):
            tiles, out = (at + r * stride, at + (r + half) * stride), Panels(address_of(part), 0, 1)
            multiply_tiles(kind, tiles, _COLS, Panels(q, 0, 1), out, out.at + TILE * 4, ahead)
            total += part[0, 0] + part[1, 0]
    else:
        half = rows // 2
        for r in range(half):
            both, out = (at + r * stride, at + (r + half) * stride), address_of(part)
            dot_two(kind, both, x, q, _COLS, (out, out + 4), ahead)
            total += part[0, 0] + part[0, 1]
    return total


@kernel
def _attend(kind: int, at: int, x: int, scores: int, chances: int, out: int, ahead: int) -> None:
    """What attention of one token reads of one head: keys at `at`, behind them the values (`decode/attention.py`)."""
    size = POSITIONS * row_stride(kind, _HEAD)
    step, values_at = _TILES * POSITIONS * 4, at + _TILES * size
    for i in range(_TILES):
        tile = Tile(kind, at + i * size, _HEAD, ahead)
        multiply_keys(tile, Heads(x, _HEAD * 4), Heads(scores + i * POSITIONS * 4, step), _QUERIES)
    for i in range(_TILES):
        tile = Tile(kind, values_at + i * size, _HEAD, ahead)
        add_values(tile, Heads(chances + i * POSITIONS * 4, step), Heads(out, _HEAD * 4), _QUERIES)


@kernel
def _multiply_lowbit(bits: int, at: int, rows: int, stride: int, q: int, ahead: int) -> Any:
    total = np.float32(0)
    for r in range(rows):
        row_at = at + r * stride
        if ahead != 0:
            prefetch(row_at + ahead, stride, 64)
        total += lowbit_dot(bits, row_at, q, _COLS)
    return total


class _Reader:
    """One thread's share of the memory, and what its kernels read and write beside it."""

    def __init__(self, share: Bytes) -> None:
        share.fill(_FILLER)
        self._at, self._size = address(share), len(share)
        self._x, self._sums, self._inverse = zeros(_COLS, np.float32), zeros(_COLS, np.int64), np.ones(1, np.float32)
        self._x.fill(1e-3)
        self._q, self._scratch = zeros(quantised_bytes(_COLS), np.uint8), zeros(batch_scratch_bytes(_COLS), np.uint8)
        self._quantised_at = quantise_input(address(self._x), address(self._q), _COLS)

    def turns(self, use: Use) -> Turn:
        """How this thread reads in that way."""
        make = {
            MATRIX_ROWS: self._matrix,
            CACHED_TILES: self._cached,
            LOWBIT_ROWS: self._lowbit,
            GATE_ROWS: self._gates,
            BUNDLES: self._bundles,
            SCATTERED: self._scattered,
        }
        return make[use.access](use.kind)

    def _places(self, stride: int, unit: int = 1) -> tuple[int, int]:
        """How many rows a part has, and its bytes."""
        rows = self._size // _PARTS // (stride * unit) * unit
        return rows, rows * stride

    def _matrix(self, kind: int) -> Turn:
        rows, size = self._places(row_bytes(kind, _COLS), 2 * TILE)

        def turn(fetch: Fetch, part: int) -> int:
            _multiply(kind, self._at + part * size, rows, address(self._x), self._quantised_at, fetch.ahead)
            return size

        return turn

    def _cached(self, kind: int) -> Turn:
        tile = tile_bytes(Kind(kind), _HEAD)
        heads, size = self._places(2 * _TILES * tile)
        scores, chances = np.full((2, _QUERIES * _TILES * POSITIONS), 1e-3, np.float32)
        packed, mixed = np.zeros((2, _QUERIES * _HEAD), np.float32)

        def turn(fetch: Fetch, part: int) -> int:
            queries_at = quantise_heads(kind, address(self._x), address(packed), _HEAD, _QUERIES)
            ahead = -(-fetch.ahead // tile) * tile  # whole tiles, as attention does
            for head in range(heads):
                at = self._at + part * size + head * 2 * _TILES * tile
                _attend(kind, at, queries_at, address(scores), address(chances), address(mixed), ahead)
            return size

        return turn

    def _lowbit(self, bits: int) -> Turn:
        stride = lowbit_bytes(bits, _COLS)
        rows, size = self._places(stride)

        def turn(fetch: Fetch, part: int) -> int:
            _multiply_lowbit(bits, self._at + part * size, rows, stride, self._quantised_at, fetch.ahead)
            return size

        return turn

    def _neurons(self, kind: int) -> tuple[BundleLayout, int]:
        """The layout of the whole share as groups, and the groups of a part."""
        one = BundleLayout(hidden=_COLS, ffn=GROUP, gate_kind=Kind(kind), down_kind=Kind(kind))
        groups, _ = self._places(one.group_bytes)
        ffn = groups * _PARTS * GROUP
        return BundleLayout(hidden=_COLS, ffn=ffn, gate_kind=Kind(kind), down_kind=Kind(kind)), groups

    def _as_bundles(self, layout: BundleLayout, access: int, fetch: Fetch) -> Bundles:
        table, kind = no_fetching(), layout.gate_kind
        table[access, kind], table[ANNOUNCED, kind] = fetch
        return bundles_at(self._at, layout, _RELU, access == BUNDLES, table, access == GATE_ROWS)

    def _batch(self) -> Batch:
        """Of one token."""
        places = (address(array) for array in (self._inverse, self._sums, self._scratch))
        return Batch(1, address(self._x), self._quantised_at, 0, *places)

    def _listed(self, layout: BundleLayout, access: int, lists: Sequence[npt.NDArray[np.int32]]) -> Turn:
        slots, words = np.arange(layout.groups, dtype=np.int32), np.full((1, layout.groups), 0xFFFFFFFF, np.uint32)
        selection = Selection(words, False, np.zeros_like(words))

        def turn(fetch: Fetch, part: int) -> int:
            listed, bundles = lists[part], self._as_bundles(layout, access, fetch)
            listed_neurons(bundles, slots, listed, 0, len(listed), selection, self._batch())
            return len(listed) * layout.bundle_bytes

        return turn

    def _bundles(self, kind: int) -> Turn:
        layout, count = self._neurons(kind)
        if not self._as_bundles(layout, BUNDLES, Fetch()).tiled:
            return self._listed(layout, BUNDLES, np.split(np.arange(layout.ffn, dtype=np.int32), _PARTS))
        slots = np.arange(layout.groups, dtype=np.int32)

        def turn(fetch: Fetch, part: int) -> int:
            bundles, first = self._as_bundles(layout, BUNDLES, fetch), part * count
            whole_groups(bundles, slots, first, first + count, self._batch())
            return count * layout.group_bytes

        return turn

    def _scattered(self, kind: int) -> Turn:
        layout, _ = self._neurons(kind)
        neurons = np.random.default_rng(0).permutation(layout.ffn).astype(np.int32)
        return self._listed(layout, SCATTERED, [np.sort(tenth) for tenth in np.array_split(neurons, 10)])

    def _gates(self, kind: int) -> Turn:
        layout, groups = self._neurons(kind)
        slots, count = np.arange(layout.groups, dtype=np.int32), groups * GROUP
        gates, opened = np.zeros(count, np.float32), np.zeros(count, np.int32)
        every = np.full((1, layout.groups), 0xFFFFFFFF, np.uint32)

        def turn(fetch: Fetch, part: int) -> int:
            bundles, first = self._as_bundles(layout, GATE_ROWS, fetch), part * groups
            open_gates(bundles, slots, first, first + groups, self._batch(), every, gates, opened)
            return count * layout.gate_row_bytes

        return turn


class _Course:
    """Whose turn it is, decided while all threads wait for each other."""

    def __init__(self, candidates: Mapping[Use, Sequence[Fetch]], cores: int, rounds: int) -> None:
        self.rates: dict[Use, Rates] = {use: {fetch: [] for fetch in candidates[use]} for use in candidates}
        # int64 [cores, 2]: bytes read in the last turn, and ns.
        self.done = np.zeros((cores, 2), np.int64)
        self.turn: tuple[Use, Fetch] | None = None
        self.number = -1
        self._turns = self._take_turns(rounds)

    def go_on(self) -> None:
        """Note what the last turn took, and choose the next."""
        if self.turn is not None:
            use, fetch = self.turn
            # The slowest thread's time: all wait for it in a run, too.
            self.rates[use][fetch].append(float(self.done[:, 0].sum() / self.done[:, 1].max()))
        self.turn = next(self._turns, None)
        self.number += 1

    def _take_turns(self, rounds: int) -> Iterator[tuple[Use, Fetch]]:
        for use, rates in self.rates.items():
            left = list(rates)
            # One more before that does not count: it may compile.
            yield use, left[0]
            rates[left[0]].clear()
            for number in range(rounds):
                # There and back, so that none always runs behind the same.
                for fetch in left if number % 2 else reversed(left):
                    yield use, fetch
                if len(left) == 1:
                    break  # it alone has run so many
                if number + 1 >= _TRIAL:
                    left = _in_front({fetch: rates[fetch] for fetch in left})


def _in_front(rates: Rates) -> list[Fetch]:
    """Those that were ever nearly as fast as the fastest, by their rates relative to those of their round."""
    means = np.mean(list(rates.values()), 0)
    best = {fetch: float(np.max(several / means)) for fetch, several in rates.items()}
    return [fetch for fetch in rates if best[fetch] >= _BEHIND * max(best.values())]


def race(candidates: Mapping[Use, Sequence[Fetch]], cpus: Sequence[int], rounds: int = ROUNDS) -> dict[Use, Rates]:
    """The rates of all candidates. Raises ResourceError for too little memory, or cpus that went away."""
    cores = sorted(set(cpus))
    shares = np.array_split(anonymous(_block_bytes(len(cores)), huge=True), len(cores))
    course = _Course(candidates, len(cores), rounds)
    gate, errors = threading.Barrier(len(cores), course.go_on), list[BaseException]()

    def run(rank: int) -> None:
        try:
            pin([cores[rank]])
            reader, before = _Reader(shares[rank]), None
            while True:
                gate.wait()
                if course.turn is None:
                    return
                use, fetch = course.turn
                if use != before:
                    turn, before = reader.turns(use), use
                started = time.thread_time_ns()
                size = turn(fetch, course.number % _PARTS)
                course.done[rank] = size, time.thread_time_ns() - started
        except threading.BrokenBarrierError:  # another has failed
            pass
        except BaseException as error:
            errors.append(error)
            gate.abort()

    threads = [threading.Thread(target=run, args=(rank,), daemon=True) for rank in range(len(cores))]
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    except BaseException:
        gate.abort()
        for thread in threads:
            thread.join()
        raise
    if errors:
        raise errors[0]
    return course.rates


def _block_bytes(cores: int) -> int:
    """Bytes of memory for a race: twice the caches, a quarter of what is free at most."""
    caches = read_caches()
    last = max((cache.level for cache in caches), default=0)
    cached = sum(cache.bytes * cache.count for cache in caches if cache.level == last)
    free = read_topology().available_bytes
    size = min(max(_LEAST, 2 * cached, cores * _SHARE), free // 4)
    if size < max(cached, _LEAST // 16):
        raise ResourceError(f"the caches hold {cached / 1e6:.0f} MB, and only {free / 1e6:.0f} MB of memory are free")
    return size // (4096 * cores) * 4096 * cores
