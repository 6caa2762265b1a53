"""Dots with several short rows at once: the input stays in registers.

For rows so short that most of a `rows.dot` is its beginning and its end: the second matrix of a predictor.
"""

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from warmfront.shared.kernels import simd
from warmfront.shared.kernels.jit import kernel
from warmfront.shared.kernels.row_formats import PLAIN, RowFormat, by_kind
from warmfront.shared.kernels.simd import I32, I64, V16, fma, load, long, store, vector
from warmfront.shared.model.formats import BLOCK
from warmfront.shared.model.panels import LANES

__all__ = ["ROWS", "dot_rows"]

ROWS = LANES


def _add_across(b: Any, vectors: list[Any]) -> Any:
    """16 vectors: lane r of the result is the sum of vector r."""
    width = LANES // 2
    # A tree of 15 additions: each halves the vectors and joins two, where a sum of each alone takes 4 shuffles.
    while len(vectors) > 1:
        starts = range(0, 2 * LANES, 2 * width)
        first = [start + i for start in starts for i in range(width)]
        second = [lane + width for lane in first]
        picks = [ir.Constant(vector(I32), lanes) for lanes in (first, second)]
        pairs = zip(vectors[::2], vectors[1::2], strict=True)
        vectors = [b.fadd(*(b.shuffle_vector(one, other, pick) for pick in picks)) for one, other in pairs]
        width //= 2
    return vectors[0]


@intrinsic
def _dot_rows(context, kind, rows, stride, x, cols, out):
    def build(context, b, _signature, arguments):
        kind, rows, stride, x, cols, out = arguments

        def emit(form: RowFormat) -> None:
            starts = [b.add(rows, b.mul(stride, long(r))) for r in range(ROWS)]
            sums = [simd.zeros(b) for _ in starts]
            with cgutils.for_range(b, b.udiv(cols, long(BLOCK)), intp=I64) as loop:
                at = b.mul(loop.index, long(128))
                inputs = load(b, x, at, V16), load(b, x, b.add(at, long(64)), V16)
                for row, total in zip(starts, sums, strict=True):
                    halves = form.weights(context, b, row, cols, loop.index)
                    for weights, values in zip(halves, inputs, strict=True):
                        b.store(fma(b, weights, values, b.load(total)), total)
            store(b, out, long(0), _add_across(b, [b.load(total) for total in sums]))

        by_kind(b, kind, PLAIN, emit)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 6), build


@kernel
def dot_rows(kind: int, rows: int, stride: int, x: int, cols: int, out: int) -> None:
    """Inner products of 16 packed rows, not of Q4C, `stride` bytes apart, with float32 [cols] at `x`.

    They go to float32 [16] at `out`.
    """
    _dot_rows(kind, rows, stride, x, cols, out)
