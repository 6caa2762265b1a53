"""Compiled arithmetic on packed rows (layouts: `weights.py`): dot, axpy and widen for every weight type.

Rows are fetched ahead by the caller's hint. Where the CPU multiplies bytes (AVX-512 VNNI), dots with 8- and 4-bit
rows take the input quantised to 15 bits by blocks of 32 (`quantise`), in two bytes: less than half the instructions of
floats, and the same tokens (8 bits change one greedy token in twenty, docs/log.md). Elsewhere they take it as it is.
"""

from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from warmfront.shared.kernels import simd
from warmfront.shared.kernels.fp16 import has, widened
from warmfront.shared.kernels.jit import kernel
from warmfront.shared.kernels.simd import (
    FLOAT,
    I8,
    I16,
    I32,
    I64,
    LANES,
    V16,
    call,
    fma,
    load,
    long,
    splat,
    store,
    vector,
)
from warmfront.shared.model.formats import BLOCK, Kind

__all__ = [
    "AHEAD_BYTES",
    "axpy",
    "byte_dot",
    "dot",
    "multiplies_bytes",
    "quantise",
    "quantised_bytes",
    "row_stride",
    "settle",
    "share",
    "touch",
    "widen",
]

# How far ahead rows are fetched: the hardware starts anew at every page, and a kernel that unpacks 4 bits keeps too
# few lines in flight by itself (docs/log.md).
AHEAD_BYTES = 5120
V64 = vector(I8, 64)
# The largest feature of a block: 127 * 128.
_STEPS = 16256.0
_F32, _F16, _BF16, _Q8, _Q4, _Q4S, _Q4C = (int(kind) for kind in Kind)


def multiplies_bytes(context: Any) -> bool:
    """Whether code for this CPU takes inputs quantised."""
    return has(context, "avx512vnni", "avx512bw")


def _float_dot(context: Any, b: Any, kind: int, row: Any, x: Any, cols: Any, ahead: Any) -> Any:
    sums = (simd.zeros(b), simd.zeros(b))
    with cgutils.for_range(b, b.udiv(cols, long(BLOCK)), intp=I64) as loop:
        simd.prefetch(b, kind, ahead, loop.index)
        for half, weights in enumerate(simd.weights_of(context, b, kind, row, cols, loop.index)):
            at = b.add(b.mul(loop.index, long(128)), long(64 * half))
            b.store(fma(b, weights, load(b, x, at, V16), b.load(sums[half])), sums[half])
    return simd.total(b, b.fadd(b.load(sums[0]), b.load(sums[1])))


def _byte_dot(context: Any, b: Any, kind: int, row: Any, q: Any, cols: Any, ahead: Any) -> Any:
    blocks = b.udiv(cols, long(BLOCK))
    scales_at = b.add(row, cols if kind == _Q8 else b.udiv(cols, long(2)))

    def weights(pair: Any) -> Any:
        simd.prefetch(b, kind, ahead, b.mul(pair, long(2)), 2)
        return _unsigned_pair(b, kind, row, pair)

    def scales(at: Any) -> Any:
        return widened(context, b, load(b, scales_at, at, vector(I16)))

    def minima(at: Any) -> Any:
        return widened(context, b, load(b, scales_at, b.add(at, b.mul(blocks, long(2))), vector(I16)))

    return byte_dot(b, q, cols, weights, scales, {_Q8: 128, _Q4S: 8}.get(kind, minima))


def byte_dot(
    b: Any,
    q: Any,
    cols: Any,
    weights: Callable[[Any], Any],
    scales: Callable[[Any], Any],
    zero: float | Callable[[Any], Any],
) -> Any:
    """The dot of unsigned byte weights with a quantised input, in code that multiplies bytes.

    `weights(i)`: 64 numbers, blocks 2i and 2i + 1 in the order of `quantise`; `scales(offset)`: the scales of 16
    blocks at a byte offset into the float16 scales; `zero`: the number that stands for weight 0, or what gives the
    blocks' minima in the same way. Two blocks at a time: bytes times bytes in one instruction, then one multiply-add by
    the scales, into two sums in turn, since one would wait for itself; what a number's zero adds, the block sums take
    back. Four blocks are read where fewer are left; what follows a row is multiplied by 0.

    What lies behind the last block of either side is never used, only replaced by 0: the input's buffer serves vectors
    of several lengths, so its padding may hold bytes of a longer one that read as NaN, and 0 * NaN is NaN.
    """
    blocks = b.udiv(cols, long(BLOCK))
    scales_at, sums_at = _quantised_parts(b, q, cols)
    sums, offsets = (simd.zeros(b), simd.zeros(b)), simd.zeros(b)
    lanes, nothing = ir.Constant(vector(I64), list(range(LANES))), ir.Constant(V16, [0.0] * LANES)
    with cgutils.for_range(b, b.udiv(b.add(blocks, long(15)), long(16)), intp=I64) as chunk:
        first = b.mul(chunk.index, long(16))
        left = b.sub(blocks, first)
        valid = b.icmp_signed("<", lanes, splat(b, left))
        floats_at, halves_at = b.mul(first, long(4)), b.mul(first, long(2))
        scale = b.select(valid, scales(halves_at), nothing)
        factors = b.fmul(scale, b.select(valid, load(b, scales_at, floats_at, V16), nothing))
        if callable(zero):
            offset = b.select(valid, zero(halves_at), nothing)
        else:
            offset = b.fmul(scale, ir.Constant(V16, [-float(zero)] * LANES))
        block_sums = b.select(valid, load(b, sums_at, floats_at, V16), nothing)
        b.store(fma(b, offset, block_sums, b.load(offsets)), offsets)
        rounds = b.udiv(b.add(left, long(3)), long(4))
        rounds = b.select(b.icmp_signed("<", rounds, long(4)), rounds, long(4))
        with cgutils.for_range(b, rounds, intp=I64) as loop:
            for turn, total in enumerate(sums):
                pair = b.add(b.mul(loop.index, long(2)), long(turn))
                at = b.add(b.mul(chunk.index, long(8)), pair)
                numbers = weights(at)
                products = ir.Constant(vector(I32), [0] * LANES)
                for start in (long(0), _padded(b, cols)):
                    part = load(b, q, b.add(start, b.mul(at, long(64))), V64)
                    products = b.shl(products, ir.Constant(vector(I32), [7] * LANES))
                    products = call(b, "llvm.x86.avx512.vpdpbusd.512", vector(I32), products, numbers, part)
                lane = splat(b, b.trunc(b.mul(pair, long(2)), I32))
                which = b.add(ir.Constant(vector(I32), ([0] * 4 + [1] * 4) * 2), lane)
                factor = call(b, "llvm.x86.avx512.permvar.sf.512", V16, factors, which)
                b.store(fma(b, b.sitofp(products, V16), factor, b.load(total)), total)
    return simd.total(b, b.fadd(b.fadd(*(b.load(total) for total in sums)), b.load(offsets)))


def _unsigned_pair(b: Any, kind: int, row: Any, pair: Any) -> Any:
    """64 weights as bytes, in the order that `quantise` gives the input."""
    if kind == _Q8:
        both = load(b, row, b.mul(pair, long(64)), V64)
        order = [*range(16), *range(32, 48), *range(16, 32), *range(48, 64)]
        swapped = b.shuffle_vector(both, both, ir.Constant(vector(I32, 64), order))
        return b.xor(swapped, ir.Constant(V64, [128] * 64))
    half = vector(I8, 32)
    nibbles = load(b, row, b.mul(pair, long(32)), half)
    low, high = b.and_(nibbles, ir.Constant(half, [15] * 32)), b.lshr(nibbles, ir.Constant(half, [4] * 32))
    return b.shuffle_vector(low, high, ir.Constant(vector(I32, 64), list(range(64))))


def quantised_bytes(cols: int) -> int:
    """Bytes of a quantised input: 15 bits a feature, x = (128 * high + low) * scale.

    int8 high parts and int8 low parts [cols padded to 64] each, of each two blocks the first halves, then the second
    halves; float32 scales and float32 block sums [blocks padded to 16] each. Padding is never written nor used.
    """
    return 2 * 64 * -(-cols // 64) + 2 * 64 * -(-cols // (16 * BLOCK))


def _padded(b: Any, cols: Any) -> Any:
    return b.mul(b.udiv(b.add(cols, long(63)), long(64)), long(64))


def _quantised_parts(b: Any, q: Any, cols: Any) -> tuple[Any, Any]:
    """Addresses of the scales and of the block sums of a quantised input."""
    floats = b.mul(b.udiv(b.add(cols, long(16 * BLOCK - 1)), long(16 * BLOCK)), long(64))
    scales_at = b.add(q, b.mul(_padded(b, cols), long(2)))
    return scales_at, b.add(scales_at, floats)


def _quantise_block(b: Any, x: Any, out: Any, cols: Any, block: Any, scales_at: Any, sums_at: Any) -> None:
    at = b.mul(block, long(128))
    halves = [load(b, x, b.add(at, long(64 * half)), V16) for half in (0, 1)]
    most = call(b, "llvm.maxnum.v16f32", V16, *(call(b, "llvm.fabs.v16f32", V16, half) for half in halves))
    top = call(b, "llvm.vector.reduce.fmax.v16f32", FLOAT, most)
    # maxnum passes over NaN, and no integer stands for it: the scale has to.
    missing = b.bitcast(b.fcmp_unordered("uno", *halves), I16)
    top = b.select(b.icmp_unsigned("!=", missing, ir.Constant(I16, 0)), ir.Constant(FLOAT, float("nan")), top)
    some = b.fcmp_ordered(">", top, ir.Constant(FLOAT, 0.0))
    inverse = b.select(some, b.fdiv(ir.Constant(FLOAT, _STEPS), top), ir.Constant(FLOAT, 0.0))
    scale = b.fdiv(top, ir.Constant(FLOAT, _STEPS))
    place = b.add(b.mul(b.udiv(block, long(2)), long(64)), b.mul(b.urem(block, long(2)), long(16)))
    whole = []
    for half, values in enumerate(halves):
        rounded = call(b, "llvm.rint.v16f32", V16, b.fmul(values, splat(b, inverse)))
        whole.append(b.fptosi(rounded, vector(I32)))
        seven = ir.Constant(vector(I32), [7] * LANES)
        high = b.ashr(b.add(whole[half], ir.Constant(vector(I32), [64] * LANES)), seven)
        low = b.sub(whole[half], b.shl(high, seven))
        at = b.add(place, long(32 * half))
        store(b, out, at, b.trunc(high, vector(I8)))
        store(b, out, b.add(at, _padded(b, cols)), b.trunc(low, vector(I8)))
    summed = call(b, "llvm.vector.reduce.add.v16i32", I32, b.add(*whole))
    store(b, scales_at, b.mul(block, long(4)), scale)
    store(b, sums_at, b.mul(block, long(4)), b.fmul(b.sitofp(summed, FLOAT), scale))


@intrinsic
def _quantise(context, x, out, cols):
    def build(context, b, _signature, arguments):
        x, out, cols = arguments
        if not multiplies_bytes(context):
            return x
        scales_at, sums_at = _quantised_parts(b, out, cols)
        with cgutils.for_range(b, b.udiv(cols, long(BLOCK)), intp=I64) as loop:
            _quantise_block(b, x, out, cols, loop.index, scales_at, sums_at)
        return out

    return types.int64(types.int64, types.int64, types.int64), build


@kernel
def quantise(x: int, out: int, cols: int) -> Any:
    """Prepare float32 [cols] at `x` for `dot`, in `out` [quantised_bytes(cols)].

    Returns the address to give to `dot`: `x` itself where the machine does not multiply bytes.
    """
    return _quantise(x, out, cols)


def _make_dot(kind: int) -> Any:
    @intrinsic
    def dot_of_kind(context, row, x, cols, ahead):
        def build(context, b, _signature, arguments):
            make = _byte_dot if kind in (_Q8, _Q4, _Q4S) and multiplies_bytes(context) else _float_dot
            return make(context, b, kind, *arguments)

        return types.float32(types.int64, types.int64, types.int64, types.int64), build

    return dot_of_kind


def _make_axpy(kind: int) -> Any:
    @intrinsic
    def axpy_of_kind(context, factor, row, y, cols, ahead):
        def build(context, b, _signature, arguments):
            factor, row, y, cols, ahead = arguments
            factors = splat(b, factor)
            with cgutils.for_range(b, b.udiv(cols, long(BLOCK)), intp=I64) as loop:
                simd.prefetch(b, kind, ahead, loop.index)
                for half, weights in enumerate(simd.weights_of(context, b, kind, row, cols, loop.index)):
                    at = b.add(b.mul(loop.index, long(128)), long(64 * half))
                    store(b, y, at, fma(b, weights, factors, load(b, y, at, V16)))
            return context.get_dummy_value()

        return types.void(types.float32, types.int64, types.int64, types.int64, types.int64), build

    return axpy_of_kind


def _make_widen(kind: int) -> Any:
    @intrinsic
    def widen_of_kind(context, row, out, cols):
        def build(context, b, _signature, arguments):
            row, out, cols = arguments
            with cgutils.for_range(b, b.udiv(cols, long(BLOCK)), intp=I64) as loop:
                for half, weights in enumerate(simd.weights_of(context, b, kind, row, cols, loop.index)):
                    store(b, out, b.add(b.mul(loop.index, long(128)), long(64 * half)), weights)
            return context.get_dummy_value()

        return types.void(types.int64, types.int64, types.int64), build

    return widen_of_kind


_ROWS = [kind for kind in Kind if kind != Kind.Q4C]
_dot_f32, _dot_f16, _dot_bf16, _dot_q8, _dot_q4, _dot_q4s = (_make_dot(kind) for kind in _ROWS)
_axpy_f32, _axpy_f16, _axpy_bf16, _axpy_q8, _axpy_q4, _axpy_q4s, _axpy_q4c = (_make_axpy(kind) for kind in Kind)
_widen_f32, _widen_f16, _widen_bf16, _widen_q8, _widen_q4, _widen_q4s = (_make_widen(kind) for kind in _ROWS)


@kernel
def dot(kind: int, row: int, x: int, q: int, cols: int, ahead: int) -> Any:
    """Inner product of the packed row at `row` with float32 [cols] at `x`, while fetching the row at `ahead`.

    `q`: what `quantise` returned for x; only quantised rows use it.
    """
    if kind == _Q4:
        return _dot_q4(row, q, cols, ahead)
    if kind == _Q4S:
        return _dot_q4s(row, q, cols, ahead)
    if kind == _Q8:
        return _dot_q8(row, q, cols, ahead)
    if kind == _F16:
        return _dot_f16(row, x, cols, ahead)
    if kind == _BF16:
        return _dot_bf16(row, x, cols, ahead)
    return _dot_f32(row, x, cols, ahead)


@kernel
def axpy(kind: int, factor: Any, row: int, y: int, cols: int, ahead: int) -> None:
    """Add `factor` times the packed row at `row` to float32 [cols] at `y`, while fetching the row at `ahead`.

    A row of Q4C adds its bare numbers: see `settle`.
    """
    if kind == _Q4C:
        _axpy_q4c(factor, row, y, cols, ahead)
    elif kind == _Q4:
        _axpy_q4(factor, row, y, cols, ahead)
    elif kind == _Q4S:
        _axpy_q4s(factor, row, y, cols, ahead)
    elif kind == _Q8:
        _axpy_q8(factor, row, y, cols, ahead)
    elif kind == _F16:
        _axpy_f16(factor, row, y, cols, ahead)
    elif kind == _BF16:
        _axpy_bf16(factor, row, y, cols, ahead)
    else:
        _axpy_f32(factor, row, y, cols, ahead)


@intrinsic
def settle(context, tail, numbers, factors, y, cols):
    """Q4C: after a group's axpys into `numbers`, y += scale * numbers + minimum * sum of factors; zeroes numbers."""

    def build(context, b, _signature, arguments):
        tail, numbers, factors, y, cols = arguments
        every = splat(b, factors)
        with cgutils.for_range(b, b.udiv(cols, long(LANES)), intp=I64) as loop:
            at = b.mul(loop.index, long(64))
            scale, minimum = simd.column_scales(context, b, tail, cols, b.mul(loop.index, long(32)))
            result = fma(b, scale, load(b, numbers, at, V16), load(b, y, at, V16))
            store(b, y, at, fma(b, minimum, every, result))
            store(b, numbers, at, ir.Constant(V16, [0.0] * LANES))
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.float32, types.int64, types.int64), build


@kernel
def widen(kind: int, row: int, out: int, cols: int) -> None:
    """Write the packed row at `row` as float32 [cols] to `out`."""
    if kind == _Q4:
        _widen_q4(row, out, cols)
    elif kind == _Q4S:
        _widen_q4s(row, out, cols)
    elif kind == _Q8:
        _widen_q8(row, out, cols)
    elif kind == _F16:
        _widen_f16(row, out, cols)
    elif kind == _BF16:
        _widen_bf16(row, out, cols)
    else:
        _widen_f32(row, out, cols)


@intrinsic
def touch(context, at, size, step):
    """Fetch a line of every `step` bytes of `size` at `at`.

    All lines (64), if they are needed soon; a line of every KB translates the addresses and starts the machine's
    own fetching.
    """

    def build(context, b, _signature, arguments):
        at, size, step = arguments
        steps = b.udiv(b.add(size, b.sub(step, long(1))), step)
        with cgutils.for_range(b, steps, intp=I64) as loop:
            simd.prefetch_line(b, b.add(at, b.mul(loop.index, step)))
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64), build


@kernel
def row_stride(kind: int, cols: int) -> int:
    """Compiled `weights.row_bytes`."""
    if kind == _Q4:
        return cols // 2 + cols // 8
    if kind == _Q4S:
        return cols // 2 + cols // 16
    if kind == _Q8:
        return cols + cols // 16
    if kind == _F32:
        return 4 * cols
    return 2 * cols


@kernel
def share(total: int, unit: int, member: int, members: int) -> tuple[int, int]:
    """Thread `member`'s range of `total` items, split evenly in multiples of `unit`."""
    units = (total + unit - 1) // unit
    return min(units * member // members * unit, total), min(units * (member + 1) // members * unit, total)
