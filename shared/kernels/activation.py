"""Compiled elementwise functions: the exponential on 16 lanes, softmax, activation functions."""

import math
from typing import Any

import numpy as np
from numba import carray, types
from numba.core import cgutils
from numba.extending import intrinsic

from warmfront.shared.kernels import simd
from warmfront.shared.kernels.atomics import floats_at
from warmfront.shared.kernels.jit import inlined, kernel
from warmfront.shared.kernels.simd import FLOAT, I32, I64, V16, call, constants, fma, load, long, splat, store, vector
from warmfront.shared.model.architecture import ACTIVATIONS
from warmfront.shared.model.panels import LANES

__all__ = ["activate", "activate_times", "exponentials", "fires", "highest_of", "soft_cap", "softmax_rows"]

_SILU, _RELU, _GELU, _GELU_TANH = range(len(ACTIVATIONS))
# exp(r) on |r| <= ln(2)/2, the coefficients of Cephes' expf: relative error below 2e-7.
_SERIES = (1.9875691500e-4, 1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1)


def _exp(b: Any, x: Any) -> Any:
    """exp of 16 floats; below -87 it is the smallest normal number, which is as good as zero here. NaN stays NaN."""
    given, x = x, call(b, "llvm.minnum.v16f32", V16, x, constants(88.0))
    x = call(b, "llvm.maxnum.v16f32", V16, x, constants(-87.0))
    # exp(x) = 2^n * exp(r). ln(2) is subtracted in two parts, n times the first of which is exact: r keeps its bits.
    n = call(b, "llvm.rint.v16f32", V16, b.fmul(x, constants(1 / math.log(2))))
    r = fma(b, n, constants(-0.693359375), x)
    r = fma(b, n, constants(2.12194440e-4), r)
    series = constants(_SERIES[0])
    for coefficient in _SERIES[1:]:
        series = fma(b, series, r, constants(coefficient))
    result = b.fadd(fma(b, series, b.fmul(r, r), r), constants(1.0))
    # Times 2^n: n added to the exponent. The bounds above keep it normal.
    power = b.shl(b.fptosi(n, vector(I32)), constants(23, vector(I32)))
    result = b.bitcast(b.add(b.bitcast(result, vector(I32)), power), V16)
    # minnum takes NaN for a missing number: a score that is NaN would otherwise come out as exp(88).
    return b.select(b.fcmp_unordered("uno", given, given), given, result)


@intrinsic
def exponentials(context, values, count, highest):
    """Replace `count` floats (a multiple of 16) by exp(value - highest); returns their sum.

    The highest becomes 1, so no sum overflows, whatever the scores are.
    """

    def build(context, b, _signature, arguments):
        values, count, highest = arguments
        sums, top = simd.zeros(b), splat(b, highest)
        with cgutils.for_range(b, b.udiv(count, long(LANES)), intp=I64) as loop:
            at = b.mul(loop.index, long(64))
            result = _exp(b, b.fsub(load(b, values, at, V16), top))
            store(b, values, at, result)
            b.store(b.fadd(b.load(sums), result), sums)
        return simd.total(b, b.load(sums))

    return types.float32(types.int64, types.int64, types.float32), build


@intrinsic
def highest_of(context, values, count):
    """The highest of `count` floats, a multiple of 16."""

    def build(context, b, _signature, arguments):
        values, count = arguments
        highest = cgutils.alloca_once_value(b, constants(-3e38))
        with cgutils.for_range(b, b.udiv(count, long(LANES)), intp=I64) as loop:
            row = load(b, values, b.mul(loop.index, long(64)), V16)
            b.store(call(b, "llvm.maxnum.v16f32", V16, row, b.load(highest)), highest)
        return call(b, "llvm.vector.reduce.fmax.v16f32", FLOAT, b.load(highest))

    return types.float32(types.int64, types.int64), build


@intrinsic
def softmax_rows(context, scores, count, state):
    """A softmax whose scores come in parts, each lane its own: this part's `count` rows of 16 become exp(score - top).

    `state`: float32 [3, 16]: the top, which is the highest score so far (before the first part -3e38), the sum of the
    exponentials so far, and, written, by what all earlier exponentials shrink because the top has risen.
    """

    def build(context, b, _signature, arguments):
        scores, count, state = arguments
        before, sum_at, factor_at = load(b, state, long(0), V16), long(64), long(128)
        highest = cgutils.alloca_once_value(b, before)
        with cgutils.for_range(b, count, intp=I64) as loop:
            row = load(b, scores, b.mul(loop.index, long(64)), V16)
            b.store(call(b, "llvm.maxnum.v16f32", V16, row, b.load(highest)), highest)
        factor = _exp(b, b.fsub(before, b.load(highest)))
        added = cgutils.alloca_once_value(b, b.fmul(factor, load(b, state, sum_at, V16)))
        with cgutils.for_range(b, count, intp=I64) as loop:
            at = b.mul(loop.index, long(64))
            result = _exp(b, b.fsub(load(b, scores, at, V16), b.load(highest)))
            store(b, scores, at, result)
            b.store(b.fadd(b.load(added), result), added)
        for at, values in ((long(0), b.load(highest)), (sum_at, b.load(added)), (factor_at, factor)):
            store(b, state, at, values)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64), build


@intrinsic
def soft_cap(context, values, count, cap):
    """Replace `count` floats (a multiple of 16) by cap * tanh(value / cap)."""

    def build(context, b, _signature, arguments):
        values, count, cap = arguments
        high, one = splat(b, cap), constants(1.0)
        twice = b.fdiv(constants(2.0), high)
        with cgutils.for_range(b, b.udiv(count, long(LANES)), intp=I64) as loop:
            at = b.mul(loop.index, long(64))
            # tanh(x) = 1 - 2 / (exp(2 x) + 1). Near 0 that is off by 1e-7: of a cap of 50, as good as the scores are.
            below = b.fadd(_exp(b, b.fmul(load(b, values, at, V16), twice)), one)
            store(b, values, at, b.fmul(high, b.fsub(one, b.fdiv(constants(2.0), below))))
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.float32), build


@intrinsic
def _silu_times(context, gates, ups, count):
    def build(context, b, _signature, arguments):
        gates, ups, count = arguments
        with cgutils.for_range(b, b.udiv(count, long(LANES)), intp=I64) as loop:
            at = b.mul(loop.index, long(64))
            gate = load(b, gates, at, V16)
            # gate / (1 + exp(-gate)): where exp stops growing, at exp(88), the quotient is as good as 0.
            below = b.fadd(_exp(b, b.fsub(constants(0.0), gate)), constants(1.0))
            store(b, gates, at, b.fmul(b.fdiv(gate, below), load(b, ups, at, V16)))
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64), build


@inlined
def fires(gate: Any) -> bool:
    """Whether a neuron with this gate may contribute: where the activation is exactly 0 for all gates that are not > 0.

    A gate that is NaN fires, so that every selector and prefill show it alike; `ffn.cu` says the same.
    """
    return not gate <= 0


@kernel
def activate(code: int, value: Any) -> Any:
    """The activation function ACTIVATIONS[code] of one float."""
    if code == _RELU:
        return np.float32(0) if value <= 0 else value  # NaN passes
    if code == _SILU:
        return value / (np.float32(1) + np.float32(math.exp(-value)))
    if code == _GELU:
        return np.float32(0.5) * value * (np.float32(1) + np.float32(math.erf(value * np.float32(0.7071067811865476))))
    inner = np.float32(0.7978845608028654) * (value + np.float32(0.044715) * value * value * value)
    return np.float32(0.5) * value * (np.float32(1) + np.float32(math.tanh(inner)))


@kernel
def activate_times(code: int, gates: int, ups: int, count: int) -> None:
    """gates = activation(gates) * ups, for `count` floats each, a multiple of 16."""
    if code == _SILU:
        _silu_times(gates, ups, count)
        return
    gate, up = carray(floats_at(gates), (count,)), carray(floats_at(ups), (count,))
    for i in range(count):
        gate[i] = activate(code, gate[i]) * up[i]
