"""One pass of tokens through all layers, compiled: no Python between the embedding and the logits.

A team of threads runs `forward` together, each with its own `member` number, with barriers where one needs what
another wrote. Per layer:

    norm -> q, k, v rows (split)   RoPE at once, k and v straight into the cache      | barrier
    attention (split by head)                                                         | barrier
    output projection rows (split)                                                    | barrier
    x += projection; norm; with a predictor: the mask of the neurons that will fire   | barrier
    member 0 posts the job on the board; all wait for the workers; looking ahead, they predict the next layer's mask
    from this layer's input meanwhile
    x += each worker's part

Every thread keeps its own x and repeats the small work on it (norm, additions): cheaper than two more barriers.
One token (decode) and up to `max_tokens` (prefill) take the same way; they differ in the number of lanes of an
activation (`shared/kernels/rows.py`), so that a weight row is a dot product in the one case and a GEMM in the other.
The rows of q and k are stored with the two halves of a rotated pair side by side.
"""

import numpy as np
import numpy.typing as npt
from numba import carray

from warmfront.coordinator.decode.attention import attend_one, attend_panels, cache, join, rotate
from warmfront.coordinator.decode.linear import linear, normalise, ready
from warmfront.coordinator.decode.network import (
    ATTN_NORM,
    CAPTURE,
    FFN_NORM,
    K_BIAS,
    LOST,
    MEASURE,
    OUT,
    OUT_BIAS,
    POSTED,
    Q_BIAS,
    SEQUENCE,
    STEPS,
    TOKENS,
    V_BIAS,
    WANT_LOGITS,
    K,
    Network,
    Q,
    State,
    V,
)
from warmfront.coordinator.decode.predictor import predict
from warmfront.coordinator.decode.row_split import portion
from warmfront.shared.kernels.atomics import address_of, clock_ns, fetch_add, floats_at, load_acquire, longs_at
from warmfront.shared.kernels.gemm import LANES, panels_of
from warmfront.shared.kernels.jit import inlined, kernel
from warmfront.shared.kernels.rows import row_stride, widen
from warmfront.shared.wire.board import LEAVE
from warmfront.shared.wire.handoff import ABORTED, DONE, LINE, announce, await_sequence, barrier, passed

__all__ = ["serve_team"]

Floats = npt.NDArray[np.float32]
Longs = npt.NDArray[np.int64]
# A worker that takes longer than this for one layer is taken for lost.
_WORKER_PATIENCE_NS = 120_000_000_000
_START, _QKV, _ATTENTION, _OUTPUT, _PREDICTOR, _POST, _MERGE = range(len(STEPS))


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
    ready_at: int,
) -> None:
    """This thread's share of the rows of q, k or v: rows first .. first + count of the joint q, k, v vector.

    `ready_at`: of the normed input, made for q.
    """
    rows = (net.heads + 2 * net.kv_heads) * net.head_dim
    low, high = portion(st.cuts, rows, 8, member)
    low, high = max(low, first), min(high, first + count)
    if low >= high:
        return
    kind, input_at = net.kinds[layer, part], address_of(st.h[member])
    if kind != net.kinds[layer, Q]:
        ready_at = ready(kind, input_at, address_of(st.prepared[member]), net.hidden, panels, lanes)
    linear(
        kind,
        net.weights[layer, part],
        net.weights[layer, bias],
        net.hidden,
        low - first,
        high - first,
        input_at,
        ready_at,
        address_of(st.qkv) + first * lanes * 4,
        rows,
        panels,
        lanes,
        address_of(st.scratch[member]),
    )
    if part != V:
        rotate(net, st, first, low, high, lanes)
    if part != Q:
        cache(net, st, st.keys_at if part == K else st.values_at, layer, first, low, high, lanes)


@inlined
def _post(st: State, sequence: int, layer: int, values: Floats, count: int, lanes: int) -> None:
    """Write the job on the board and announce it."""
    for i in range(count):
        st.board_x[i] = values[i]
    st.order[0] = layer
    st.order[1] = st.job[TOKENS]
    st.order[2] = lanes
    st.order[3] = st.job[MEASURE]
    st.order[4] = clock_ns()
    st.job[POSTED] = sequence
    announce(st.job_at, sequence)


@inlined
def _merge(st: State, sequence: int, x: Floats, count: int) -> int:
    """Wait for every worker and add its part to x; the order of the workers is fixed.

    Returns LOST if one has died without an answer: all threads see the same, for its answers are final then. The others
    are waited for all the same, since they read the board.
    """
    deadline = clock_ns() + _WORKER_PATIENCE_NS
    lost = False
    for worker in range(st.done_at.shape[0]):
        if st.present[worker] == 0:
            continue
        result = await_sequence(st.done_at[worker], sequence, st.gone_at[worker], st.worker_spins, deadline)
        if result == ABORTED and load_acquire(st.abort_at) == 0:
            lost = True
            continue
        if result != DONE:
            return result
        y = carray(floats_at(st.y_at[worker]), (count,))
        for i in range(count):
            x[i] += y[i]
    return LOST if lost else DONE


@kernel
def _count(busy: Longs, member: int, since: int) -> None:
    """Add to what this thread's share of the rows has taken, from when it could begin: its wait for the core counts."""
    busy[member, 0] += clock_ns() - since


@kernel
def _answered(present: Longs, record_at: Longs) -> int:
    """When the last worker had done its part of the layer."""
    last = 0
    for worker in range(len(record_at)):
        if present[worker] != 0:
            last = max(last, carray(longs_at(record_at[worker]), (2,))[1])
    return last


@kernel
def _note(times: Longs, layer: int, member: int, step: int) -> None:
    """The first thread writes down when it came to the end of a step."""
    if member == 0:
        times[layer, step] = clock_ns()


@inlined
def _note_workers(st: State, layer: int, member: int) -> None:
    """The first thread keeps when each worker began and ended its part of the layer."""
    _note(st.times, layer, member, _MERGE)
    if member == 0:
        for worker in range(st.record_at.shape[0]):
            record = carray(longs_at(st.record_at[worker]), (2,))
            st.spans[layer, worker, 0], st.spans[layer, worker, 1] = record[0], record[1]


@inlined
def _embed(net: Network, st: State, member: int, lanes: int) -> None:
    stride = row_stride(net.embed_kind, net.hidden)
    x, h = st.x[member], st.h[member]
    x[:] = 0
    for token in range(st.job[TOKENS]):
        widen(net.embed_kind, net.embed + st.tokens[token] * stride, address_of(h), net.hidden)
        at = (token // lanes) * net.hidden * lanes + token % lanes
        for k in range(net.hidden):
            x[at + k * lanes] = h[k]


@inlined
def _output(net: Network, st: State, member: int, lanes: int) -> None:
    """Logits of the last token: this thread's share of the vocabulary."""
    last = st.job[TOKENS] - 1
    x, h = st.x[member], st.h[member]
    at = (last // lanes) * net.hidden * lanes + last % lanes
    for k in range(net.hidden):
        x[k] = x[at + k * lanes]
    normalise(net.norm, net.norm_eps, net.hidden, x, h, 1, 1)
    low, high = portion(st.cuts, net.vocab, 1, member)
    linear(
        net.head_kind,
        net.head,
        0,
        net.hidden,
        low,
        high,
        address_of(h),
        ready(net.head_kind, address_of(h), address_of(st.prepared[member]), net.hidden, 1, 1),
        address_of(st.logits),
        net.vocab,
        1,
        1,
        0,
    )


@inlined
def forward(member: int, net: Network, st: State) -> int:
    """Run the job in `st.job` as thread `member` of the team; returns DONE, ABORTED, LATE or LOST."""
    hidden, q_rows, kv_rows = net.hidden, net.heads * net.head_dim, net.kv_heads * net.head_dim
    tokens = st.job[TOKENS]
    lanes = 1 if tokens == 1 else LANES
    panels = panels_of(tokens)
    count = panels * hidden * lanes
    x, h = st.x[member], st.h[member]
    scratch_at, prepared_at = address_of(st.scratch[member]), address_of(st.prepared[member])
    low, high = portion(st.cuts, hidden, 8, member)
    _embed(net, st, member, lanes)
    for layer in range(net.layers):
        _note(st.times, layer, member, _START)
        since = clock_ns() if layer == 0 else _answered(st.present, st.record_at)
        normalise(net.weights[layer, ATTN_NORM], net.norm_eps, hidden, x, h, panels, lanes)
        ready_at = ready(net.kinds[layer, Q], address_of(h), prepared_at, hidden, panels, lanes)
        _project(net, st, layer, Q, Q_BIAS, 0, q_rows, member, panels, lanes, ready_at)
        _project(net, st, layer, K, K_BIAS, q_rows, kv_rows, member, panels, lanes, ready_at)
        _project(net, st, layer, V, V_BIAS, q_rows + kv_rows, kv_rows, member, panels, lanes, ready_at)
        _count(st.busy, member, since)
        result = barrier(st.barrier_at, st.members, st.barrier_spins, st.abort_at)
        if result != DONE:
            return result
        _note(st.times, layer, member, _QKV)
        if lanes == 1:
            attend_one(net, st, layer, member)
        else:
            attend_panels(net, st, layer, member, panels)
        result = barrier(st.barrier_at, st.members, st.barrier_spins, st.abort_at)
        if result != DONE:
            return result
        _note(st.times, layer, member, _ATTENTION)
        since = passed(st.barrier_at)
        attended = st.att
        if lanes == 1:
            attended = st.h[member]
            join(net, st, attended)
        linear(
            net.kinds[layer, OUT],
            net.weights[layer, OUT],
            net.weights[layer, OUT_BIAS],
            q_rows,
            low,
            high,
            address_of(attended),
            ready(net.kinds[layer, OUT], address_of(attended), prepared_at, q_rows, panels, lanes),
            address_of(st.proj),
            hidden,
            panels,
            lanes,
            scratch_at,
        )
        _count(st.busy, member, since)
        result = barrier(st.barrier_at, st.members, st.barrier_spins, st.abort_at)
        if result != DONE:
            return result
        for i in range(count):
            x[i] += st.proj[i]
        normalise(net.weights[layer, FFN_NORM], net.norm_eps, hidden, x, h, panels, lanes)
        _note(st.times, layer, member, _OUTPUT)
        if net.predicts and lanes == 1 and (layer == 0 or not net.ahead):
            result = predict(net, st, layer, member)
            if result != DONE:
                return result
        _note(st.times, layer, member, _PREDICTOR)
        sequence = st.job[SEQUENCE] + layer + 1
        if member == 0:
            _post(st, sequence, layer, h, count, lanes)
            if st.job[CAPTURE] != 0:
                for i in range(count):
                    st.captured[layer, i] = h[i]
        _note(st.times, layer, member, _POST)
        if net.ahead and lanes == 1 and layer + 1 < net.layers:
            result = predict(net, st, layer + 1, member)
            if result != DONE:
                return result
        result = _merge(st, sequence, x, count)
        if result != DONE:
            return result
        _note_workers(st, layer, member)
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
        if result != DONE and result != LOST:
            return
