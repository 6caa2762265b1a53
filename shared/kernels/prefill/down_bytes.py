"""Down rows of prefill by byte instructions: those of several groups times their neurons' factors, 8 bits each.

As `byte_products.py` multiplies rows with tokens: a group's 32 neurons are the block, a column is the row. The numbers
of 32 columns stay in 16 registers while one token after the other meets them. A column's sum is a whole number, becomes
a float once and is rounded to the token's exact sums (`exact_sums.py`). Where scales are of a row and 32 columns, they
are multiplied into the factors, which are quantised anew for each 32 columns then; Q4C has scales of columns, and its
factors are quantised once.

The sums come in strips: for each 32 columns, for each token, 32 int64. So what a group adds to a token lies together,
wherever the token stands among those of the job, and the sums of all tokens in 32 columns stay in the caches while the
groups follow each other.
"""

from typing import Any, NamedTuple

import numpy as np
from llvmlite import ir
from numba import carray, types
from numba.core import cgutils
from numba.extending import intrinsic

from warmfront.shared.kernels.atomics import floats_at, shorts_at
from warmfront.shared.kernels.byte_dot import Left, left, multiplies_bytes
from warmfront.shared.kernels.exact_sums import add_to_sums
from warmfront.shared.kernels.feed_forward.down_tiles import both_halves, neuron_scales, numbers_of
from warmfront.shared.kernels.fp16 import from_half
from warmfront.shared.kernels.jit import apart
from warmfront.shared.kernels.prefill.byte_panels import (
    OFFSETS,
    PANEL_BLOCK,
    SCALES,
    quantised,
    store_block,
    zero_of,
)
from warmfront.shared.kernels.prefill.byte_products import each_token, multiplied, transposed
from warmfront.shared.kernels.row_formats import DOWN_TILED, TILED, RowFormat, block_bytes, by_kind, column_scales
from warmfront.shared.kernels.simd import (
    FLOAT,
    I8,
    I32,
    I64,
    V16,
    constants,
    fetch,
    fma,
    load,
    long,
    splat,
    store,
    vector,
)
from warmfront.shared.model.bundle import GROUP
from warmfront.shared.model.formats import BLOCK, Kind
from warmfront.shared.model.panels import LANES

__all__ = [
    "SUMS_BYTES",
    "DownRows",
    "add_down_bytes",
    "add_strips",
    "quantise_factors",
    "widen_neuron_scales",
]

V64, VI32 = vector(I8, 64), vector(I32)
_Q8, _Q4, _Q4C = (int(kind) for kind in (Kind.Q8, Kind.Q4, Kind.Q4C))
# Bytes of a token's sums in a strip.
SUMS_BYTES = 8 * BLOCK


class DownRows(NamedTuple):
    """The down rows of a group."""

    # Weight type.
    kind: int
    # Address of a tile, or of the first of rows that lie `stride` bytes apart; `stride` of a tile: 0.
    at: int
    stride: int
    # Of the group, for Q4C.
    tail: int
    # Weights of a row.
    cols: int


def _of_rows(
    context: Any, b: Any, form: RowFormat, rows: Any, stride: Any, block: Any
) -> tuple[list[Left], list[Left]]:
    """As `numbers_of` a tile, from rows."""
    short = vector(I8, LANES)
    # Bytes of 4 rows, column by column.
    order = [LANES * row + column for column in range(LANES) for row in range(4)]
    count = 2 if form.kind == Kind.Q8 else 1
    parts: tuple[list[Any], ...] = ([], [])
    for half in range(count):
        at = b.add(b.mul(block, long(LANES * count)), long(LANES * half))
        for first in range(0, GROUP, 4):
            each = [load(b, b.add(rows, b.mul(stride, long(first + row))), at, short) for row in range(4)]
            twice = ir.Constant(vector(I32, 32), list(range(32)))
            couples = (b.shuffle_vector(*couple, twice) for couple in (each[:2], each[2:]))
            parts[half].append(b.shuffle_vector(*couples, ir.Constant(vector(I32, 64), order)))
    if form.kind == Kind.Q8:
        # Of signed bytes unsigned ones: 128 is added, which flips the sign.
        flipped = ([b.xor(each, constants(-128, V64)) for each in part] for part in parts)
        low, high = ([left(context, b, each, form.largest) for each in part] for part in flipped)
        return low, high
    low = [Left(b.and_(each, constants(15, V64))) for each in parts[0]]
    return low, [Left(b.lshr(each, constants(4, V64))) for each in parts[0]]


@intrinsic
def _neuron_scales(context, kind, tile, block, out):
    """Write the scales of a tile's neurons in 32 columns, then minima."""

    def build(context, b, _signature, arguments):
        kind, tile, block, out = arguments

        def emit(form: RowFormat) -> None:
            parts = neuron_scales(context, b, form, tile, block)
            for i, values in enumerate(value for part in parts for value in part):
                store(b, out, long(64 * i), values)

        if multiplies_bytes(context):
            by_kind(b, kind, TILED, emit)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 4), build


@apart
def widen_neuron_scales(rows: DownRows, block: int, out: int) -> None:
    """Write the neurons' scales in the 32 columns of a block as float32 [32], of Q4 then what number 8 stands for."""
    kind, blocks = rows.kind, rows.cols // BLOCK
    scales = carray(floats_at(out), (2, GROUP))
    if rows.stride:
        for neuron in range(GROUP):
            at = rows.at + neuron * rows.stride + rows.cols // (1 if kind == _Q8 else 2)
            row = carray(shorts_at(at), (2 * blocks,))
            scales[0, neuron] = from_half(row[block])
            if kind == _Q4:
                scales[1, neuron] = from_half(row[blocks + block])
    else:
        _neuron_scales(kind, rows.at, block, out)
    if kind == _Q4:
        # Numbers are taken from 8 on, in the middle, where the factors' rounding errors weigh half as much as from 0.
        for neuron in range(GROUP):
            scales[1, neuron] += np.float32(8) * scales[0, neuron]


@intrinsic
def _quantise(context, x, inverse, scales, zero, out):
    """A panel's factors [32, 16] times the neurons' scales as a block; scales: address, that of minima or 0."""

    def build(context, b, _signature, arguments):
        x, inverse, scales, zero, out = arguments
        scales, minima = cgutils.unpack_tuple(b, scales, 2)
        if not multiplies_bytes(context):
            return context.get_dummy_value()

        def product(k: int, at: Any) -> tuple[Any, Any]:
            return load(b, x, long(64 * k), V16), splat(b, load(b, at, long(4 * k), FLOAT))

        numbers = quantised(context, b, [b.fmul(*product(k, scales)) for k in range(GROUP)])
        total = b.fmul(b.sitofp(numbers.total, V16), numbers.scale)
        offsets = cgutils.alloca_once_value(b, b.fmul(total, splat(b, b.fsub(ir.Constant(FLOAT, 0.0), zero))))
        with b.if_then(b.icmp_signed("!=", minima, long(0))):
            for k in range(GROUP):
                b.store(fma(b, *product(k, minima), b.load(offsets)), offsets)
        # The inverse of a token's unit is a power of two, or NaN: here it is the same as in each of the factors.
        per_unit = load(b, inverse, long(0), V16)
        scale, offset = (b.fmul(each, per_unit) for each in (numbers.scale, b.load(offsets)))
        store_block(b, out, numbers._replace(scale=scale), offset)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, scales, types.float32, types.int64), build


@apart
def quantise_factors(kind: int, factors: int, inverse: int, scales: int, panels: int, out: int) -> None:
    """Quantise a group's factors, float32 [panels, 32, 16], for 32 columns, into blocks [panels].

    `scales`: of the neurons there, from `widen_neuron_scales`; of Q4C, where it is for all columns, 32 that are 1.
    `inverse`: of the tokens' units, [panels, 16].
    """
    # The number that counts as zero; of Q4C it is the column's, and the sum of the factors is kept to be multiplied.
    zero = np.float32(-1 if kind == _Q4C else 8 if kind == _Q4 else zero_of(kind))
    for panel in range(panels):
        minima = scales + 4 * GROUP if kind == _Q4 else 0
        x, unit = factors + panel * GROUP * LANES * 4, inverse + panel * LANES * 4
        _quantise(x, unit, (scales, minima), zero, out + panel * PANEL_BLOCK)


@intrinsic
def _products(context, rows, x, sums, tokens):
    """32 columns of a group times tokens, rounded: sums[place][column] += ...

    rows: weight type, address, stride, tail, columns of a row, block; x: address of the factors; sums: address, places.
    """

    def build(context, b, _signature, arguments):
        rows, x, sums, tokens = arguments
        kind, at, stride, tail, cols, block = cgutils.unpack_tuple(b, rows)
        sums_at, places_at = cgutils.unpack_tuple(b, sums)

        def emit(form: RowFormat) -> None:
            columns = []
            if form.kind == Kind.Q4C:
                starts = [b.add(b.mul(block, long(64)), long(32 * half)) for half in (0, 1)]
                columns = [column_scales(context, b, tail, cols, start) for start in starts]

            def multiply(halves: tuple[list[Left], list[Left]]) -> None:
                with each_token(b, x, long(PANEL_BLOCK), tokens) as (number, token):
                    place = b.zext(load(b, places_at, b.mul(number, long(4)), I32), I64)
                    own_sums = b.add(sums_at, b.mul(place, long(SUMS_BYTES)))
                    _add_token(context, b, form, halves, (columns, token, own_sums))

            with b.if_else(b.icmp_signed("==", stride, long(0))) as (tile, apart):
                with tile:
                    size = GROUP * block_bytes(form.kind)
                    # The group's next turn: between them are those of others, each at a place of its own.
                    fetch(b, b.add(at, b.mul(block, long(size))), long(size), size)
                    multiply(both_halves(numbers_of(context, b, form, at, block)))
                with apart:
                    multiply(_of_rows(context, b, form, at, stride, block))

        if multiplies_bytes(context):
            by_kind(b, kind, DOWN_TILED, emit)
        return context.get_dummy_value()

    return types.void(rows, types.int64, sums, types.int64), build


def _add_token(context: Any, b: Any, form: RowFormat, halves: Any, place: Any) -> None:
    """32 columns of a group times a token's factors; place: the columns' scales, if any, the token, its sums."""
    columns, token, sums = place
    scale, offset = (splat(b, load(b, token, long(at), FLOAT)) for at in (SCALES, OFFSETS))
    for half, whole in enumerate(multiplied(context, b, form, halves, token, [constants(0, VI32)] * 2)):
        value = b.sitofp(whole, V16)
        if columns:
            factor, minimum = columns[half]
            lowest = b.fmul(offset, minimum)
            value = fma(b, b.fmul(value, scale), factor, lowest)
        else:
            value = fma(b, value, scale, offset)
        add_to_sums(context, b, sums, long(8 * LANES * half), value)


@apart
def add_down_bytes(rows: DownRows, block: int, factors: int, places: int, tokens: int, strip: int) -> None:
    """Add what a group makes of the 32 columns of block `block` to the tokens' sums, in their units.

    `factors`: blocks [panels] from `quantise_factors`; `places`: int32 [tokens], where each has its sums in the strip.
    """
    at = (rows.kind, rows.at, rows.stride, rows.tail, rows.cols, block)
    _products(at, factors, (strip, places), tokens)


@intrinsic
def _add_turned(context, strip, sums):
    """Add int64 [16 tokens, 32] to [32, 16]."""

    def build(_context, b, _signature, arguments):
        strip, sums = arguments
        eight = vector(I64, 8)
        for token in range(0, LANES, 8):
            for column in range(0, BLOCK, 8):
                own = [load(b, strip, long(SUMS_BYTES * (token + i) + 8 * column), eight) for i in range(8)]
                for i, values in enumerate(transposed(b, own)):
                    place = long(8 * LANES * (column + i) + 8 * token)
                    store(b, sums, place, b.add(values, load(b, sums, place, eight)))
        return _context.get_dummy_value()

    return types.void(types.int64, types.int64), build


@apart
def add_strips(strips: int, panels: int, cols: int, sums: int) -> None:
    """Add strips [cols / 32, panels * 16, 32] to int64 sums [panels, cols, 16]."""
    for block in range(cols // BLOCK):
        for panel in range(panels):
            strip = strips + (block * panels + panel) * LANES * SUMS_BYTES
            _add_turned(strip, sums + (panel * cols + block * BLOCK) * LANES * 8)
