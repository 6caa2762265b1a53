"""Positions, KV cache and causal attention of the compiled pass.

One token: 16 dots with cached keys at a time, for all query heads that share them, then a sum of the cached values; the
positions are split into chunks where the key-value heads do not divide evenly over the threads. Several tokens: matrix
products, with 16 tokens in the lanes and the query heads that share a key-value head as panels.
Cache rows are packed rows of float16 (float32 for float32 models), one per layer, head and position.
"""

import numpy as np
import numpy.typing as npt
from numba import carray

from warmfront.coordinator.decode.network import POSITION, SPOILED, TOKENS, Network, State
from warmfront.coordinator.decode.row_split import portion
from warmfront.shared.kernels.activation import exponentials, highest_of, softmax_panel
from warmfront.shared.kernels.atomics import address_of, floats_at, shorts_at
from warmfront.shared.kernels.fp16 import to_half
from warmfront.shared.kernels.gemm import (
    ADD,
    Gathered,
    Panels,
    Rows,
    gather_columns,
    in_pairs,
    multiply_columns,
    multiply_rows,
    pack_panels,
)
from warmfront.shared.kernels.jit import inlined, kernel
from warmfront.shared.kernels.multi_rows import ROWS, add_rows, dot_rows
from warmfront.shared.kernels.rows import prefetch, share
from warmfront.shared.model.formats import Kind
from warmfront.shared.model.panels import LANES

__all__ = ["attend_one", "attend_panels", "cache", "join", "rotate"]

# Positions whose values are widened at a time: with 128 columns of float32 32 KB, which stay in the cache.
_ROWS = 64
_F16 = int(Kind.F16)
# Exponent bits of a float16, all ones in infinities and NaN.
_F16_EXPONENT = 0x7C00
Floats = npt.NDArray[np.float32]


@kernel
def _cache_row(kv_heads: int, context: int, stride: int, layer: int, head: int, position: int) -> int:
    """Byte offset of one head's row in the key and in the value cache, of `stride` bytes a row."""
    return ((layer * kv_heads + head) * context + position) * stride


@inlined
def rotate(net: Network, st: State, first: int, low: int, high: int, lanes: int) -> None:
    """RoPE on rows low..high of q or k, which begin at row `first` of the joint q, k, v vector."""
    rows, tokens = (net.heads + 2 * net.kv_heads) * net.head_dim, st.job[TOKENS]
    for panel in range((tokens + lanes - 1) // lanes):
        position = st.job[POSITION] + panel * lanes
        count = min(lanes, tokens - panel * lanes)
        pair = (low - first) % net.head_dim // 2
        for row in range(low, high, 2):
            at = (panel * rows + row) * lanes
            even, odd = st.qkv[at : at + lanes], st.qkv[at + lanes : at + 2 * lanes]
            for lane in range(count):
                cos, sin = net.cos[position + lane, pair], net.sin[position + lane, pair]
                a, b = even[lane], odd[lane]
                even[lane], odd[lane] = a * cos - b * sin, b * cos + a * sin
            pair += 1
            if 2 * pair == net.head_dim:
                pair = 0


@kernel
def cache(net: Network, st: State, cache_at: int, layer: int, first: int, low: int, high: int, lanes: int) -> None:
    """Write rows low..high of k or v, which begin at row `first` of the joint q, k, v vector, into the cache.

    Notes in the job if one is not finite: it would reach texts that later share the place (`KvCache.forget`).
    """
    rows, tokens = (net.heads + 2 * net.kv_heads) * net.head_dim, st.job[TOKENS]
    size = 2 if st.cache_kind == _F16 else 4
    step = (net.head_dim + 31) // 32 * 32 * size
    spoiled = False
    for panel in range((tokens + lanes - 1) // lanes):
        position = st.job[POSITION] + panel * lanes
        count = min(lanes, tokens - panel * lanes)
        head, column = (low - first) // net.head_dim, (low - first) % net.head_dim
        at = cache_at + _cache_row(net.kv_heads, st.context, step, layer, head, position)
        for row in range(low, high):
            source = st.qkv[(panel * rows + row) * lanes : (panel * rows + row + 1) * lanes]
            for lane in range(count):
                place = at + lane * step + column * size
                if size == 2:
                    bits = to_half(source[lane])
                    carray(shorts_at(place), (1,))[0] = bits
                    spoiled |= bits & _F16_EXPONENT == _F16_EXPONENT
                else:
                    carray(floats_at(place), (1,))[0] = source[lane]
                    spoiled |= not np.isfinite(source[lane])
            column += 1
            if column == net.head_dim:
                column = 0
                head += 1
                at = cache_at + _cache_row(net.kv_heads, st.context, step, layer, head, position)
    if spoiled:
        st.job[SPOILED] = 1


@inlined
def attend_one(net: Network, st: State, layer: int, rank: int) -> None:
    """Causal attention of one token: this thread's (key-value head, chunk of the positions) pairs.

    It leaves each query head's mix of the chunk's values, its highest score and its sum of exponentials for `join`.
    """
    head_dim, group = net.head_dim, net.heads // net.kv_heads
    padded = (head_dim + 31) // 32 * 32
    stride = padded * (2 if st.cache_kind == _F16 else 4)
    queries, mixed = np.zeros((group, padded), np.float32), np.empty((group, padded), np.float32)
    scores_at, scores = address_of(st.scores[rank]), st.scores[rank]
    low, high = portion(st.cuts, net.kv_heads * st.chunks, 1, rank)
    for task in range(low, high):
        kv_head, chunk = task // st.chunks, task % st.chunks
        start, end = share(st.job[POSITION] + 1, ROWS, chunk, chunk + 1, st.chunks)
        count = (end - start + ROWS - 1) // ROWS * ROWS
        first_row = _cache_row(net.kv_heads, st.context, stride, layer, kv_head, start)
        for head in range(group):
            at = (kv_head * group + head) * head_dim
            for i in range(head_dim):
                queries[head, i] = st.qkv[at + i] * net.score_scale
        for p in range(0, count, ROWS):
            # The next keys, and the values that will be wanted once the scores are known.
            prefetch(st.keys_at + first_row + (p + ROWS) * stride, ROWS * stride, 64)
            prefetch(st.values_at + first_row + p * stride, ROWS * stride, 64)
            for head in range(group):
                at = scores_at + (head * count + p) * 4
                dot_rows(
                    st.cache_kind, st.keys_at + first_row + p * stride, stride, address_of(queries[head]), padded, at
                )
        for head in range(group):
            # Positions that only fill the last sixteen get next to no weight, 1e-38.
            scores[head * count + end - start : (head + 1) * count] = np.float32(-np.inf)
            at = scores_at + head * count * 4
            number = kv_head * group + head
            st.tops[chunk, number] = highest_of(at, count)
            st.totals[chunk, number] = exponentials(at, count, st.tops[chunk, number])
        mixed[:] = 0
        # Blocks of positions outside, heads inside: cached values come from memory once for all heads that share them.
        for p in range(0, count, _ROWS):
            for head in range(group):
                row_at, at = st.values_at + first_row + p * stride, scores_at + (head * count + p) * 4
                add_rows(st.cache_kind, row_at, stride, at, min(_ROWS, count - p), address_of(mixed[head]), padded)
        for head in range(group):
            at = (kv_head * group + head) * head_dim
            for i in range(head_dim):
                st.partial[chunk, at + i] = mixed[head, i]


@inlined
def join(net: Network, st: State, out: Floats) -> None:
    """The attention of one token [heads * head_dim], from the chunks; each thread does all of it for itself.

    A chunk's softmax is relative to its own highest score; exp(own highest - highest of all) puts them on one scale.
    """
    for head in range(net.heads):
        top = np.float32(-np.inf)
        for chunk in range(st.chunks):
            top = max(top, st.tops[chunk, head])
        total = np.float32(0)
        for chunk in range(st.chunks):
            total += st.totals[chunk, head] * np.exp(st.tops[chunk, head] - top)
        result = out[head * net.head_dim : (head + 1) * net.head_dim]
        result[:] = 0
        for chunk in range(st.chunks):
            factor = np.exp(st.tops[chunk, head] - top) / total
            part = st.partial[chunk, head * net.head_dim : (head + 1) * net.head_dim]
            for i in range(net.head_dim):
                result[i] += factor * part[i]


@inlined
def attend_panels(net: Network, st: State, layer: int, rank: int, panels: int) -> None:
    """Causal attention of several tokens: this thread's (key-value head, panel) pairs, as matrix products.

    The query heads that share a key-value head are the panels of one product.
    """
    head_dim, group = net.head_dim, net.heads // net.kv_heads
    padded = (head_dim + 31) // 32 * 32
    stride = padded * (2 if st.cache_kind == _F16 else 4)
    rows = (net.heads + 2 * net.kv_heads) * head_dim
    queries, mixed = np.zeros(group * padded * LANES, np.float32), np.empty(group * padded * LANES, np.float32)
    packed = np.empty(group * padded * LANES, np.float32)
    scratch, totals = np.empty(_ROWS * padded, np.float32), np.empty(LANES, np.float32)
    sums = Panels(address_of(mixed), padded * LANES * 4, group)
    scores, weights_at = st.scores[rank], address_of(st.chances[rank])
    for task in range(rank, net.kv_heads * panels, st.threads):
        panel, kv_head = task // net.kv_heads, task % net.kv_heads
        first = st.job[POSITION] + panel * LANES
        count = (min(first + LANES, st.job[POSITION] + st.job[TOKENS]) + 7) // 8 * 8
        # The scale goes into the queries, head_dim products a token, instead of into all scores.
        for head in range(group):
            source = st.qkv[(panel * rows + (kv_head * group + head) * head_dim) * LANES :]
            target = queries[head * padded * LANES :]
            for i in range(head_dim * LANES):
                target[i] = source[i] * net.score_scale
        queries_at = pack_panels(st.cache_kind, address_of(queries), address_of(packed), padded, group)
        first_row = _cache_row(net.kv_heads, st.context, stride, layer, kv_head, 0)
        for p in range(0, count, 8):
            keys = Rows(st.cache_kind, st.keys_at + first_row + p * stride, stride, padded)
            panels_at = Panels(address_of(scores) + p * LANES * 4, count * LANES * 4, group)
            multiply_rows(keys, queries_at, panels_at, address_of(scratch))
        mixed[:] = 0
        for head in range(group):
            own = scores[head * count * LANES : (head + 1) * count * LANES]
            # A token sees no later one.
            for p in range(first + 1, count):
                for lane in range(min(p - first, LANES)):
                    own[p * LANES + lane] = np.float32(-1e30)
            softmax_panel(address_of(own), count, address_of(totals))
            for p in range(count):
                for lane in range(LANES):
                    own[p * LANES + lane] /= totals[lane]
        chances_at = pack_panels(st.cache_kind, address_of(scores), weights_at, count, group)
        for p in range(0, count, _ROWS):
            chunk, x_at = min(_ROWS, count - p), chances_at + p * LANES * (2 if in_pairs(st.cache_kind) else 4)
            values = Rows(st.cache_kind, st.values_at + first_row + p * stride, stride, padded)
            gather_columns(values, chunk, 0, address_of(scratch), 0, padded)
            left = Gathered(st.cache_kind, address_of(scratch), chunk, padded)
            multiply_columns(left, x_at, count, sums, ADD)
        for head in range(group):
            target = st.att[(panel * net.heads + kv_head * group + head) * head_dim * LANES :]
            source = mixed[head * padded * LANES :]
            for i in range(head_dim * LANES):
                target[i] = source[i]
