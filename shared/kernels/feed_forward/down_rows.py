"""The sum of a group's down rows, each times its neuron's factor, added to exact sums (`exact_sums.py`).

The sums of some columns stay in registers over all rows, four at a time: they are loaded and stored once, not once a
neuron. The rows are added in the order of the list, one multiply-add each, so a sum has the same bits however many
are taken at a time.
"""

from typing import Any, NamedTuple

from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from warmfront.shared.kernels import simd
from warmfront.shared.kernels.exact_sums import add_to_sums
from warmfront.shared.kernels.fp16 import has
from warmfront.shared.kernels.jit import apart
from warmfront.shared.kernels.row_formats import FORMATS, RowFormat, by_kind, column_scales, fetch_blocks
from warmfront.shared.kernels.simd import FLOAT, I64, V16, fma, load, long, splat, store
from warmfront.shared.model.bundle import GROUP
from warmfront.shared.model.formats import BLOCK, Kind

__all__ = ["AHEAD_AT", "FACTORS_AT", "LIST_BYTES", "PARTIAL_AT", "TOGETHER", "add_down_rows"]

# A list of up to 32 rows, at byte offsets: int64 [32] their addresses; int64 [32] how many bytes behind them lies what
# is fetched meanwhile, 0: nothing; float32 [32] the factors, and the sum of all; then float32 [cols] of scratch.
AHEAD_AT, FACTORS_AT = 8 * GROUP, 16 * GROUP
PARTIAL_AT = FACTORS_AT + 4 * GROUP + 64
LIST_BYTES = PARTIAL_AT
# Rows read side by side: streams that the hardware's own fetching can follow, and enough work between two stores. It
# changes no bit, and 2, 4 and 8 are equally fast (docs/log.md).
TOGETHER = 4


class _Part(NamedTuple):
    """What is computed: rows first .. first + count of a list, for blocks of columns from `block` on."""

    list: Any
    first: Any
    count: Any
    cols: Any
    block: Any


def _totals(context: Any, b: Any, form: RowFormat, part: _Part, blocks: int) -> list[Any]:
    """The sums of the halves of so many blocks over the part's rows, added to those of the rows before."""
    partial, at = b.add(part.list, long(PARTIAL_AT)), b.mul(part.block, long(128))
    totals = [simd.zeros(b) for _ in range(2 * blocks)]
    with b.if_then(b.icmp_signed(">", part.first, long(0))):
        for half, total in enumerate(totals):
            b.store(load(b, partial, b.add(at, long(64 * half)), V16), total)
    with cgutils.for_range(b, part.count, intp=I64) as loop:
        number = b.add(part.first, loop.index)
        eight = b.mul(number, long(8))
        row, ahead = (load(b, part.list, b.add(eight, long(start)), I64) for start in (0, AHEAD_AT))
        fetch_blocks(b, form.kind, row, ahead, part.block, blocks)
        factor = splat(b, load(b, part.list, b.add(b.mul(number, long(4)), long(FACTORS_AT)), FLOAT))
        for i in range(blocks):
            halves = form.weights(context, b, row, part.cols, b.add(part.block, long(i)))
            for weights, total in zip(halves, totals[2 * i :], strict=False):
                b.store(fma(b, weights, factor, b.load(total)), total)
    return [b.load(total) for total in totals]


def _emit(context: Any, b: Any, form: RowFormat, part: _Part, blocks: int, last: Any, place: Any) -> None:
    tail, sums = place
    totals = _totals(context, b, form, part, blocks)
    at = b.mul(part.block, long(128))
    with b.if_else(last) as (ending, going_on):
        with ending:
            factors = splat(b, load(b, part.list, long(FACTORS_AT + 4 * GROUP), FLOAT))
            for half, total in enumerate(totals):
                if form.kind == Kind.Q4C:
                    # The rows' numbers have been added: their columns' scale and minimum make weights.
                    scales_at = b.add(b.mul(part.block, long(64)), long(32 * half))
                    scale, minimum = column_scales(context, b, tail, part.cols, scales_at)
                    total = fma(b, minimum, factors, b.fmul(scale, total))
                add_to_sums(context, b, sums, b.add(b.mul(part.block, long(256)), long(128 * half)), total)
        with going_on:
            for half, total in enumerate(totals):
                store(b, b.add(part.list, long(PARTIAL_AT)), b.add(at, long(64 * half)), total)


@intrinsic
def _add_some(context, kind, list_, first, count, last, place):
    """Rows first .. first + count of the list; place: tail of the group, sums, columns."""

    def build(context, b, _signature, arguments):
        kind, list_, first, count, last, place = arguments
        tail, sums, cols = cgutils.unpack_tuple(b, place, 3)
        # As many sums as the registers hold: what a row costs beside its weights is shared by so many columns.
        wide = 4 if has(context, "avx512f") else 2

        def emit(form: RowFormat) -> None:
            blocks = b.udiv(cols, long(BLOCK))
            whole = b.udiv(blocks, long(wide))
            with cgutils.for_range(b, whole, intp=I64) as loop:
                part = _Part(list_, first, count, cols, b.mul(loop.index, long(wide)))
                _emit(context, b, form, part, wide, last, (tail, sums))
            done = b.mul(whole, long(wide))
            with cgutils.for_range(b, b.sub(blocks, done), intp=I64) as loop:
                part = _Part(list_, first, count, cols, b.add(done, loop.index))
                _emit(context, b, form, part, 1, last, (tail, sums))

        by_kind(b, kind, FORMATS, emit)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 4, types.boolean, place), build


@apart
def add_down_rows(kind: int, list_at: int, count: int, tail_at: int, sums_at: int, cols: int) -> None:
    """Add the sum over a list of `count` rows of one group, 1 or more, of factor times row to int64 sums [cols].

    `tail_at`: the group's tail, for Q4C.
    """
    for first in range(0, count, TOGETHER):
        rows = min(TOGETHER, count - first)
        _add_some(kind, list_at, first, rows, first + rows == count, (tail_at, sums_at, cols))
