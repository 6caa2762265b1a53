"""Matrix products of prefill: packed rows times several tokens.

Activations of several tokens are kept in *panels*: [panel][feature][lane], one token a lane, 16 tokens a panel.
Then a weight meets 16 tokens in one instruction, no horizontal sum is needed, and a single token is the same
layout with one lane. A product takes 8 rows and up to 3 panels at a time: 24 accumulators of the 32 registers.

Rows are widened 8 or 32 at a time into scratch memory. Where the CPU multiplies bfloat16 (AVX512_BF16), rows and
input are rounded to it (but for float32 models) and two features are taken at once: *pairs*, 32 bits holding features
2k and 2k + 1, of a weight row or of a token. Elsewhere it is float32.
"""

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from warmfront.shared.kernels import simd
from warmfront.shared.kernels.fp16 import has
from warmfront.shared.kernels.jit import kernel
from warmfront.shared.kernels.rows import widen
from warmfront.shared.kernels.simd import FLOAT, I16, I32, I64, LANES, V16, call, fma, load, long, splat, store, vector
from warmfront.shared.model.formats import BLOCK, Kind

__all__ = ["LANES", "gather_columns", "in_pairs", "multiply_columns", "multiply_rows", "panels_of", "prepare"]

ROWS = 8
PANELS = 3
_F32 = int(Kind.F32)


class _BFloat(ir.types._BaseFloatType):  # type: ignore[misc]
    """LLVM's bfloat, which llvmlite lacks."""

    null = "0.0"

    def __str__(self) -> str:
        return "bfloat"


_BFloat._create_instance()
_BFLOAT = _BFloat()


def _multiplies_bfloat(context: Any) -> bool:
    return has(context, "avx512bf16", "avx512bw", "avx512vl")


@intrinsic
def _pairs_possible(context):
    def build(context, b, _signature, _arguments):
        return ir.Constant(ir.IntType(1), int(_multiplies_bfloat(context)))

    return types.boolean(), build


@kernel
def in_pairs(kind: int) -> bool:
    """Whether rows of this type are multiplied in bfloat16 pairs."""
    return kind != _F32 and _pairs_possible()


def _paired(b: Any, even: Any, odd: Any) -> Any:
    """Two float vectors as bfloat16 pairs, rounded to nearest even: i32 lanes, `even` in the low half."""
    low, high = (
        b.zext(
            b.bitcast(call(b, "llvm.x86.avx512bf16.cvtneps2bf16.512", vector(_BFLOAT), each), vector(I16)), vector(I32)
        )
        for each in (even, odd)
    )
    return b.or_(low, b.shl(high, ir.Constant(vector(I32), [16] * LANES)))


@intrinsic
def _pair_features(context, x, out, count):
    """Turn `count` couples of vectors at `x` (features 2k and 2k + 1 of a panel) into pairs at `out`."""

    def build(context, b, _signature, arguments):
        x, out, count = arguments
        if _multiplies_bfloat(context):
            with cgutils.for_range(b, count, intp=I64) as loop:
                at = b.mul(loop.index, long(128))
                couple = (load(b, x, b.add(at, long(64 * half)), V16) for half in (0, 1))
                store(b, out, b.mul(loop.index, long(64)), _paired(b, *couple))
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64), build


def _make_narrow(kind: int) -> Any:
    @intrinsic
    def narrow_of_kind(context, row, out, cols):
        """Write a packed row as bfloat16 [cols]."""

        def build(context, b, _signature, arguments):
            row, out, cols = arguments
            if _multiplies_bfloat(context):
                name, result = "llvm.x86.avx512bf16.cvtne2ps2bf16.512", vector(_BFLOAT, 32)
                with cgutils.for_range(b, b.udiv(cols, long(BLOCK)), intp=I64) as loop:
                    low, high = simd.weights_of(context, b, kind, row, cols, loop.index)
                    both = b.bitcast(call(b, name, result, high, low), vector(I32))
                    store(b, out, b.mul(loop.index, long(64)), both)
            return context.get_dummy_value()

        return types.void(types.int64, types.int64, types.int64), build

    return narrow_of_kind


def _make_interleave(kind: int) -> Any:
    @intrinsic
    def interleave_of_kind(context, even, odd, tail, out, cols):
        """Write two packed rows as pairs [cols]; `tail`: of their group, for Q4C."""

        def build(context, b, _signature, arguments):
            even, odd, tail, out, cols = arguments
            if _multiplies_bfloat(context):
                with cgutils.for_range(b, b.udiv(cols, long(BLOCK)), intp=I64) as loop:
                    blocks = (_row_block(context, b, kind, row, tail, cols, loop.index) for row in (even, odd))
                    for half, couple in enumerate(zip(*blocks, strict=True)):
                        at = b.add(b.mul(loop.index, long(128)), long(64 * half))
                        store(b, out, at, _paired(b, *couple))
            return context.get_dummy_value()

        return types.void(*[types.int64] * 5), build

    return interleave_of_kind


def _row_block(context: Any, b: Any, kind: int, row: Any, tail: Any, cols: Any, block: Any) -> list[Any]:
    """32 weights of a down row as two float32 vectors."""
    halves = simd.weights_of(context, b, kind, row, cols, block)
    if kind != Kind.Q4C:
        return list(halves)
    starts = (b.add(b.mul(block, long(64)), long(32 * half)) for half in (0, 1))
    return [
        fma(b, numbers, *simd.column_scales(context, b, tail, cols, at))
        for numbers, at in zip(halves, starts, strict=True)
    ]


@intrinsic
def _widen_q4c(context, row, tail, out, cols):
    """Write a Q4C row as float32 [cols]."""

    def build(context, b, _signature, arguments):
        row, tail, out, cols = arguments
        with cgutils.for_range(b, b.udiv(cols, long(BLOCK)), intp=I64) as loop:
            for half, weights in enumerate(_row_block(context, b, Kind.Q4C, row, tail, cols, loop.index)):
                store(b, out, b.add(b.mul(loop.index, long(128)), long(64 * half)), weights)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 4), build


def _make_product(panels: int, pairs: bool) -> Any:
    @intrinsic
    def product(context, w, row_step, k_step, count, x, x_step, y, y_step, adding):
        """y[p][r][:] (+)= sum over k < count of w[r * row_step + k * k_step] * x[p][k][:] for 8 rows r."""

        def build(context, b, _signature, arguments):
            w, row_step, k_step, count, x, x_step, y, y_step, adding = arguments
            if pairs and not _multiplies_bfloat(context):
                return context.get_dummy_value()
            sums = [[simd.zeros(b) for _ in range(panels)] for _ in range(ROWS)]
            cells = [
                (sums[r][p], b.add(b.mul(y_step, long(p)), long(64 * r))) for r in range(ROWS) for p in range(panels)
            ]
            with b.if_then(b.icmp_signed("!=", adding, long(0))):
                for cell, at in cells:
                    b.store(load(b, y, at, V16), cell)
            rows = [b.add(w, b.mul(row_step, long(r))) for r in range(ROWS)]
            element = I32 if pairs else FLOAT
            with cgutils.for_range(b, count, intp=I64) as loop:
                at = b.mul(loop.index, long(64))
                tokens = [load(b, x, b.add(b.mul(x_step, long(p)), at), vector(element)) for p in range(panels)]
                k = b.mul(loop.index, k_step)
                for r in range(ROWS):
                    weight = splat(b, load(b, rows[r], k, element))
                    for p in range(panels):
                        b.store(_accumulate(b, b.load(sums[r][p]), weight, tokens[p], pairs), sums[r][p])
            for cell, at in cells:
                store(b, y, at, b.load(cell))
            return context.get_dummy_value()

        return types.void(*[types.int64] * 9), build

    return product


def _accumulate(b: Any, sums: Any, weight: Any, tokens: Any, pairs: bool) -> Any:
    if not pairs:
        return fma(b, weight, tokens, sums)
    halves = (b.bitcast(each, vector(_BFLOAT, 32)) for each in (weight, tokens))
    return call(b, "llvm.x86.avx512bf16.dpbf16ps.512", V16, sums, *halves)


_F16, _BF16, _Q8, _Q4, _Q4S, _Q4C = (int(kind) for kind in Kind if kind != Kind.F32)
_narrow_f16, _narrow_bf16, _narrow_q8, _narrow_q4, _narrow_q4s = (
    _make_narrow(kind) for kind in (_F16, _BF16, _Q8, _Q4, _Q4S)
)
_interleave_f16, _interleave_bf16, _interleave_q8, _interleave_q4, _interleave_q4s, _interleave_q4c = (
    _make_interleave(kind) for kind in (_F16, _BF16, _Q8, _Q4, _Q4S, _Q4C)
)
_singles_1, _singles_2, _singles_3 = (_make_product(panels, False) for panels in (1, 2, 3))
_pairs_1, _pairs_2, _pairs_3 = (_make_product(panels, True) for panels in (1, 2, 3))


@kernel
def _narrow(kind: int, row: int, out: int, cols: int) -> None:
    if kind == _Q4:
        _narrow_q4(row, out, cols)
    elif kind == _Q4S:
        _narrow_q4s(row, out, cols)
    elif kind == _Q8:
        _narrow_q8(row, out, cols)
    elif kind == _BF16:
        _narrow_bf16(row, out, cols)
    else:
        _narrow_f16(row, out, cols)


@kernel
def _interleave(kind: int, even: int, odd: int, tail: int, out: int, cols: int) -> None:
    if kind == _Q4C:
        _interleave_q4c(even, odd, tail, out, cols)
    elif kind == _Q4:
        _interleave_q4(even, odd, tail, out, cols)
    elif kind == _Q4S:
        _interleave_q4s(even, odd, tail, out, cols)
    elif kind == _Q8:
        _interleave_q8(even, odd, tail, out, cols)
    elif kind == _BF16:
        _interleave_bf16(even, odd, tail, out, cols)
    else:
        _interleave_f16(even, odd, tail, out, cols)


@kernel
def _multiply(
    pairs: bool,
    w: int,
    row_step: int,
    k_step: int,
    count: int,
    x: int,
    x_step: int,
    y: int,
    y_step: int,
    panels: int,
    adding: int,
) -> None:
    """8 rows times `panels` panels of `count` features (or pairs): y[p][r] (+)= sum_k w[r][k] * x[p][k]."""
    p = 0
    while p < panels:
        x_at, y_at, left = x + p * x_step, y + p * y_step, panels - p
        if left >= PANELS:
            if pairs:
                _pairs_3(w, row_step, k_step, count, x_at, x_step, y_at, y_step, adding)
            else:
                _singles_3(w, row_step, k_step, count, x_at, x_step, y_at, y_step, adding)
            p += 3
        elif left == 2:
            if pairs:
                _pairs_2(w, row_step, k_step, count, x_at, x_step, y_at, y_step, adding)
            else:
                _singles_2(w, row_step, k_step, count, x_at, x_step, y_at, y_step, adding)
            p += 2
        else:
            if pairs:
                _pairs_1(w, row_step, k_step, count, x_at, x_step, y_at, y_step, adding)
            else:
                _singles_1(w, row_step, k_step, count, x_at, x_step, y_at, y_step, adding)
            p += 1


@kernel
def prepare(kind: int, x: int, out: int, features: int, panels: int) -> int:
    """Panels at `x` as rows of `kind` want them: as they are, or as pairs in `out` (half the size)."""
    if not in_pairs(kind):
        return x
    _pair_features(x, out, features * panels // 2)
    return out


@kernel
def multiply_rows(
    kind: int, row: int, stride: int, cols: int, x: int, y: int, y_step: int, panels: int, scratch: int
) -> None:
    """8 packed rows, `stride` bytes apart, times panels: y[p][r][lane], panel p at y + p * y_step.

    `x` comes from `prepare(kind, ...)`; `scratch` has room for 8 rows of float32.
    """
    if in_pairs(kind):
        for r in range(ROWS):
            _narrow(kind, row + r * stride, scratch + r * cols * 2, cols)
        _multiply(True, scratch, cols * 2, 4, cols // 2, x, cols * LANES * 2, y, y_step, panels, 0)
    else:
        for r in range(ROWS):
            widen(kind, row + r * stride, scratch + r * cols * 4, cols)
        _multiply(False, scratch, cols * 4, 4, cols, x, cols * LANES * 4, y, y_step, panels, 0)


@kernel
def gather_columns(kind: int, row: int, stride: int, tail: int, rows: int, cols: int, out: int) -> Any:
    """Widen `rows` packed rows (an even number) at `row` for `multiply_columns`; returns where the next ones belong.

    `out` has room for them in float32; `tail`: of the rows' group, for Q4C.
    """
    step = cols * 4
    if in_pairs(kind):
        for r in range(0, rows, 2):
            _interleave(kind, row + r * stride, row + (r + 1) * stride, tail, out + r // 2 * step, cols)
        return out + rows // 2 * step
    for r in range(rows):
        if kind == _Q4C:
            _widen_q4c(row + r * stride, tail, out + r * step, cols)
        else:
            widen(kind, row + r * stride, out + r * step, cols)
    return out + rows * step


@kernel
def multiply_columns(
    kind: int, gathered: int, rows: int, cols: int, x: int, x_rows: int, y: int, y_step: int, panels: int
) -> None:
    """y[p][column] += sum over `rows` gathered rows of row[column] * x[p][row].

    `x` lies in panels [panels, x_rows, lanes] that come from `prepare(kind, ...)`.
    """
    pairs = in_pairs(kind)
    share = 2 if pairs else 1
    x_step = x_rows // share * LANES * 4
    for column in range(0, cols, ROWS):
        y_at = y + column * LANES * 4
        _multiply(pairs, gathered + column * 4, 4, cols * 4, rows // share, x, x_step, y_at, y_step, panels, 1)


@kernel
def panels_of(tokens: int) -> int:
    """Panels that hold `tokens` tokens; a single token is a panel of one lane."""
    return (tokens + LANES - 1) // LANES
