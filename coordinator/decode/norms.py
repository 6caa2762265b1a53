"""Norms of the compiled pass: of the residual, of a block's output, of queries and keys, which are rotated here too."""

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from numba import carray

from warmfront.coordinator.decode.linear import add_bias
from warmfront.coordinator.decode.network import BIAS, DECODE, K_NORM, POSITION, Q_NORM, TOKENS, Network, State
from warmfront.shared.kernels.atomics import address_of, floats_at
from warmfront.shared.kernels.jit import apart, inlined, kernel
from warmfront.shared.model.architecture import NORMS
from warmfront.shared.model.panels import LANES
from warmfront.shared.wire.handoff import barrier

__all__ = ["Norm", "add_block", "last_norm", "layer_norm", "normalise", "normalise_heads", "rotate"]

Floats = npt.NDArray[np.float32]
_RMS, _LAYER = range(len(NORMS))


class Norm(NamedTuple):
    """One norm of a model."""

    # Index into `NORMS`.
    kind: int
    # Addresses of float32 vectors: the weight, 0 if there is no norm here, and the bias, 0 if it has none.
    weight_at: int
    bias_at: int
    # float32.
    epsilon: Any


@inlined
def layer_norm(net: Network, layer: int, role: int) -> Norm:
    """The norm of a layer in column `role` of the network's weights."""
    return Norm(net.norm_kind, net.weights[layer, role], net.weights[layer, role + BIAS], net.norm_eps)


@inlined
def last_norm(net: Network) -> Norm:
    """The norm before the head, if there is one."""
    return Norm(net.norm_kind, net.norm, net.norm_bias, net.norm_eps)


@kernel
def _add_up(values: Floats, mean: Any, squared: bool) -> Any:
    """The sum of value - mean, or of its square: sixteen sums, or each addition would wait for the last."""
    sums, total = np.zeros(LANES, np.float32), np.float32(0)
    whole = len(values) // LANES * LANES
    for first in range(0, whole, LANES):
        for lane in range(LANES):
            value = values[first + lane] - mean
            sums[lane] += value * value if squared else value
    for k in range(whole, len(values)):
        value = values[k] - mean
        sums[k - whole] += value * value if squared else value
    for lane in range(LANES):
        total += sums[lane]
    return total


@apart
def normalise(norm: Norm, size: int, x: Floats, out: Floats, panels: int, lanes: int) -> None:
    """Norm of every token of x [panels, size, lanes] into `out`, which may be x; without a norm, a copy."""
    if norm.weight_at == 0:
        for i in range(panels * size * lanes):
            out[i] = x[i]
        return
    weight = carray(floats_at(norm.weight_at), (size,))
    if lanes == 1:
        for token in range(panels):
            own, result = x[token * size : (token + 1) * size], out[token * size : (token + 1) * size]
            mean = np.float32(0)
            if norm.kind == _LAYER:
                mean = _add_up(own, np.float32(0), False) / np.float32(size)
            factor = np.float32(1) / np.sqrt(_add_up(own, mean, True) / np.float32(size) + norm.epsilon)
            for k in range(size):
                result[k] = (own[k] - mean) * factor * weight[k]
    else:
        # Tokens are lanes: sixteen sums at a time, each in the order of the features.
        means, factors = np.empty(LANES, np.float32), np.empty(LANES, np.float32)
        for p in range(panels):
            panel = x[p * size * LANES : (p + 1) * size * LANES]
            result = out[p * size * LANES : (p + 1) * size * LANES]
            means[:], factors[:] = 0, 0
            if norm.kind == _LAYER:
                for k in range(size):
                    for lane in range(LANES):
                        means[lane] += panel[k * LANES + lane]
                for lane in range(LANES):
                    means[lane] /= np.float32(size)
            for k in range(size):
                for lane in range(LANES):
                    value = panel[k * LANES + lane] - means[lane]
                    factors[lane] += value * value
            for lane in range(LANES):
                factors[lane] = np.float32(1) / np.sqrt(factors[lane] / np.float32(size) + norm.epsilon)
            for k in range(size):
                for lane in range(LANES):
                    value = panel[k * LANES + lane] - means[lane]
                    result[k * LANES + lane] = value * factors[lane] * weight[k]
    add_bias(norm.bias_at, 0, size, address_of(out), size, panels, lanes)


@apart
def add_block(net: Network, norm: Norm, values: Floats, h: Floats, x: Floats, panels: int, lanes: int) -> None:
    """Add a block's output to the residual x, normed and scaled as the model has it; `h` gets what is normed."""
    part = values
    if norm.weight_at != 0 and not net.norms_sum:
        normalise(norm, net.hidden, values, h, panels, lanes)
        part = h
    for i in range(panels * net.hidden * lanes):
        x[i] += part[i] * net.residual_scale
    if net.norms_sum:
        normalise(norm, net.hidden, x, x, panels, lanes)


@inlined
def rotate(net: Network, st: State, layer: int, first: int, low: int, high: int, lanes: int) -> None:
    """RoPE on rows low..high of q or k, which begin at row `first` of the joint q, k, v vector."""
    pairs, table = net.pairs[layer], net.table[layer]
    if pairs == 0:
        return
    cosines, sines = net.rotary[table, 0], net.rotary[table, 1]
    rows, tokens = (net.heads + 2 * net.kv_heads) * net.head_dim, st.job[TOKENS]
    for panel in range((tokens + lanes - 1) // lanes):
        position = st.positions[panel] if lanes == 1 else st.job[POSITION] + panel * lanes
        count = min(lanes, tokens - panel * lanes)
        pair = (low - first) % net.head_dim // 2
        for row in range(low, high, 2):
            # No views: counting their references would take longer than the arithmetic.
            even = (panel * rows + row) * lanes
            odd = even + lanes
            if pair < pairs:
                for lane in range(count):
                    cos, sin = cosines[position + lane, pair], sines[position + lane, pair]
                    a, b = st.qkv[even + lane], st.qkv[odd + lane]
                    st.qkv[even + lane], st.qkv[odd + lane] = a * cos - b * sin, b * cos + a * sin
            pair += 1
            if 2 * pair == net.head_dim:
                pair = 0


@kernel
def normalise_heads(net: Network, st: State, layer: int, rank: int) -> int:
    """Norm the queries and keys of a layer and rotate them: this thread's vectors, which are heads or all heads.

    Returns DONE or ABORTED.
    """
    lanes = 1 if st.job[DECODE] != 0 else LANES
    panels = (st.job[TOKENS] + lanes - 1) // lanes
    rows = (net.heads + 2 * net.kv_heads) * net.head_dim
    widths = (net.heads * net.head_dim, net.kv_heads * net.head_dim)
    first, task = 0, 0
    for part in range(2):
        width = widths[part]
        size = width if net.whole_qk_norm else net.head_dim
        norm = Norm(_RMS, net.weights[layer, K_NORM if part else Q_NORM], 0, net.norm_eps)
        for low in range(first, first + width, size):
            if task % st.threads == rank:
                for p in range(panels):
                    at = (p * rows + low) * lanes
                    values = st.qkv[at : at + size * lanes]
                    normalise(norm, size, values, values, 1, lanes)
                rotate(net, st, layer, first, low, low + size, lanes)
            task += 1
        first += width
    return barrier(st.barrier)
