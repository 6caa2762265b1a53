"""Down rows of prefill by byte instructions: those of several groups times their neurons' factors, 8 bits each.

As `byte_products.py` multiplies rows with tokens: a group's 32 neurons are the block, a column is the row. A column's
sum is a whole number, becomes a float once and is rounded to the token's exact sums (`exact_sums.py`). Where scales
are of a row and 32 columns, they are multiplied into the factors, which are quantised anew for each 32 columns then;
Q4C has scales of columns, and its factors are quantised once.

32 columns of a group, brought into one order for all tokens (1,280 bytes):

    numbers   for each 16 columns, for each 4 neurons: a 32-bit word of 4 unsigned bytes of each column
    scales    float32 [32] of the neurons, of Q4C of the columns; then minima likewise, where there are any: of Q4 what
              number 8 stands for, of Q4C number 0
"""

from typing import Any, NamedTuple

import numpy as np
from llvmlite import ir
from numba import carray, types
from numba.core import cgutils
from numba.extending import intrinsic

from warmfront.shared.kernels.atomics import floats_at, shorts_at
from warmfront.shared.kernels.byte_dot import multiplies_bytes
from warmfront.shared.kernels.exact_sums import add_to_sums
from warmfront.shared.kernels.feed_forward.down_tiles import neuron_scales, numbers_of
from warmfront.shared.kernels.fp16 import from_half
from warmfront.shared.kernels.gemm import PANELS, Panels, by_panels
from warmfront.shared.kernels.jit import kernel
from warmfront.shared.kernels.prefill.byte_products import (
    MULTIPLY,
    OFFSETS,
    PANEL_BLOCK,
    SCALES,
    STRICT,
    quantised,
    store_block,
)
from warmfront.shared.kernels.row_formats import DOWN_TILED, RowFormat, by_kind
from warmfront.shared.kernels.simd import (
    FLOAT,
    I8,
    I32,
    I64,
    V16,
    call,
    constants,
    load,
    long,
    splat,
    store,
    vector,
)
from warmfront.shared.model.bundle import GROUP
from warmfront.shared.model.formats import BLOCK, Kind
from warmfront.shared.model.panels import LANES

__all__ = ["COLUMNS_BYTES", "DownRows", "add_down_bytes", "arrange_columns", "quantise_factors"]

V64, VI32 = vector(I8, 64), vector(I32)
_Q8, _Q4, _Q4C = (int(kind) for kind in (Kind.Q8, Kind.Q4, Kind.Q4C))
_NUMBERS = GROUP * BLOCK
# Bytes of 32 columns of a group.
COLUMNS_BYTES = _NUMBERS + 2 * 4 * BLOCK
# Columns of a product: with 3 panels 24 sums of integers in registers.
_COLUMNS = 8


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


def _of_rows(b: Any, form: RowFormat, rows: Any, stride: Any, block: Any) -> tuple[list[Any], list[Any]]:
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
        low, high = ([b.xor(each, constants(-128, V64)) for each in part] for part in parts)
        return low, high
    low = [b.and_(each, constants(15, V64)) for each in parts[0]]
    return low, [b.lshr(each, constants(4, V64)) for each in parts[0]]


@intrinsic
def _arrange(context, kind, rows, block, out):
    """Write the numbers of 32 columns, and of a tile the neurons' scales; rows: address, stride."""

    def build(context, b, _signature, arguments):
        kind, rows, block, out = arguments
        rows_at, stride = cgutils.unpack_tuple(b, rows, 2)

        def write(halves: tuple[list[Any], list[Any]]) -> None:
            for i, each in enumerate(halves[0] + halves[1]):
                store(b, out, long(64 * i), each)

        def emit(form: RowFormat) -> None:
            with b.if_else(b.icmp_signed("==", stride, long(0))) as (tile, apart):
                with tile:
                    write(numbers_of(b, form, rows_at, block))
                    parts = [] if form.kind == Kind.Q4C else neuron_scales(context, b, form, rows_at, block)
                    for i, values in enumerate(value for part in parts for value in part):
                        store(b, out, long(_NUMBERS + 64 * i), values)
                with apart:
                    write(_of_rows(b, form, rows_at, stride, block))

        if multiplies_bytes(context):
            by_kind(b, kind, DOWN_TILED, emit)
        return context.get_dummy_value()

    return types.void(types.int64, rows, *[types.int64] * 2), build


@kernel
def arrange_columns(rows: DownRows, block: int, out: int) -> None:
    """Bring 32 columns, those of block `block`, of a group's down rows into the order above, at `out`."""
    kind, blocks = rows.kind, rows.cols // BLOCK
    _arrange(kind, (rows.at, rows.stride), block, out)
    scales = carray(floats_at(out + _NUMBERS), (2, BLOCK))
    if kind == _Q4C:
        halves = carray(shorts_at(rows.tail), (2, rows.cols))
        for i in range(BLOCK):
            scales[0, i] = from_half(halves[0, block * BLOCK + i])
            scales[1, i] = from_half(halves[1, block * BLOCK + i])
    elif rows.stride:
        for neuron in range(GROUP):
            at = rows.at + neuron * rows.stride + rows.cols // (1 if kind == _Q8 else 2)
            row = carray(shorts_at(at), (2 * blocks,))
            scales[0, neuron] = from_half(row[block])
            if kind == _Q4:
                scales[1, neuron] = from_half(row[blocks + block])
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

        numbers = quantised(b, [b.fmul(*product(k, scales), flags=STRICT) for k in range(GROUP)])
        total = b.fmul(b.sitofp(numbers.total, V16), numbers.scale, flags=STRICT)
        offsets = cgutils.alloca_once_value(
            b, b.fmul(total, splat(b, b.fsub(ir.Constant(FLOAT, 0.0), zero)), flags=STRICT)
        )
        with b.if_then(b.icmp_signed("!=", minima, long(0))):
            for k in range(GROUP):
                b.store(call(b, "llvm.fma.v16f32", V16, *product(k, minima), b.load(offsets)), offsets)
        # The inverse of a token's unit is a power of two, or NaN: here it is the same as in each of the factors.
        per_unit = load(b, inverse, long(0), V16)
        scale, offset = (b.fmul(each, per_unit, flags=STRICT) for each in (numbers.scale, b.load(offsets)))
        store_block(b, out, numbers._replace(scale=scale), offset)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, scales, types.float32, types.int64), build


@kernel
def quantise_factors(kind: int, factors: int, inverse: int, columns: int, panels: int, out: int) -> None:
    """Quantise a group's factors, float32 [panels, 32, 16], for 32 columns at `columns`, into blocks [panels].

    Of Q4C for all columns; `columns` are then 32 scales that are 1. `inverse`: of the tokens' units, [panels, 16].
    """
    # The number that counts as zero; of Q4C it is the column's, and the sum of the factors is kept to be multiplied.
    zero = np.float32(128 if kind == _Q8 else -1 if kind == _Q4C else 8)
    scales = columns if kind == _Q4C else columns + _NUMBERS
    for panel in range(panels):
        minima = scales + 4 * BLOCK if kind == _Q4 else 0
        x, unit = factors + panel * GROUP * LANES * 4, inverse + panel * LANES * 4
        _quantise(x, unit, (scales, minima), zero, out + panel * PANEL_BLOCK)


@intrinsic
def _products(context, kind, columns, x, y, groups, panels):
    """Group after group, for all of 32 columns: y[p][c][:] += sum over neurons, rounded.

    columns, y: address, step; x: address, step from group to group; `panels`: 1 to 3.
    """

    def build(context, b, _signature, arguments):
        kind, *tuples, groups, panels = arguments
        parts = [cgutils.unpack_tuple(b, each, 2) for each in tuples]

        def emit(by_column: bool, count: int) -> None:
            with cgutils.for_range(b, groups, intp=I64) as loop:
                at, x_at = (b.add(start, b.mul(loop.index, step)) for start, step in parts[:2])
                xs = [b.add(x_at, long(PANEL_BLOCK * p)) for p in range(count)]
                with cgutils.for_range(b, long(BLOCK // _COLUMNS), intp=I64) as part:
                    _product(context, b, (at, part.index), xs, parts[2], by_column)

        if multiplies_bytes(context):
            by_panels(b, b.icmp_signed("==", kind, long(_Q4C)), panels, emit)
        return context.get_dummy_value()

    return types.void(types.int64, columns, x, y, types.int64, types.int64), build


def _product(
    context: Any, b: Any, columns: tuple[Any, Any], xs: list[Any], y: tuple[Any, Any], by_column: bool
) -> None:
    """8 columns of a group, number `columns[1]` of four."""
    at, part = columns
    # Two eights to each 16 columns.
    numbers = b.add(b.mul(b.lshr(part, long(1)), long(_NUMBERS // 2)), b.mul(b.and_(part, long(1)), long(4 * _COLUMNS)))
    cells = [(c, p) for c in range(_COLUMNS) for p in range(len(xs))]
    products = [constants(0, VI32)] * len(cells)
    for word in range(GROUP // 4):
        factors = [load(b, x, long(64 * word), VI32) for x in xs]
        for c in range(_COLUMNS):
            four = splat(b, load(b, at, b.add(numbers, long(4 * (LANES * word + c))), I32))
            for p, each in enumerate(factors):
                cell = c * len(xs) + p
                products[cell] = call(b, MULTIPLY, VI32, products[cell], four, each)
    scales, offsets = ([load(b, x, long(place), V16) for x in xs] for place in (SCALES, OFFSETS))
    for whole, (c, p) in zip(products, cells, strict=True):
        value = b.sitofp(whole, V16)
        if by_column:
            place = b.add(b.mul(part, long(4 * _COLUMNS)), long(_NUMBERS + 4 * c))
            scale, minimum = (splat(b, load(b, at, b.add(place, long(4 * BLOCK * i)), FLOAT)) for i in (0, 1))
            offset = b.fmul(offsets[p], minimum, flags=STRICT)
            value = call(b, "llvm.fma.v16f32", V16, b.fmul(value, scales[p], flags=STRICT), scale, offset)
        else:
            value = call(b, "llvm.fma.v16f32", V16, value, scales[p], offsets[p])
        place = b.add(b.mul(y[1], long(p)), b.mul(part, long(8 * LANES * _COLUMNS)))
        add_to_sums(context, b, y[0], b.add(place, long(8 * LANES * c)), value)


# A kernel of its own, or LLVM would unroll the loops that call it.
@kernel
def _add(kind: int, columns: tuple[int, int], x: tuple[int, int], y: tuple[int, int], groups: int, panels: int) -> None:
    _products(kind, columns, x, y, groups, panels)


@kernel
def add_down_bytes(kind: int, columns: int, blocks: int, groups: int, sums: Panels) -> None:
    """Add what groups make of 32 columns to the int64 sums y[p][column][lane], in units of the tokens.

    `columns`: [groups] as `arrange_columns` leaves them; `blocks`: [groups, panels] as `quantise_factors` does.
    """
    panel = 0
    while panel < sums.panels:
        rest = sums.panels - panel
        count = 2 if rest == 4 else min(rest, PANELS)
        x = (blocks + panel * PANEL_BLOCK, sums.panels * PANEL_BLOCK)
        _add(kind, (columns, COLUMNS_BYTES), x, (sums.at + panel * sums.step, sums.step), groups, count)
        panel += count
