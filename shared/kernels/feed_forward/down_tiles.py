"""Down rows in tiles: those of a whole group, for products in which all of its neurons are computed.

As in a tile of a matrix (`tiles.py`), where the input's bytes are those of a group's factors now: a register holds 16
columns of 4 neurons. The bytes of the 32 rows, at the same place in another order, for each 32 columns:

    numbers   for each 4 neurons: for each of 16 columns a byte of each neuron; in 4 bits the low and the high nibbles
              are columns 16 apart, of Q8 one such vector after the other, with 128 added
    scales    float16 [32] of the neurons; of Q4 then minima likewise; of Q4C none

Rows of floats, on every CPU: for each 32 columns, neuron by neuron, its 32 weights. Nothing is multiplied another way
then, but memory is read from one end to the other (docs/log.md).

The factors are quantised to 15 bits as inputs are (`byte_dot.py`). Where the scale is a row's, it is multiplied into
the factor before, so the factors are quantised anew for each 32 columns; of Q4C once.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from llvmlite import ir
from numba import carray, types
from numba.core import cgutils
from numba.extending import intrinsic

from warmfront.shared.kernels import simd
from warmfront.shared.kernels.atomics import address_of, bytes_at, shorts_at
from warmfront.shared.kernels.byte_dot import (
    Left,
    Products,
    inputs_at_once,
    left,
    most_inputs,
    multiplies_bytes,
    split_block,
)
from warmfront.shared.kernels.exact_sums import add_to_sums
from warmfront.shared.kernels.fp16 import widened
from warmfront.shared.kernels.gemm import Panels
from warmfront.shared.kernels.jit import apart, kernel
from warmfront.shared.kernels.row_formats import (
    DOWN_TILED,
    FORMATS,
    RowFormat,
    block_bytes,
    by_kind,
    column_scales,
    fetch_blocks,
)
from warmfront.shared.kernels.rows import Pair, row_stride
from warmfront.shared.kernels.simd import (
    FLOAT,
    I8,
    I16,
    I32,
    I64,
    V16,
    constants,
    fetch_part,
    fma,
    load,
    long,
    splat,
    store,
    vector,
)
from warmfront.shared.kernels.simd import (
    total as total_of,
)
from warmfront.shared.kernels.tiles import in_tiles, zero_number
from warmfront.shared.model.bundle import GROUP
from warmfront.shared.model.formats import BLOCK, FLOATS, Kind
from warmfront.shared.model.panels import LANES

__all__ = [
    "add_down_tile",
    "add_down_tiles",
    "down_in_bytes",
    "down_in_tiles",
    "interleave_down",
    "neuron_scales",
    "numbers_of",
]

V64 = vector(I8, 64)
_Q8, _Q4, _Q4C = int(Kind.Q8), int(Kind.Q4), int(Kind.Q4C)
_FLOATS = tuple(int(kind) for kind in FLOATS)


@kernel
def down_in_bytes(kind: int) -> bool:
    """Whether down rows of this type are multiplied as bytes on this machine."""
    return in_tiles(_Q4 if kind == _Q4C else kind)


@kernel
def _floats(kind: int) -> bool:
    return kind in _FLOATS


@kernel
def down_in_tiles(kind: int) -> bool:
    """Whether down rows of this type can be in tiles on this machine."""
    return _floats(kind) or down_in_bytes(kind)


@apart
def interleave_down(kind: int, rows: npt.NDArray[np.uint8], stride: int, cols: int, out: int) -> None:
    """Write a group's 32 packed down rows, `stride` bytes apart, as a tile to `out`, another place.

    `rows` is an array, not an address, which would not keep the memory of what the caller has allocated.
    """
    blocks = cols // BLOCK
    if _floats(kind):
        size = row_stride(kind, cols) // blocks
        weights = carray(bytes_at(out), (blocks, GROUP, size))
        for neuron in range(GROUP):
            source = carray(bytes_at(address_of(rows) + neuron * stride), (blocks, size))
            for block in range(blocks):
                for i in range(size):
                    weights[block, neuron, i] = source[block, i]
        return
    size = BLOCK if kind == _Q8 else BLOCK // 2
    flip = np.uint8(128) if kind == _Q8 else np.uint8(0)
    per_block = 0 if kind == _Q4C else 2 if kind == _Q4 else 1
    block_size = GROUP * (size + 2 * per_block)
    for neuron in range(GROUP):
        row_at = address_of(rows) + neuron * stride
        row = carray(bytes_at(row_at), (blocks, size // LANES, LANES))
        halves = carray(shorts_at(row_at + blocks * size), (per_block, blocks))
        for block in range(blocks):
            block_at = out + block * block_size
            numbers = carray(bytes_at(block_at), (size // LANES, GROUP // 4, LANES, 4))
            scales = carray(shorts_at(block_at + size * GROUP), (per_block, GROUP))
            for half in range(size // LANES):
                for i in range(LANES):
                    numbers[half, neuron // 4, i, neuron % 4] = row[block, half, i] ^ flip
            for part in range(per_block):
                scales[part, neuron] = halves[part, block]


def _block_at(b: Any, form: RowFormat, tile: Any, block: Any) -> Any:
    return b.add(tile, b.mul(block, long(GROUP * block_bytes(form.kind))))


def numbers_of(context: Any, b: Any, form: RowFormat, tile: Any, block: Any) -> Iterator[tuple[Left, Left]]:
    """8 times 4 neurons: of both halves of 32 columns a vector of bytes, of 16 columns.

    Each is loaded when it is asked for: AVX2 has not the registers for all.
    """
    at = _block_at(b, form, tile, block)
    for i in range(8):
        first = load(b, at, long(64 * i), V64)
        if form.kind == Kind.Q8:
            second = load(b, at, long(64 * (8 + i)), V64)
            yield left(context, b, first, form.largest), left(context, b, second, form.largest)
        else:
            yield Left(b.and_(first, constants(15, V64))), Left(b.lshr(first, constants(4, V64)))


def both_halves(numbers: Iterator[tuple[Left, Left]]) -> tuple[list[Left], list[Left]]:
    """All that `numbers_of` gives, by the halves of the columns."""
    first, second = (list(each) for each in zip(*numbers, strict=True))
    return first, second


def neuron_scales(context: Any, b: Any, form: RowFormat, tile: Any, block: Any) -> list[list[Any]]:
    """Scales, and of Q4 minima, of the 32 neurons in 32 columns: two vectors each."""
    count = 2 if form.kind == Kind.Q4 else 1
    at = _block_at(b, form, tile, block)
    first = GROUP * (block_bytes(form.kind) - 2 * count)
    starts = [[long(first + 2 * GROUP * part + 32 * half) for half in (0, 1)] for part in range(count)]
    return [[widened(context, b, load(b, at, start, vector(I16))) for start in both] for both in starts]


def _products(
    context: Any, b: Any, form: RowFormat, place: tuple[Any, Any], kept: list[Any], next_at: Any
) -> list[list[Any]]:
    """Number times factor, added up over the 32 neurons, for both halves of 32 columns: 16 integers, for each token.

    Meanwhile the 32 columns at `next_at` are fetched. place: tile, block; kept: where each token's factors are.
    """
    sums = [[[Products(context, form.largest) for _ in (0, 1)] for _ in (0, 1)] for _ in kept]
    for i, halves in enumerate(numbers_of(context, b, form, *place)):
        fetch_part(b, next_at, GROUP * block_bytes(form.kind), i, 8)
        for at, own in zip(kept, sums, strict=True):
            for part in (0, 1):
                four = b.bitcast(splat(b, load(b, at, long(32 * part + 4 * i), I32)), V64)
                for half, total in zip(halves, own, strict=True):
                    total[part].add(b, half, four)
    seven = constants(7, vector(I32))
    return [[b.add(b.shl(high.total(b), seven), low.total(b)) for high, low in own] for own in sums]


class _Group(NamedTuple):
    """A tile, the tail of its group, and where each token's factors are."""

    tile: Any
    tail: Any
    factors: list[Any]


def _add_numbers(
    context: Any, b: Any, form: RowFormat, groups: list[_Group], cols: Any, sums: list[Any], ahead: Any
) -> None:
    """What groups' tiles add to the sums of some tokens; `ahead`: how many bytes ahead to fetch.

    The numbers of 32 columns are loaded and unpacked once for all tokens; the steps of what a group adds to a token's
    sums are the same however many there are of each.
    """
    blocks, last = b.udiv(cols, long(BLOCK)), b.sub(b.udiv(cols, long(BLOCK)), long(1))
    quantised = [
        [_Factors(b, [load(b, at, long(64 * half), V16) for half in (0, 1)]) for at in group.factors]
        for group in groups
    ]

    def quantise(block: Any) -> None:
        for group, tokens in zip(groups, quantised, strict=True):
            parts = [] if form.kind == Kind.Q4C else neuron_scales(context, b, form, group.tile, block)
            for own in tokens:
                own.quantise(b, parts, block)

    quantise(long(0))
    with cgutils.for_range(b, blocks, intp=I64) as loop:
        block = loop.index
        taken = [[own.take(b, long(0) if form.kind == Kind.Q4C else block) for own in tokens] for tokens in quantised]
        if form.kind != Kind.Q4C:
            # Meanwhile those of the next columns: alone, a chain of a hundred cycles.
            quantise(b.select(b.icmp_signed("<", block, last), b.add(block, long(1)), last))
        for group, parts in zip(groups, taken, strict=True):
            _add_block(context, b, form, (group, cols, block), parts, sums, ahead)


def _add_block(
    context: Any, b: Any, form: RowFormat, place: tuple[_Group, Any, Any], parts: list[Any], sums: list[Any], ahead: Any
) -> None:
    """Add what 32 columns of a tile give for each token; place: group, columns, block; parts: from `_Factors.take`."""
    group, cols, block = place
    next_at = b.add(_block_at(b, form, group.tile, block), ahead)
    products = _products(context, b, form, (group.tile, block), [at for at, *_ in parts], next_at)
    for half in (0, 1):
        if form.kind == Kind.Q4C:
            at = b.add(b.mul(block, long(64)), long(32 * half))
            scale, minimum = column_scales(context, b, group.tail, cols, at)
        for sums_at, (_, step, total, offset), wholes in zip(sums, parts, products, strict=True):
            whole = wholes[half]
            if zero := 8 if form.kind == Kind.Q4 else zero_number(context, form):
                whole = b.sub(whole, splat(b, b.mul(total, ir.Constant(I32, zero))))
            value = b.fmul(b.sitofp(whole, V16), splat(b, step))
            if form.kind == Kind.Q4C:
                factor_sum = splat(b, b.fmul(b.sitofp(total, FLOAT), step))
                value = fma(b, value, scale, b.fmul(minimum, factor_sum))
            if form.kind == Kind.Q4:
                value = b.fadd(value, splat(b, offset))
            add_to_sums(context, b, sums_at, b.add(b.mul(block, long(256)), long(128 * half)), value)


class _Factors:
    """A token's factors [32], quantised for some columns while those before are multiplied."""

    def __init__(self, b: Any, halves: list[Any]) -> None:
        self._halves = halves
        # Their bytes, from where a product takes four in all lanes: int8 [high, low] [32], of every other 32 columns.
        self._bytes = b.ptrtoint(cgutils.alloca_once(b, V64, size=2), I64)
        self._step, self._offset = cgutils.alloca_once(b, FLOAT), cgutils.alloca_once(b, FLOAT)
        self._total = cgutils.alloca_once(b, I32)

    def _place(self, b: Any, block: Any) -> Any:
        return b.add(self._bytes, b.shl(b.and_(block, long(1)), long(6)))

    def quantise(self, b: Any, parts: list[list[Any]], block: Any) -> None:
        """For block `block`; parts: the neurons' scales and minima there, as far as the weight type has them."""
        scaled = self._halves
        if parts:
            scaled = [b.fmul(own, scale) for own, scale in zip(self._halves, parts[0], strict=True)]
        split = split_block(b, scaled)
        for part, halves in enumerate((split.high, split.low)):
            for half, values in enumerate(halves):
                store(b, self._place(b, block), long(32 * part + 16 * half), b.trunc(values, vector(I8)))
        b.store(split.scale, self._step)
        b.store(split.total, self._total)
        if len(parts) > 1:
            # Numbers are taken from 8 as in Q4S, or the factors' rounding would count 7.5 times on average.
            lows = [fma(b, scale, constants(8.0), low) for scale, low in zip(*parts, strict=True)]
            products = [b.fmul(own, low) for own, low in zip(self._halves, lows, strict=True)]
            b.store(total_of(b, b.fadd(*products)), self._offset)

    def take(self, b: Any, block: Any) -> tuple[Any, Any, Any, Any]:
        """For block `block`: where the bytes are, what one step of them is, their total, and what the minima add."""
        return self._place(b, block), b.load(self._step), b.load(self._total), b.load(self._offset)


def _add_floats(
    context: Any, b: Any, form: RowFormat, groups: list[_Group], cols: Any, sums: list[Any], ahead: Any
) -> None:
    with cgutils.for_range(b, b.udiv(cols, long(BLOCK)), intp=I64) as loop:
        for group in groups:
            for token, (factors, sums_at) in enumerate(zip(group.factors, sums, strict=True)):
                own_ahead = long(0) if token else ahead
                _add_float_block(context, b, form, (group.tile, loop.index), factors, sums_at, own_ahead)


def _add_float_block(
    context: Any, b: Any, form: RowFormat, place: tuple[Any, Any], factors: Any, sums: Any, ahead: Any
) -> None:
    tile, block = place
    # Two sums for each half: a multiply-add takes four cycles.
    totals = [[simd.zeros(b) for _ in range(2)] for _ in range(2)]
    with cgutils.for_range(b, long(GROUP // 4), intp=I64) as four:
        first = b.add(b.mul(block, long(GROUP)), b.mul(four.index, long(4)))
        for i in range(4):
            fetch_blocks(b, form.kind, tile, ahead, b.add(first, long(i)))
            factor = splat(b, load(b, factors, b.add(b.mul(four.index, long(16)), long(4 * i)), FLOAT))
            # A tile of floats is one row of so many blocks.
            halves = form.weights(context, b, tile, long(0), b.add(first, long(i)))
            for weights, total in zip(halves, totals[i % 2], strict=True):
                b.store(fma(b, weights, factor, b.load(total)), total)
    for half, two in enumerate(zip(*totals, strict=True)):
        at = b.add(b.mul(block, long(256)), long(128 * half))
        add_to_sums(context, b, sums, at, b.fadd(*(b.load(total) for total in two)))


def _make_adder(count: int) -> Any:
    @intrinsic
    def add_tile(context, kind, tiles, tail, cols, factors, sums, ahead):
        """`count` tokens. `tiles`: addresses; `tail`: how far behind each its group's tail is; `factors`: for each tile
        the address of the first token's, then bytes to the next's; `sums`: address of the first's, bytes to the
        next's."""

        def build(context, b, _signature, arguments):
            kind, tiles, tail, cols, factors, sums, ahead = arguments
            tiles, (*firsts, step), (sums_at, sums_step) = (
                cgutils.unpack_tuple(b, each) for each in (tiles, factors, sums)
            )
            own_sums = [b.add(sums_at, b.mul(sums_step, long(i))) for i in range(count)]
            groups = [
                _Group(tile, b.add(tile, tail), [b.add(first, b.mul(step, long(i))) for i in range(count)])
                for tile, first in zip(tiles, firsts, strict=True)
            ]

            def emit(form: RowFormat) -> None:
                add = _add_floats if form.kind in FLOATS else _add_numbers
                if form.kind in FLOATS or multiplies_bytes(context):
                    add(context, b, form, groups, cols, own_sums, ahead)

            if count <= most_inputs(context):
                by_kind(b, kind, [form for form in FORMATS if form.kind in FLOATS or form in DOWN_TILED], emit)
            return context.get_dummy_value()

        return types.void(types.int64, tiles, types.int64, types.int64, factors, sums, types.int64), build

    return add_tile


_add_1, _add_2, _add_4 = (_make_adder(count) for count in (1, 2, 4))


@apart
def add_down_tile(kind: int, tile_at: int, tail: int, factors: Panels, sums: Panels, cols: int, ahead: int) -> None:
    """For each token of a batch, add the sum of factor times row over the 32 rows of a tile to its int64 sums [cols].

    `factors`: float32 [32] of each token; `tail`: how far behind the tile its group's tail is, for Q4C; `ahead`: how
    many bytes ahead to fetch. A token's sums have the same bits whatever tokens are beside it.
    """
    most = inputs_at_once()
    for token in range(0, sums.panels, most):
        some = min(sums.panels - token, most)
        factors_at, sums_at = factors.at + token * factors.step, sums.at + token * sums.step
        if some == 4:
            _add_4(kind, (tile_at,), tail, cols, (factors_at, factors.step), (sums_at, sums.step), ahead)
        elif some > 1:
            _add_2(kind, (tile_at,), tail, cols, (factors_at, factors.step), (sums_at, sums.step), ahead)
        if some % 2 == 1:
            factors_at, sums_at = factors_at + (some - 1) * factors.step, sums_at + (some - 1) * sums.step
            own_ahead = ahead if some == 1 else 0
            _add_1(kind, (tile_at,), tail, cols, (factors_at, factors.step), (sums_at, sums.step), own_ahead)
        ahead = 0


@apart
def add_down_tiles(kind: int, tiles: Pair, tail: int, factors: Panels, sums: Panels, cols: int, ahead: int) -> None:
    """`add_down_tile` for two tiles; the second one's factors lie behind those of all tokens for the first."""
    others = factors.at + sums.panels * factors.step
    if sums.panels == 1:
        _add_1(kind, tiles, tail, cols, (factors.at, others, factors.step), (sums.at, sums.step), ahead)
        return
    add_down_tile(kind, tiles[0], tail, factors, sums, cols, ahead)
    add_down_tile(kind, tiles[1], tail, Panels(others, factors.step, factors.panels), sums, cols, ahead)
