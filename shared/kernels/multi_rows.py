"""Compiled arithmetic on several short rows at once: the input, or the sums, stay in registers.

For rows so short that a `kernels.dot` or `axpy` is mostly its own beginning and end: cached keys and values, the
second matrix of a predictor.
"""

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from warmfront.shared.kernels import simd
from warmfront.shared.kernels.jit import kernel
from warmfront.shared.kernels.simd import FLOAT, I64, LANES, V16, fma, load, long, splat, store
from warmfront.shared.model.formats import BLOCK, Kind

__all__ = ["ROWS", "add_rows", "dot_rows"]

ROWS = LANES
# Rows added at a time: with two vectors of columns each, enough sums to hide the latency of a multiply-add.
_TOGETHER = 4
_F32, _F16, _BF16, _Q8, _Q4, _Q4S, _ = (int(kind) for kind in Kind)


def _add_across(b: Any, vectors: list[Any]) -> Any:
    """16 vectors: lane r of the result is the sum of vector r."""
    width = LANES // 2
    while len(vectors) > 1:
        starts = range(0, 2 * LANES, 2 * width)
        first = [start + i for start in starts for i in range(width)]
        second = [lane + width for lane in first]
        vectors = [
            b.fadd(
                *(
                    b.shuffle_vector(one, other, ir.Constant(ir.VectorType(simd.I32, LANES), lanes))
                    for lanes in (first, second)
                )
            )
            for one, other in zip(vectors[::2], vectors[1::2], strict=True)
        ]
        width //= 2
    return vectors[0]


def _make_dot_rows(kind: int) -> Any:
    @intrinsic
    def dot_rows_of_kind(context, rows, stride, x, cols, out):
        def build(context, b, _signature, arguments):
            rows, stride, x, cols, out = arguments
            each = [b.add(rows, b.mul(stride, long(r))) for r in range(ROWS)]
            sums = [simd.zeros(b) for _ in each]
            with cgutils.for_range(b, b.udiv(cols, long(BLOCK)), intp=I64) as loop:
                at = b.mul(loop.index, long(128))
                inputs = load(b, x, at, V16), load(b, x, b.add(at, long(64)), V16)
                for row, total in zip(each, sums, strict=True):
                    for weights, values in zip(
                        simd.weights_of(context, b, kind, row, cols, loop.index), inputs, strict=True
                    ):
                        b.store(fma(b, weights, values, b.load(total)), total)
            store(b, out, long(0), _add_across(b, [b.load(total) for total in sums]))
            return context.get_dummy_value()

        return types.void(*[types.int64] * 5), build

    return dot_rows_of_kind


def _make_add_rows(kind: int) -> Any:
    @intrinsic
    def add_rows_of_kind(context, rows, stride, factors, count, y, cols):
        def build(context, b, _signature, arguments):
            rows, stride, factors, count, y, cols = arguments
            with cgutils.for_range(b, b.udiv(cols, long(BLOCK)), intp=I64) as block:
                at = b.mul(block.index, long(128))
                places = at, b.add(at, long(64))
                sums = [[simd.zeros(b) for _ in places] for _ in range(_TOGETHER)]
                with cgutils.for_range(b, b.udiv(count, long(_TOGETHER)), intp=I64) as loop:
                    for turn, pair in enumerate(sums):
                        number = b.add(b.mul(loop.index, long(_TOGETHER)), long(turn))
                        factor = splat(b, load(b, factors, b.mul(number, long(4)), FLOAT))
                        row = b.add(rows, b.mul(stride, number))
                        for weights, total in zip(
                            simd.weights_of(context, b, kind, row, cols, block.index), pair, strict=True
                        ):
                            b.store(fma(b, weights, factor, b.load(total)), total)
                for half, place in enumerate(places):
                    one, two, three, four = (b.load(pair[half]) for pair in sums)
                    added = b.fadd(b.fadd(one, two), b.fadd(three, four))
                    store(b, y, place, b.fadd(load(b, y, place, V16), added))
            return context.get_dummy_value()

        return types.void(*[types.int64] * 6), build

    return add_rows_of_kind


_dots_f32, _dots_f16, _dots_bf16, _dots_q8, _dots_q4, _dots_q4s = (
    _make_dot_rows(kind) for kind in Kind if kind != Kind.Q4C
)
_adds_f32, _adds_f16 = (_make_add_rows(kind) for kind in (_F32, _F16))


@kernel
def dot_rows(kind: int, rows: int, stride: int, x: int, cols: int, out: int) -> None:
    """Inner products of 16 packed rows, not of Q4C, `stride` bytes apart, with float32 [cols] at `x`.

    They go to float32 [16] at `out`.
    """
    if kind == _F16:
        _dots_f16(rows, stride, x, cols, out)
    elif kind == _Q8:
        _dots_q8(rows, stride, x, cols, out)
    elif kind == _Q4:
        _dots_q4(rows, stride, x, cols, out)
    elif kind == _Q4S:
        _dots_q4s(rows, stride, x, cols, out)
    elif kind == _BF16:
        _dots_bf16(rows, stride, x, cols, out)
    else:
        _dots_f32(rows, stride, x, cols, out)


@kernel
def add_rows(kind: int, rows: int, stride: int, factors: int, count: int, y: int, cols: int) -> None:
    """y += sum of factors[i] * row i over `count` rows of F32 or F16, `stride` bytes apart; `count` is a multiple of 4.

    `factors`: float32 [count]; `y`: float32 [cols].
    """
    if kind == _F16:
        _adds_f16(rows, stride, factors, count, y, cols)
    else:
        _adds_f32(rows, stride, factors, count, y, cols)
