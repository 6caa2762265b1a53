"""Compiled elementwise functions: the exponential on 16 lanes, softmax, activation functions."""

import math
from typing import Any, NamedTuple

import numpy as np
from numba import carray, types
from numba.core import cgutils
from numba.extending import intrinsic

from warmfront.shared.kernels import simd
from warmfront.shared.kernels.atomics import floats_at
from warmfront.shared.kernels.jit import apart, inlined, kernel
from warmfront.shared.kernels.simd import FLOAT, I32, I64, V16, call, constants, fma, load, long, splat, store, vector
from warmfront.shared.model.architecture import ACTIVATIONS, FeedForward
from warmfront.shared.model.panels import LANES

__all__ = [
    "Activation",
    "activate_times",
    "activation_of",
    "exponentials",
    "factor",
    "fires",
    "highest_of",
    "soft_cap",
    "softmax_rows",
    "up_fires",
]

_SILU, _RELU, _GELU, _GELU_TANH, _RELU2, _DRELU, _FATRELU, _SWIGLU_OAI = range(len(ACTIVATIONS))
# Of swiglu_oai, in its sigmoid.
_ALPHA = 1.702
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


@intrinsic
def _swiglu_oai_times(context, gates, ups, count, limit):
    """gates = gate / (1 + exp(-1.702 * gate)) * (up + 1), both cut to the limit; NaN stays."""

    def build(context, b, _signature, arguments):
        gates, ups, count, limit = arguments
        high, one = splat(b, limit), constants(1.0)
        low = b.fsub(constants(0.0), high)

        def cut(value: Any, condition: str, bound: Any) -> Any:
            return b.select(b.fcmp_ordered(condition, value, bound), bound, value)

        with cgutils.for_range(b, b.udiv(count, long(LANES)), intp=I64) as loop:
            at = b.mul(loop.index, long(64))
            gate = cut(load(b, gates, at, V16), ">", high)
            up = cut(cut(load(b, ups, at, V16), ">", high), "<", low)
            below = b.fadd(_exp(b, b.fmul(gate, constants(-_ALPHA))), one)
            store(b, gates, at, b.fmul(b.fdiv(gate, below), b.fadd(up, one)))
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64, types.float32), build


class Activation(NamedTuple):
    """The activation of a feed-forward layer, as kernels take it."""

    # Index into ACTIVATIONS.
    code: int
    # float32: gates up to this are closed.
    closed: Any
    # float32: what gates and ups are cut to, of swiglu_oai.
    limit: Any


def activation_of(feed_forward: FeedForward) -> Activation:
    """The activation of a model's layers."""
    return Activation(
        feed_forward.activation_code, np.float32(feed_forward.closed), np.float32(feed_forward.limit or 0)
    )


@inlined
def fires(activation: Activation, gate: Any) -> bool:
    """Whether a neuron with this gate may contribute.

    A gate that is NaN fires, so that every selector and prefill show it alike; `ffn.cu` says the same.
    """
    return not gate <= activation.closed


@inlined
def up_fires(activation: Activation, up: Any) -> bool:
    """Whether a neuron whose gate fires contributes with this up: with dReLU, only if that is above zero."""
    return activation.code != _DRELU or not up <= 0


@kernel
def _activate(activation: Activation, gate: Any) -> Any:
    """The activation function of one float."""
    code = activation.code
    if gate <= activation.closed:
        return np.float32(0)
    if code == _SILU:
        return gate / (np.float32(1) + np.float32(math.exp(-gate)))
    if code == _GELU:
        return np.float32(0.5) * gate * (np.float32(1) + np.float32(math.erf(gate * np.float32(0.7071067811865476))))
    if code == _GELU_TANH:
        inner = np.float32(0.7978845608028654) * (gate + np.float32(0.044715) * gate * gate * gate)
        return np.float32(0.5) * gate * (np.float32(1) + np.float32(math.tanh(inner)))
    return gate * gate if code == _RELU2 else gate


@kernel
def _swiglu_oai(limit: Any, gate: Any, up: Any) -> Any:
    """The factor of one neuron; a NaN stays."""
    if gate > limit:
        gate = limit
    if up > limit:
        up = limit
    if up < -limit:
        up = -limit
    return gate / (np.float32(1) + np.float32(math.exp(np.float32(-_ALPHA) * gate))) * (up + np.float32(1))


@kernel
def factor(activation: Activation, gate: Any, up: Any) -> Any:
    """What a neuron's down row is multiplied with: activation(gate) * up, or * relu(up), or * (up + 1)."""
    if activation.code == _SWIGLU_OAI:
        return _swiglu_oai(activation.limit, gate, up)
    return _activate(activation, gate) * (up if up_fires(activation, up) else np.float32(0))


@apart
def activate_times(activation: Activation, gates: int, ups: int, count: int) -> None:
    """gates = factors of `count` neurons, a multiple of 16, with these gates and ups."""
    if activation.code == _SILU:
        _silu_times(gates, ups, count)
        return
    if activation.code == _SWIGLU_OAI:
        _swiglu_oai_times(gates, ups, count, activation.limit)
        return
    gate, up = carray(floats_at(gates), (count,)), carray(floats_at(ups), (count,))
    for i in range(count):
        gate[i] = factor(activation, gate[i], up[i])
