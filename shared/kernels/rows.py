"""Compiled arithmetic on packed rows (layouts: `shared/model/formats.py`): dot and widen for every weight type.

Rows are fetched ahead by the caller's hint, if it gives one (`fetching.py`). Inner products with rows of whole numbers
take the input quantised where the CPU multiplies bytes (`byte_dot.py`); elsewhere they take it as it is.
"""

from typing import Any

from llvmlite import ir
from numba import carray, types
from numba.core import cgutils
from numba.extending import intrinsic

from warmfront.shared.kernels import simd
from warmfront.shared.kernels.atomics import floats_at
from warmfront.shared.kernels.byte_dot import byte_dot, multiplies_bytes
from warmfront.shared.kernels.jit import apart, kernel
from warmfront.shared.kernels.row_formats import (
    FORMATS,
    PLAIN,
    ByteFormat,
    RowFormat,
    by_kind,
    fetch_blocks,
    stride,
)
from warmfront.shared.kernels.simd import I64, V16, fma, load, long, store
from warmfront.shared.model.formats import BLOCK, FLOATS

__all__ = [
    "Pair",
    "bits_of",
    "dot",
    "dot_two",
    "prefetch",
    "row_stride",
    "share",
    "takes_quantised",
    "widen",
]

# Addresses of two rows, or tiles.
Pair = tuple[int, int]
_FLOATS = tuple(int(kind) for kind in FLOATS)
_FLOAT_FORMATS = [form for form in PLAIN if form.kind in FLOATS]


def _float_dots(context: Any, b: Any, form: RowFormat, rows: list[Any], x: Any, cols: Any, ahead: Any) -> list[Any]:
    # Two sums of each: a multiply-add takes four cycles, and with one sum each would wait for the one before.
    sums = [(simd.zeros(b), simd.zeros(b)) for _ in rows]
    with cgutils.for_range(b, b.udiv(cols, long(BLOCK)), intp=I64) as loop:
        for row, totals in zip(rows, sums, strict=True):
            fetch_blocks(b, form.kind, row, ahead, loop.index)
            for half, weights in enumerate(form.weights(context, b, row, cols, loop.index)):
                at = b.add(b.mul(loop.index, long(128)), long(64 * half))
                b.store(fma(b, weights, load(b, x, at, V16), b.load(totals[half])), totals[half])
    return [simd.total(b, b.fadd(b.load(first), b.load(second))) for first, second in sums]


def _byte_dot(
    context: Any, b: Any, form: RowFormat, integers: ByteFormat, row: Any, q: Any, cols: Any, ahead: Any
) -> Any:
    def weights(pair: Any) -> Any:
        fetch_blocks(b, form.kind, row, ahead, b.mul(pair, long(2)), 2)
        return integers.numbers(b, row, pair)

    def scales(at: Any) -> Any:
        return integers.scales(context, b, row, cols, at)

    given = integers.zero
    zero = (lambda at: given(context, b, row, cols, at)) if callable(given) else given
    return byte_dot(context, b, q, cols, weights, scales, zero, integers.largest)


@intrinsic
def _dot(context, kind, row, x, q, cols, ahead):
    def build(context, b, _signature, arguments):
        kind, row, x, q, cols, ahead = arguments

        def emit(form: RowFormat) -> Any:
            if form.bytes is not None and multiplies_bytes(context):
                return _byte_dot(context, b, form, form.bytes, row, q, cols, ahead)
            return _float_dots(context, b, form, [row], x, cols, ahead)[0]

        return by_kind(b, kind, PLAIN, emit)

    return types.float32(*[types.int64] * 6), build


@intrinsic
def _dot_two(context, kind, rows, x, cols, outs, ahead):
    def build(context, b, _signature, arguments):
        kind, rows, x, cols, outs, ahead = arguments
        rows, outs = (cgutils.unpack_tuple(b, each, 2) for each in (rows, outs))

        def emit(form: RowFormat) -> None:
            for result, out in zip(_float_dots(context, b, form, rows, x, cols, ahead), outs, strict=True):
                store(b, out, long(0), result)

        by_kind(b, kind, _FLOAT_FORMATS, emit)
        return context.get_dummy_value()

    return types.void(types.int64, rows, types.int64, types.int64, outs, types.int64), build


@intrinsic
def _widen(context, kind, row, out, cols):
    def build(context, b, _signature, arguments):
        kind, row, out, cols = arguments

        def emit(form: RowFormat) -> None:
            with cgutils.for_range(b, b.udiv(cols, long(BLOCK)), intp=I64) as loop:
                for half, weights in enumerate(form.weights(context, b, row, cols, loop.index)):
                    store(b, out, b.add(b.mul(loop.index, long(128)), long(64 * half)), weights)

        by_kind(b, kind, PLAIN, emit)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 4), build


@intrinsic
def _row_stride(context, kind, cols):
    def build(_context, b, _signature, arguments):
        kind, cols = arguments
        return by_kind(b, kind, FORMATS, lambda form: stride(b, form.kind, cols))

    return types.int64(types.int64, types.int64), build


@intrinsic
def _takes_quantised(context, kind):
    def build(_context, b, _signature, arguments):
        return by_kind(b, arguments[0], FORMATS, lambda form: ir.Constant(ir.IntType(1), form.bytes is not None))

    return types.boolean(types.int64), build


@kernel
def takes_quantised(kind: int) -> bool:
    """Whether `dot` reads, on a CPU that multiplies bytes, only what `quantise_input` made of the input."""
    return _takes_quantised(kind)


@apart
def dot(kind: int, row: int, x: int, q: int, cols: int, ahead: int) -> Any:
    """Inner product of the packed row at `row` with float32 [cols] at `x`.

    `ahead`: fetch meanwhile the row that lies so many bytes behind this one, which may be any; 0: none.
    `q`: what `quantise_input` returned for x; used only if `takes_quantised(kind)`.
    """
    return _dot(kind, row, x, q, cols, ahead)


@apart
def dot_two(kind: int, rows: Pair, x: int, q: int, cols: int, outs: Pair, ahead: int) -> None:
    """`dot` of two rows with one input, into the float32 at two addresses.

    Rows of floats block by block in turns: where these lie apart, memory is read faster (docs/log.md).
    """
    if kind in _FLOATS:
        _dot_two(kind, rows, x, cols, outs, ahead)
        return
    for i in range(2):
        carray(floats_at(outs[i]), (1,))[0] = dot(kind, rows[i], x, q, cols, ahead)


@apart
def widen(kind: int, row: int, out: int, cols: int) -> None:
    """Write the packed row at `row`, not of Q4C, as float32 [cols] to `out`."""
    _widen(kind, row, out, cols)


@kernel
def row_stride(kind: int, cols: int) -> int:
    """Compiled `formats.row_bytes`."""
    return _row_stride(kind, cols)


@intrinsic
def bits_of(context, word):
    """How many bits of a 32-bit word are set."""

    def build(_context, b, _signature, arguments):
        return b.ctpop(arguments[0])

    return types.int32(types.uint32), build


@intrinsic
def prefetch(context, at, size, step):
    """Fetch a line of every `step` bytes of `size` at `at`.

    All lines (64) if they are needed soon; with a line of each KB the addresses are translated and the hardware's own
    fetching starts.
    """

    def build(context, b, _signature, arguments):
        at, size, step = arguments
        steps = b.udiv(b.add(size, b.sub(step, long(1))), step)
        with cgutils.for_range(b, steps, intp=I64) as loop:
            simd.prefetch_line(b, b.add(at, b.mul(loop.index, step)))
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64), build


@kernel
def share(total: int, unit: int, low: int, high: int, parts: int) -> tuple[int, int]:
    """The range of `total` items from `low` to `high` of `parts` equal parts, cut at multiples of `unit`.

    Thread `rank` of several takes `share(total, unit, rank, rank + 1, threads)`.
    """
    units = (total + unit - 1) // unit
    return min(units * low // parts * unit, total), min(units * high // parts * unit, total)
