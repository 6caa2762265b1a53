"""Compiled arithmetic on packed rows: dot, axpy and widen for every weight type, and a small GEMM.

All are explicit vectors of LLVM IR, 16 lanes wide, that LLVM lowers to whatever the machine has (one AVX-512
register, two of AVX2, four of NEON). Multiply-adds are `fmuladd`: fused where the machine can. Every function
has a fixed order of operations, so results repeat bit for bit. Row layouts: `weights.py`.

Activations of several tokens are kept in *panels*: [panel][feature][lane], one token a lane, 16 tokens a panel.
Then a weight meets 16 tokens in one instruction, no horizontal sum is needed, and a single token is the same
layout with one lane. `gemm` multiplies 8 widened rows by up to 3 panels: 24 accumulators of the 32 registers.
"""

from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from warmfront.shared.halves import widened
from warmfront.shared.jit import kernel
from warmfront.shared.weights import BLOCK, Kind, row_bytes

__all__ = ["AHEAD_BYTES", "LANES", "axpy", "dot", "multiply", "panels_of", "row_stride", "share", "widen"]

LANES = 16
# How far ahead rows are fetched: the hardware starts anew at every page, and a kernel that unpacks 4 bits keeps too
# few lines in flight by itself (scripts/bench_kernels.py).
AHEAD_BYTES = 2048
ROWS = 8
PANELS = 3

I8, I16, I32, I64 = (ir.IntType(bits) for bits in (8, 16, 32, 64))
F32 = ir.FloatType()
V16 = ir.VectorType(F32, LANES)
_F32, _F16, _BF16, _Q8, _Q4 = (int(kind) for kind in Kind)


def _vector(element: Any) -> Any:
    return ir.VectorType(element, LANES)


def _long(value: int) -> Any:
    return ir.Constant(I64, value)


def _load(b: Any, address: Any, offset: Any, type_: Any) -> Any:
    value = b.load(b.inttoptr(b.add(address, offset), type_.as_pointer()))
    value.align = 1
    return value


def _store(b: Any, address: Any, offset: Any, value: Any) -> None:
    b.store(value, b.inttoptr(b.add(address, offset), value.type.as_pointer())).align = 1


def _splat(b: Any, scalar: Any) -> Any:
    nothing = ir.Constant(_vector(scalar.type), ir.Undefined)
    one = b.insert_element(nothing, scalar, ir.Constant(I32, 0))
    return b.shuffle_vector(one, nothing, ir.Constant(_vector(I32), [0] * LANES))


def _fma(b: Any, x: Any, y: Any, z: Any) -> Any:
    name = "llvm.fmuladd.v16f32"
    function = b.module.globals.get(name) or ir.Function(b.module, ir.FunctionType(V16, [V16] * 3), name)
    return b.call(function, [x, y, z])


def _half(context: Any, b: Any, row: Any, offset: Any) -> Any:
    """The float16 at `offset`, in all lanes. Spread before it is widened: a scalar load of 16 bits merges into an old
    register, and the kernel would wait for its own accumulator (measured: half the speed)."""
    return widened(context, b, _splat(b, _load(b, row, offset, I16)))


def _block(context: Any, b: Any, kind: int, row: Any, cols: Any, block: Any) -> tuple[Any, Any]:
    """Weights 0..15 and 16..31 of `block` as two float32 vectors."""
    at = {_F32: 128, _F16: 64, _BF16: 64, _Q8: 32, _Q4: 16}[kind]
    first = b.mul(block, _long(at))
    second = b.add(first, _long(at // 2))
    if kind == _F32:
        return _load(b, row, first, V16), _load(b, row, second, V16)
    if kind == _F16:
        low, high = (widened(context, b, _load(b, row, o, _vector(I16))) for o in (first, second))
        return low, high
    if kind == _BF16:
        shift = ir.Constant(_vector(I32), [16] * LANES)
        low, high = (
            b.bitcast(b.shl(b.zext(_load(b, row, o, _vector(I16)), _vector(I32)), shift), V16) for o in (first, second)
        )
        return low, high
    scale_at = b.mul(block, _long(2))
    if kind == _Q8:
        scale = _half(context, b, row, b.add(cols, scale_at))
        low, high = (
            b.fmul(b.sitofp(b.sext(_load(b, row, o, _vector(I8)), _vector(I32)), V16), scale) for o in (first, second)
        )
        return low, high
    half = b.udiv(cols, _long(2))
    scale = _half(context, b, row, b.add(half, scale_at))
    minimum = _half(context, b, row, b.add(b.add(half, b.udiv(cols, _long(BLOCK // 2))), scale_at))
    both = b.zext(_load(b, row, first, _vector(I8)), _vector(I32))
    nibbles = (
        b.and_(both, ir.Constant(_vector(I32), [15] * LANES)),
        b.lshr(both, ir.Constant(_vector(I32), [4] * LANES)),
    )
    low, high = (_fma(b, b.sitofp(nibble, V16), scale, minimum) for nibble in nibbles)
    return low, high


def _prefetch(b: Any, kind: int, ahead: Any, block: Any) -> None:
    """Fetch what `block` is to its row, of the row at `ahead`."""
    name = "llvm.prefetch.p0"
    arguments = [I8.as_pointer(), I32, I32, I32]
    function = b.module.globals.get(name) or ir.Function(b.module, ir.FunctionType(ir.VoidType(), arguments), name)
    size = row_bytes(kind, BLOCK)
    for line in range(0, size, 64):
        at = b.add(ahead, b.add(b.mul(block, _long(size)), _long(line)))
        b.call(function, [b.inttoptr(at, I8.as_pointer()), *(ir.Constant(I32, value) for value in (0, 3, 1))])


def _zeros(b: Any) -> Any:
    return cgutils.alloca_once_value(b, ir.Constant(V16, [0.0] * LANES))


def _make_dot(kind: int) -> Any:
    @intrinsic
    def dot_of_kind(context, row, x, cols, ahead):
        def build(ctx, b, _signature, arguments):
            row, x, cols, ahead = arguments
            sums = (_zeros(b), _zeros(b))
            with cgutils.for_range(b, b.udiv(cols, _long(BLOCK)), intp=I64) as loop:
                _prefetch(b, kind, ahead, loop.index)
                for half, weights in enumerate(_block(ctx, b, kind, row, cols, loop.index)):
                    at = b.add(b.mul(loop.index, _long(128)), _long(64 * half))
                    b.store(_fma(b, weights, _load(b, x, at, V16), b.load(sums[half])), sums[half])
            total = b.fadd(b.load(sums[0]), b.load(sums[1]))
            name = "llvm.vector.reduce.fadd.v16f32"
            reduce = b.module.globals.get(name) or ir.Function(b.module, ir.FunctionType(F32, [F32, V16]), name)
            return b.call(reduce, [ir.Constant(F32, 0.0), total], fastmath=("reassoc",))

        return types.float32(types.int64, types.int64, types.int64, types.int64), build

    return dot_of_kind


def _make_axpy(kind: int) -> Any:
    @intrinsic
    def axpy_of_kind(context, factor, row, y, cols, ahead):
        def build(ctx, b, _signature, arguments):
            factor, row, y, cols, ahead = arguments
            factors = _splat(b, factor)
            with cgutils.for_range(b, b.udiv(cols, _long(BLOCK)), intp=I64) as loop:
                _prefetch(b, kind, ahead, loop.index)
                for half, weights in enumerate(_block(ctx, b, kind, row, cols, loop.index)):
                    at = b.add(b.mul(loop.index, _long(128)), _long(64 * half))
                    _store(b, y, at, _fma(b, weights, factors, _load(b, y, at, V16)))
            return ctx.get_dummy_value()

        return types.void(types.float32, types.int64, types.int64, types.int64, types.int64), build

    return axpy_of_kind


def _make_widen(kind: int) -> Any:
    @intrinsic
    def widen_of_kind(context, row, out, cols):
        def build(ctx, b, _signature, arguments):
            row, out, cols = arguments
            with cgutils.for_range(b, b.udiv(cols, _long(BLOCK)), intp=I64) as loop:
                for half, weights in enumerate(_block(ctx, b, kind, row, cols, loop.index)):
                    _store(b, out, b.add(b.mul(loop.index, _long(128)), _long(64 * half)), weights)
            return ctx.get_dummy_value()

        return types.void(types.int64, types.int64, types.int64), build

    return widen_of_kind


def _make_gemm(panels: int) -> Any:
    @intrinsic
    def gemm_of_panels(context, w, row_step, k_step, count, x, x_step, y, y_step, adding):
        """y[p][r][:] (+)= sum over k < count of w[r * row_step + k * k_step] * x[p][k][:] for 8 rows r."""

        def build(ctx, b, _signature, arguments):
            w, row_step, k_step, count, x, x_step, y, y_step, adding = arguments
            sums = [[_zeros(b) for _ in range(panels)] for _ in range(ROWS)]
            cells = [
                (sums[r][p], b.add(b.mul(y_step, _long(p)), _long(64 * r))) for r in range(ROWS) for p in range(panels)
            ]
            with b.if_then(b.icmp_signed("!=", adding, _long(0))):
                for cell, at in cells:
                    b.store(_load(b, y, at, V16), cell)
            rows = [b.add(w, b.mul(row_step, _long(r))) for r in range(ROWS)]
            with cgutils.for_range(b, count, intp=I64) as loop:
                at = b.mul(loop.index, _long(64))
                tokens = [_load(b, x, b.add(b.mul(x_step, _long(p)), at), V16) for p in range(panels)]
                k = b.mul(loop.index, k_step)
                for r in range(ROWS):
                    weight = _splat(b, _load(b, rows[r], k, F32))
                    for p in range(panels):
                        b.store(_fma(b, weight, tokens[p], b.load(sums[r][p])), sums[r][p])
            for cell, at in cells:
                _store(b, y, at, b.load(cell))
            return ctx.get_dummy_value()

        return types.void(*[types.int64] * 9), build

    return gemm_of_panels


_dots: list[Callable[..., Any]] = [_make_dot(kind) for kind in Kind]
_dot_f32, _dot_f16, _dot_bf16, _dot_q8, _dot_q4 = _dots
_axpy_f32, _axpy_f16, _axpy_bf16, _axpy_q8, _axpy_q4 = (_make_axpy(kind) for kind in Kind)
_widen_f32, _widen_f16, _widen_bf16, _widen_q8, _widen_q4 = (_make_widen(kind) for kind in Kind)
_gemm_1, _gemm_2, _gemm_3 = (_make_gemm(panels) for panels in (1, 2, 3))


@kernel
def dot(kind: int, row: int, x: int, cols: int, ahead: int) -> Any:
    """Inner product of the packed row at `row` with float32 [cols] at `x`, while fetching the row at `ahead`."""
    if kind == _Q4:
        return _dot_q4(row, x, cols, ahead)
    if kind == _Q8:
        return _dot_q8(row, x, cols, ahead)
    if kind == _F16:
        return _dot_f16(row, x, cols, ahead)
    if kind == _BF16:
        return _dot_bf16(row, x, cols, ahead)
    return _dot_f32(row, x, cols, ahead)


@kernel
def axpy(kind: int, factor: Any, row: int, y: int, cols: int, ahead: int) -> None:
    """Add `factor` times the packed row at `row` to float32 [cols] at `y`, while fetching the row at `ahead`."""
    if kind == _Q4:
        _axpy_q4(factor, row, y, cols, ahead)
    elif kind == _Q8:
        _axpy_q8(factor, row, y, cols, ahead)
    elif kind == _F16:
        _axpy_f16(factor, row, y, cols, ahead)
    elif kind == _BF16:
        _axpy_bf16(factor, row, y, cols, ahead)
    else:
        _axpy_f32(factor, row, y, cols, ahead)


@kernel
def widen(kind: int, row: int, out: int, cols: int) -> None:
    """Write the packed row at `row` as float32 [cols] to `out`."""
    if kind == _Q4:
        _widen_q4(row, out, cols)
    elif kind == _Q8:
        _widen_q8(row, out, cols)
    elif kind == _F16:
        _widen_f16(row, out, cols)
    elif kind == _BF16:
        _widen_bf16(row, out, cols)
    else:
        _widen_f32(row, out, cols)


@kernel
def multiply(
    w: int, row_step: int, k_step: int, count: int, x: int, x_step: int, y: int, y_step: int, panels: int, adding: int
) -> None:
    """8 rows times `panels` panels: y[p][r][lane] (+)= sum_k w[r][k] * x[p][k][lane].

    w: float32, element (r, k) at w + r * row_step + k * k_step; x and y: panel p at + p * step; steps in bytes.
    """
    p = 0
    while p < panels:
        left = panels - p
        if left >= PANELS:
            _gemm_3(w, row_step, k_step, count, x + p * x_step, x_step, y + p * y_step, y_step, adding)
            p += 3
        elif left == 2:
            _gemm_2(w, row_step, k_step, count, x + p * x_step, x_step, y + p * y_step, y_step, adding)
            p += 2
        else:
            _gemm_1(w, row_step, k_step, count, x + p * x_step, x_step, y + p * y_step, y_step, adding)
            p += 1


@kernel
def row_stride(kind: int, cols: int) -> int:
    """Compiled `weights.row_bytes`."""
    if kind == _Q4:
        return cols // 2 + cols // 8
    if kind == _Q8:
        return cols + cols // 16
    if kind == _F32:
        return 4 * cols
    return 2 * cols


@kernel
def panels_of(tokens: int) -> int:
    """Panels that hold `tokens` tokens; a single token is a panel of one lane."""
    return (tokens + LANES - 1) // LANES


@kernel
def share(total: int, unit: int, member: int, members: int) -> tuple[int, int]:
    """Thread `member`'s range of `total` items, split evenly in multiples of `unit`."""
    units = (total + unit - 1) // unit
    return min(units * member // members * unit, total), min(units * (member + 1) // members * unit, total)
