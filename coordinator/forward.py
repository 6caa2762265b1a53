"""One pass of tokens through all layers, compiled: no Python between the embedding and the logits.

A team of threads runs `forward` together, each with its own `member` number, with barriers where one needs what
another wrote. Per layer:

    norm -> q, k, v rows (split)   RoPE at once, k and v straight into the cache      | barrier
    attention (split by head)                                                         | barrier
    output projection rows (split)                                                    | barrier
    x += projection; norm; member 0 posts the job on the board; all wait for the workers
    x += each worker's part

Every thread keeps its own x and repeats the small work on it (norm, additions): cheaper than two more barriers.
One token (decode) and up to `max_tokens` (prefill) take the same way; they differ in the number of lanes of an
activation (`shared/kernels.py`), so that a weight row is a dot product in the one case and a GEMM in the other.
The rows of q and k are stored with the two halves of a rotated pair side by side.
"""

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from numba import carray

from warmfront.shared.activation import exponentials, softmax_panel
from warmfront.shared.atomics import clock_ns, fetch_add, floats_at, shorts_at
from warmfront.shared.board import LEAVE
from warmfront.shared.gemm import LANES, in_pairs, multiply_columns, multiply_rows, panels_of, prepare
from warmfront.shared.halves import to_half
from warmfront.shared.handoff import DONE, LINE, announce, await_sequence, barrier
from warmfront.shared.jit import kernel
from warmfront.shared.kernels import (
    AHEAD_BYTES,
    axpy,
    dot,
    quantise,
    row_stride,
    share,
    widen,
)
from warmfront.shared.weights import Kind

__all__ = ["POSITION", "ROLES", "SEQUENCE", "TOKENS", "WANT_LOGITS", "Network", "State", "serve_team"]

Floats = npt.NDArray[np.float32]

# Columns of Network.weights and Network.kinds.
ROLES = ("attn_norm", "q", "k", "v", "o", "ffn_norm", "q.bias", "k.bias", "v.bias", "o.bias")
ATTN_NORM, Q, K, V, OUT, FFN_NORM, Q_BIAS, K_BIAS, V_BIAS, OUT_BIAS = range(len(ROLES))
# Positions whose values are widened at a time.
ATTENTION_ROWS = 64
# Words of State.job.
TOKENS, POSITION, WANT_LOGITS, SEQUENCE = range(4)
_F16, _Q8 = int(Kind.F16), int(Kind.Q8)
# A worker that takes longer than this for one layer is taken for lost.
_WORKER_PATIENCE_NS = 120_000_000_000


class Network(NamedTuple):
    """Sizes and weights: int and float32 scalars, and int64 [layers, roles] addresses and weight types."""

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    norm_eps: Any
    score_scale: Any
    weights: Any
    kinds: Any
    embed: int
    embed_kind: int
    head: int
    head_kind: int
    norm: int
    # float32 [context, head_dim / 2]
    cos: Any
    sin: Any


class State(NamedTuple):
    """What a team works on. `*_at` are addresses, the rest arrays.

    x, h: float32 [members, max_tokens * hidden], one row a thread; qkv, att, proj: float32, shared by the team;
    scores, chances: float32 [members, n]; scratch: float32, prepared: uint8 [members, n]; tokens: int64 [max_tokens];
    keys_at, values_at: [layers, kv_heads, context, head_dim padded to 32] of `cache_kind`.
    """

    members: int
    job: Any
    tokens: Any
    status: Any
    x: Any
    h: Any
    qkv: Any
    att: Any
    proj: Any
    scores: Any
    chances: Any
    scratch: Any
    prepared: Any
    logits: Any
    keys_at: int
    values_at: int
    cache_kind: int
    context: int
    # Handoff: the team's own lines, then the board's.
    go_at: int
    finished_at: int
    barrier_at: int
    abort_at: int
    job_at: int
    order: Any
    board_x: Any
    # int64 [workers]: addresses of the done line and of y of each.
    done_at: Any
    y_at: Any
    barrier_spins: int
    worker_spins: int


@kernel
def _address(array: Any) -> Any:
    return array.ctypes.data


@kernel
def _normalise(weight_at: int, eps: Any, hidden: int, x: Floats, out: Floats, panels: int, lanes: int) -> None:
    """Root mean square norm of every token."""
    weight = carray(floats_at(weight_at), (hidden,))
    if lanes == 1:
        total = np.float32(0)
        for k in range(hidden):
            total += x[k] * x[k]
        factor = np.float32(1) / np.sqrt(total / np.float32(hidden) + eps)
        for k in range(hidden):
            out[k] = x[k] * factor * weight[k]
        return
    factors = np.empty(LANES, np.float32)
    for p in range(panels):
        panel = x[p * hidden * LANES : (p + 1) * hidden * LANES]
        result = out[p * hidden * LANES : (p + 1) * hidden * LANES]
        factors[:] = 0
        for k in range(hidden):
            for lane in range(LANES):
                factors[lane] += panel[k * LANES + lane] * panel[k * LANES + lane]
        for lane in range(LANES):
            factors[lane] = np.float32(1) / np.sqrt(factors[lane] / np.float32(hidden) + eps)
        for k in range(hidden):
            for lane in range(LANES):
                result[k * LANES + lane] = panel[k * LANES + lane] * factors[lane] * weight[k]


@kernel
def _linear(
    kind: int,
    weights_at: int,
    bias_at: int,
    cols: int,
    low: int,
    high: int,
    x_at: int,
    y_at: int,
    rows: int,
    panels: int,
    lanes: int,
    scratch_at: int,
    prepared_at: int,
) -> None:
    """Rows low..high of a packed matrix times x [panels, cols, lanes] into y [panels, rows, lanes]."""
    stride = row_stride(kind, cols)
    if lanes == 1:
        y = carray(floats_at(y_at), (rows,))
        q_at = quantise(x_at, prepared_at, cols) if kind >= _Q8 else 0
        ahead = stride * (1 + AHEAD_BYTES // stride)
        for r in range(low, high):
            row_at = weights_at + r * stride
            y[r] = dot(kind, row_at, x_at, q_at, cols, row_at + ahead)
    else:
        x_at = prepare(kind, x_at, prepared_at, cols, panels)
        for r in range(low, high, 8):
            y_row_at, y_step = y_at + r * LANES * 4, rows * LANES * 4
            multiply_rows(kind, weights_at + r * stride, stride, cols, x_at, y_row_at, y_step, panels, scratch_at)
    if bias_at != 0:
        bias = carray(floats_at(bias_at), (rows,))
        y = carray(floats_at(y_at), (panels * rows * lanes,))
        for p in range(panels):
            for r in range(low, high):
                for lane in range(lanes):
                    y[(p * rows + r) * lanes + lane] += bias[r]


@kernel
def _cache_row(net: Network, st: State, layer: int, head: int, position: int) -> int:
    """Byte offset of one head's row in the key and in the value cache."""
    padded = (net.head_dim + 31) // 32 * 32
    size = 2 if st.cache_kind == _F16 else 4
    return ((layer * net.kv_heads + head) * st.context + position) * padded * size


@kernel
def _store_row(net: Network, st: State, cache_at: int, layer: int, row: int, position: int, value: Any) -> None:
    """Write one element of k or v: `row` of the kv_heads * head_dim."""
    row_at = cache_at + _cache_row(net, st, layer, row // net.head_dim, position)
    column = row % net.head_dim
    if st.cache_kind == _F16:
        carray(shorts_at(row_at), (net.head_dim,))[column] = to_half(value)
    else:
        carray(floats_at(row_at), (net.head_dim,))[column] = value


@kernel
def _rotate(net: Network, st: State, first: int, low: int, high: int, lanes: int) -> None:
    """RoPE on rows low..high of q or k, which begin at row `first` of the joint q, k, v vector."""
    rows = (net.heads + 2 * net.kv_heads) * net.head_dim
    for token in range(st.job[TOKENS]):
        at = (token // lanes) * rows * lanes + token % lanes
        cos, sin = net.cos[st.job[POSITION] + token], net.sin[st.job[POSITION] + token]
        pair = (low - first) % net.head_dim // 2
        for row in range(low, high, 2):
            even, odd = at + row * lanes, at + (row + 1) * lanes
            a, b = st.qkv[even], st.qkv[odd]
            st.qkv[even], st.qkv[odd] = a * cos[pair] - b * sin[pair], b * cos[pair] + a * sin[pair]
            pair += 1
            if 2 * pair == net.head_dim:
                pair = 0


@kernel
def _cache(net: Network, st: State, cache_at: int, layer: int, first: int, low: int, high: int, lanes: int) -> None:
    """Write rows low..high of k or v, which begin at row `first` of the joint q, k, v vector, into the cache."""
    rows = (net.heads + 2 * net.kv_heads) * net.head_dim
    for token in range(st.job[TOKENS]):
        at = (token // lanes) * rows * lanes + token % lanes
        for row in range(low, high):
            _store_row(net, st, cache_at, layer, row - first, st.job[POSITION] + token, st.qkv[at + row * lanes])


@kernel
def _project(
    net: Network,
    st: State,
    layer: int,
    part: int,
    bias: int,
    first: int,
    count: int,
    member: int,
    panels: int,
    lanes: int,
) -> None:
    """This thread's share of the rows of q, k or v: rows first .. first + count of the joint q, k, v vector."""
    rows = (net.heads + 2 * net.kv_heads) * net.head_dim
    low, high = share(rows, 8, member, st.members)
    low, high = max(low, first), min(high, first + count)
    if low >= high:
        return
    _linear(
        net.kinds[layer, part],
        net.weights[layer, part],
        net.weights[layer, bias],
        net.hidden,
        low - first,
        high - first,
        _address(st.h[member]),
        _address(st.qkv) + first * lanes * 4,
        rows,
        panels,
        lanes,
        _address(st.scratch[member]),
        _address(st.prepared[member]),
    )
    if part != V:
        _rotate(net, st, first, low, high, lanes)
    if part != Q:
        _cache(net, st, st.keys_at if part == K else st.values_at, layer, first, low, high, lanes)


@kernel
def _attend_one(net: Network, st: State, layer: int, member: int) -> None:
    """Attention of one token over the cache: this thread's share of the heads."""
    head_dim, position = net.head_dim, st.job[POSITION]
    padded = (head_dim + 31) // 32 * 32
    query, mixed = np.zeros(padded, np.float32), np.empty(padded, np.float32)
    query_at, mixed_at = _address(query), _address(mixed)
    scores = st.scores[member]
    stride = padded * (2 if st.cache_kind == _F16 else 4)
    low, high = share(net.heads, 1, member, st.members)
    for head in range(low, high):
        first_row = _cache_row(net, st, layer, head // (net.heads // net.kv_heads), 0)
        keys_at, values_at = st.keys_at + first_row, st.values_at + first_row
        for i in range(head_dim):
            query[i] = st.qkv[head * head_dim + i] * net.score_scale
        count = position + 1
        highest = np.float32(-np.inf)
        for p in range(count):
            row_at = keys_at + p * stride
            scores[p] = dot(st.cache_kind, row_at, query_at, 0, padded, row_at + AHEAD_BYTES)
            highest = max(highest, scores[p])
        rounded = (count + LANES - 1) // LANES * LANES
        scores[count:rounded] = np.float32(-np.inf)
        total = exponentials(_address(scores), rounded, highest)
        mixed[:] = 0
        for p in range(count):
            row_at = values_at + p * stride
            axpy(st.cache_kind, scores[p], row_at, mixed_at, padded, row_at + AHEAD_BYTES)
        for i in range(head_dim):
            st.att[head * head_dim + i] = mixed[i] / total


@kernel
def _attend_panels(net: Network, st: State, layer: int, member: int, panels: int) -> None:
    """Causal attention of several tokens: this thread's (key-value head, panel) pairs, as matrix products.

    The query heads that share a key-value head are the panels of one product.
    """
    head_dim, group = net.head_dim, net.heads // net.kv_heads
    padded = (head_dim + 31) // 32 * 32
    stride = padded * (2 if st.cache_kind == _F16 else 4)
    rows = (net.heads + 2 * net.kv_heads) * head_dim
    queries, mixed = np.zeros(group * padded * LANES, np.float32), np.empty(group * padded * LANES, np.float32)
    prepared = np.empty(group * padded * LANES, np.float32)
    scratch, sums = np.empty(ATTENTION_ROWS * padded, np.float32), np.empty(LANES, np.float32)
    scores, weights_at = st.scores[member], _address(st.chances[member])
    for task in range(member, net.kv_heads * panels, st.members):
        panel, kv_head = task // net.kv_heads, task % net.kv_heads
        first = st.job[POSITION] + panel * LANES
        count = (min(first + LANES, st.job[POSITION] + st.job[TOKENS]) + 7) // 8 * 8
        for head in range(group):
            source = st.qkv[(panel * rows + (kv_head * group + head) * head_dim) * LANES :]
            target = queries[head * padded * LANES :]
            for i in range(head_dim * LANES):
                target[i] = source[i] * net.score_scale
        queries_at = prepare(st.cache_kind, _address(queries), _address(prepared), padded, group)
        first_row = _cache_row(net, st, layer, kv_head, 0)
        for p in range(0, count, 8):
            row_at, scores_at = st.keys_at + first_row + p * stride, _address(scores) + p * LANES * 4
            multiply_rows(
                st.cache_kind,
                row_at,
                stride,
                padded,
                queries_at,
                scores_at,
                count * LANES * 4,
                group,
                _address(scratch),
            )
        mixed[:] = 0
        for head in range(group):
            own = scores[head * count * LANES : (head + 1) * count * LANES]
            for p in range(first + 1, count):
                for lane in range(min(p - first, LANES)):
                    own[p * LANES + lane] = np.float32(-1e30)
            softmax_panel(_address(own), count, _address(sums))
            for p in range(count):
                for lane in range(LANES):
                    own[p * LANES + lane] /= sums[lane]
        chances_at = prepare(st.cache_kind, _address(scores), weights_at, count, group)
        for p in range(0, count, ATTENTION_ROWS):
            some = min(ATTENTION_ROWS, count - p)
            x_at = chances_at + p * LANES * (2 if in_pairs(st.cache_kind) else 4)
            row_at = st.values_at + first_row + p * stride
            multiply_columns(
                st.cache_kind,
                row_at,
                stride,
                some,
                padded,
                x_at,
                count,
                _address(mixed),
                padded * LANES * 4,
                group,
                _address(scratch),
            )
        for head in range(group):
            target = st.att[(panel * net.heads + kv_head * group + head) * head_dim * LANES :]
            source = mixed[head * padded * LANES :]
            target[: head_dim * LANES] = source[: head_dim * LANES]


@kernel
def _post(st: State, sequence: int, layer: int, values: Floats, count: int, lanes: int) -> None:
    """Write the job on the board and announce it."""
    st.board_x[:count] = values[:count]
    st.order[0] = layer
    st.order[1] = st.job[TOKENS]
    st.order[2] = lanes
    announce(st.job_at, sequence)


@kernel
def _merge(st: State, sequence: int, x: Floats, count: int) -> int:
    """Wait for every worker and add its part to x; the order of the workers is fixed."""
    deadline = clock_ns() + _WORKER_PATIENCE_NS
    for worker in range(st.done_at.shape[0]):
        result = await_sequence(st.done_at[worker], sequence, st.abort_at, st.worker_spins, deadline)
        if result != DONE:
            return result
        y = carray(floats_at(st.y_at[worker]), (count,))
        for i in range(count):
            x[i] += y[i]
    return DONE


@kernel
def _embed(net: Network, st: State, member: int, lanes: int) -> None:
    stride = row_stride(net.embed_kind, net.hidden)
    x, h = st.x[member], st.h[member]
    x[:] = 0
    for token in range(st.job[TOKENS]):
        widen(net.embed_kind, net.embed + st.tokens[token] * stride, _address(h), net.hidden)
        at = (token // lanes) * net.hidden * lanes + token % lanes
        for k in range(net.hidden):
            x[at + k * lanes] = h[k]


@kernel
def _output(net: Network, st: State, member: int, lanes: int) -> None:
    """Logits of the last token: this thread's share of the vocabulary."""
    last = st.job[TOKENS] - 1
    x, h = st.x[member], st.h[member]
    at = (last // lanes) * net.hidden * lanes + last % lanes
    for k in range(net.hidden):
        x[k] = x[at + k * lanes]
    _normalise(net.norm, net.norm_eps, net.hidden, x, h, 1, 1)
    low, high = share(net.vocab, 1, member, st.members)
    _linear(
        net.head_kind,
        net.head,
        0,
        net.hidden,
        low,
        high,
        _address(h),
        _address(st.logits),
        net.vocab,
        1,
        1,
        0,
        _address(st.prepared[member]),
    )


@kernel
def forward(member: int, net: Network, st: State) -> int:
    """Run the job in `st.job` as thread `member` of the team; returns DONE, ABORTED or LATE."""
    hidden, q_rows, kv_rows = net.hidden, net.heads * net.head_dim, net.kv_heads * net.head_dim
    tokens = st.job[TOKENS]
    lanes = 1 if tokens == 1 else LANES
    panels = panels_of(tokens)
    count = panels * hidden * lanes
    x, h = st.x[member], st.h[member]
    scratch_at = _address(st.scratch[member])
    low, high = share(hidden, 8, member, st.members)
    _embed(net, st, member, lanes)
    for layer in range(net.layers):
        _normalise(net.weights[layer, ATTN_NORM], net.norm_eps, hidden, x, h, panels, lanes)
        _project(net, st, layer, Q, Q_BIAS, 0, q_rows, member, panels, lanes)
        _project(net, st, layer, K, K_BIAS, q_rows, kv_rows, member, panels, lanes)
        _project(net, st, layer, V, V_BIAS, q_rows + kv_rows, kv_rows, member, panels, lanes)
        result = barrier(st.barrier_at, st.members, st.barrier_spins, st.abort_at)
        if result != DONE:
            return result
        if lanes == 1:
            _attend_one(net, st, layer, member)
        else:
            _attend_panels(net, st, layer, member, panels)
        result = barrier(st.barrier_at, st.members, st.barrier_spins, st.abort_at)
        if result != DONE:
            return result
        _linear(
            net.kinds[layer, OUT],
            net.weights[layer, OUT],
            net.weights[layer, OUT_BIAS],
            q_rows,
            low,
            high,
            _address(st.att),
            _address(st.proj),
            hidden,
            panels,
            lanes,
            scratch_at,
            _address(st.prepared[member]),
        )
        result = barrier(st.barrier_at, st.members, st.barrier_spins, st.abort_at)
        if result != DONE:
            return result
        for i in range(count):
            x[i] += st.proj[i]
        _normalise(net.weights[layer, FFN_NORM], net.norm_eps, hidden, x, h, panels, lanes)
        sequence = st.job[SEQUENCE] + layer + 1
        if member == 0:
            _post(st, sequence, layer, h, count, lanes)
        result = _merge(st, sequence, x, count)
        if result != DONE:
            return result
    if st.job[WANT_LOGITS] != 0:
        _output(net, st, member, lanes)
    return DONE


@kernel
def serve_team(member: int, net: Network, st: State) -> None:
    """The resident loop of one thread: wait for a job of the engine, run it, report; a job of 0 tokens ends it."""
    sequence = 0
    while True:
        sequence += 1
        if await_sequence(st.go_at, sequence, st.abort_at, 0, 0) != DONE:
            return
        if st.job[TOKENS] == 0:
            if member == 0:
                st.order[0] = LEAVE
                announce(st.job_at, st.job[SEQUENCE] + 1)
            return
        result = forward(member, net, st)
        st.status[member] = result
        if fetch_add(st.finished_at + LINE, 1) + 1 == st.members * sequence:
            announce(st.finished_at, sequence)
        if result != DONE:
            return
