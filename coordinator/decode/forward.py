"""One pass of tokens through all layers, compiled: no Python between the embedding and the logits.

A team of threads runs `forward` together, each with its own `rank`, with barriers where one needs what
another wrote. Per layer:

    norm -> q, k, v rows (split)   RoPE at once                                       | barrier
    experts that the layer's input tells: as below
    several tokens: k and v into the cache (split by head)                            | barrier
    attention (split by head); one token: k and v into the cache by whoever reads them | barrier
    output projection rows (split)                                                    | barrier
    x += projection; norm; with a predictor: the mask of the neurons that will fire   | barrier
    with experts: their scores (split)                                                | barrier
    which of them each token uses (split by token)              with several tokens   | barrier
    thread 0 posts the job on the board; all wait for the workers; looking ahead, they predict the next layer's mask
    from this layer's input meanwhile
    x += each worker's part

With a parallel residual attention's part is added once the job is posted: neither the feed-forward nor a predictor is
to see it. Where norms are of the sum, x itself is normed after each addition.

Every thread keeps its own x and repeats the small work on it (norm, additions): cheaper than two more barriers.
A batch of up to 16 tokens (decode) and up to `max_tokens` (prefill) take the same way; they differ in the number of
lanes of an activation (`shared/model/panels.py`), so that a weight row is a dot product for each token in the one case
and a GEMM in the other. In a batch, every sum of a token has the terms and the order that it has if the token comes
alone, whatever is beside it: the logits are the same bit for bit.
The rows of q and k are stored with the two halves of a rotated pair side by side.
"""

import numpy as np
import numpy.typing as npt
from numba import carray

from warmfront.coordinator.decode.attention import join
from warmfront.coordinator.decode.linear import (
    Input,
    Matrix,
    layer_matrix,
    linear,
    packed_input,
    widen_row,
)
from warmfront.coordinator.decode.network import (
    ATTN_NORM,
    ATTN_POST_NORM,
    CAPTURE,
    COMPARE,
    DECODE,
    FFN_NORM,
    FFN_POST_NORM,
    LOST,
    OUT,
    POSITION,
    POSTED,
    SEQUENCE,
    STEPS,
    TOKENS,
    WANT_LOGITS,
    WORKER_PATIENCE_NS,
    Handoff,
    K,
    Network,
    Parts,
    Q,
    State,
    V,
)
from warmfront.coordinator.decode.norms import add_block, last_norm, layer_norm, normalise, rotate
from warmfront.coordinator.decode.router import add_down_biases
from warmfront.coordinator.decode.row_split import portion
from warmfront.shared.kernels.activation import soft_cap
from warmfront.shared.kernels.atomics import address_of, clock_ns, fetch_add, load_acquire, longs_at
from warmfront.shared.kernels.by_address.kernels import call_at
from warmfront.shared.kernels.exact_sums import inverse_unit, merge_sums
from warmfront.shared.kernels.fetching import MATRIX_ROWS
from warmfront.shared.kernels.gemm import panels_of
from warmfront.shared.kernels.jit import apart, inlined, kernel
from warmfront.shared.model.panels import LANES
from warmfront.shared.wire.board import ANNOUNCED_NS, COMPARE_SELECTION, JOB_LANES, JOB_TOKENS, LAYER, QUIT
from warmfront.shared.wire.handoff import ABORTED, DONE, LINE, announce, await_sequence, barrier, passed

__all__ = ["serve_team"]

Floats = npt.NDArray[np.float32]
Longs = npt.NDArray[np.int64]
# Numbers of the workers' parts that are added up at a time, a multiple of 16 lanes.
_MERGED = 512
_START, _QKV, _ATTENTION, _OUTPUT, _PREDICTOR, _POST, _MERGE = range(len(STEPS))


@apart
def _project(net: Network, st: State, layer: int, part: int, first: int, count: int, rank: int, x: Input) -> None:
    """This thread's share of the rows of q, k or v: rows first .. first + count of the joint q, k, v vector.

    `x`: the normed input, packed for q.
    """
    rows = (net.heads + 2 * net.kv_heads) * net.head_dim
    low, high = portion(st.cuts, rows, 8, rank)
    low, high = max(low, first), min(high, first + count)
    if low >= high:
        return
    matrix = layer_matrix(net, layer, part, count, net.hidden)
    if matrix.kind != net.kinds[layer, Q]:
        x = packed_input(matrix.kind, x.at, address_of(st.packed[rank]), net.hidden, x.panels, x.lanes)
    y_at = address_of(st.qkv) + first * x.lanes * 4
    linear(st, matrix, low - first, high - first, x, y_at, rows, address_of(st.scratch[rank]))
    # Both rows of a rotated pair are this thread's, for ranges are cut at multiples of 8: no barrier before this.
    if part != V and not net.qk_norm:
        rotate(net, st, layer, first, low, high, x.lanes)


@apart
def _note_units(
    inverse: Floats, reach: float, degree: int, biased: int, x: Floats, panels: int, hidden: int, lanes: int
) -> None:
    """The inverse unit of each token's sums."""
    magnitudes = np.empty(LANES, np.float32)
    for panel in range(panels):
        magnitudes[:] = biased
        values = x[panel * hidden * lanes : (panel + 1) * hidden * lanes]
        if lanes == 1:
            for k in range(hidden):
                magnitudes[0] += abs(values[k])
        else:
            for k in range(hidden):
                for lane in range(LANES):
                    magnitudes[lane] += abs(values[k * LANES + lane])
        for lane in range(lanes):
            inverse[panel * lanes + lane] = inverse_unit(reach, degree, np.float64(magnitudes[lane]))


@inlined
def _post(net: Network, st: State, sequence: int, layer: int, values: Floats, panels: int, lanes: int) -> None:
    """Write the job on the board and announce it."""
    handoff = st.handoff
    for i in range(panels * net.hidden * lanes):
        handoff.board_x[i] = values[i]
    _note_units(handoff.inverse, net.reach[layer], net.degree, net.biased, values, panels, net.hidden, lanes)
    handoff.descriptor[LAYER] = layer
    handoff.descriptor[JOB_TOKENS] = st.job[TOKENS]
    handoff.descriptor[JOB_LANES] = lanes
    handoff.descriptor[COMPARE_SELECTION] = st.job[COMPARE]
    handoff.descriptor[ANNOUNCED_NS] = clock_ns()
    st.job[POSTED] = sequence
    announce(handoff.job_at, sequence)


@inlined
def _await_workers(handoff: Handoff, sequence: int) -> int:
    """Wait for every worker.

    Returns LOST if one has died without an answer: all threads see the same, for its answers are final then. The others
    are waited for nevertheless, since they still read the board.
    """
    deadline = clock_ns() + WORKER_PATIENCE_NS
    lost = False
    for worker in range(handoff.done_at.shape[0]):
        if handoff.present[worker] == 0:
            continue
        result = await_sequence(handoff.done_at[worker], sequence, handoff.dead_at[worker], handoff.spins, deadline)
        if result == ABORTED and load_acquire(handoff.abort_at) == 0:
            lost = True
            continue
        if result != DONE:
            return result
    return LOST if lost else DONE


@kernel
def _merge(handoff: Handoff, x: Floats, panels: int, hidden: int, lanes: int) -> None:
    """Add all workers' parts to x: their sums as integers first, which is exact, then each number rounded once."""
    part = np.empty(_MERGED, np.int64)
    for panel in range(panels):
        inverse = handoff.inverse[panel * lanes : (panel + 1) * lanes]
        for start in range(panel * hidden * lanes, (panel + 1) * hidden * lanes, _MERGED):
            count = min(_MERGED, (panel + 1) * hidden * lanes - start)
            part[:] = 0
            for worker in range(handoff.done_at.shape[0]):
                if handoff.present[worker] != 0:
                    y = carray(longs_at(handoff.y_at[worker] + 8 * start), (count,))
                    for i in range(count):
                        part[i] += y[i]
            merge_sums(part[:count], inverse, x[start : start + count])


@kernel
def _count(busy: Longs, rank: int, since: int) -> None:
    """Add to what this thread's share of the rows has taken, from when it could begin: its wait for the core counts."""
    busy[rank, 0] += clock_ns() - since


@kernel
def _answered(handoff: Handoff) -> int:
    """When the last worker had done its part of the layer."""
    last = 0
    for worker in range(len(handoff.record_at)):
        if handoff.present[worker] != 0:
            last = max(last, carray(longs_at(handoff.record_at[worker]), (2,))[1])
    return last


@kernel
def _note(times: Longs, layer: int, rank: int, step: int) -> None:
    """The first thread writes down when it came to the end of a step."""
    if rank == 0:
        times[layer, step] = clock_ns()


@inlined
def _note_workers(st: State, layer: int, rank: int) -> None:
    """The first thread keeps when each worker began and ended its part of the layer."""
    _note(st.times, layer, rank, _MERGE)
    if rank == 0:
        for worker in range(st.handoff.record_at.shape[0]):
            record = carray(longs_at(st.handoff.record_at[worker]), (2,))
            st.spans[layer, worker, 0], st.spans[layer, worker, 1] = record[0], record[1]


@inlined
def _embed(net: Network, st: State, rank: int, panels: int, lanes: int) -> None:
    """Every thread's own copy of the residual."""
    embed = Matrix(net.embed_kind, net.embed, 0, net.vocab, net.hidden, 0)
    learned = Matrix(net.learned_kind, net.learned, 0, net.learned_rows, net.hidden, 0)
    x, h = st.x[rank], st.h[rank]
    x[: panels * net.hidden * lanes] = 0
    for token in range(st.job[TOKENS]):
        widen_row(embed, st.tokens[token], address_of(h))
        at = (token // lanes) * net.hidden * lanes + token % lanes
        for k in range(net.hidden):
            x[at + k * lanes] = h[k] * net.embedding_scale
        if learned.at != 0:
            position = st.positions[token] if lanes == 1 else st.job[POSITION] + token
            widen_row(learned, net.learned_offset + position, address_of(h))
            for k in range(net.hidden):
                x[at + k * lanes] += h[k]


@inlined
def _output(net: Network, st: State, rank: int, lanes: int) -> None:
    """Logits of a batch's tokens, or of the last of a prompt: this thread's share of the vocabulary."""
    tokens = st.job[TOKENS]
    x, h = st.x[rank], st.h[rank]
    if lanes > 1:
        at = (tokens - 1) // lanes * net.hidden * lanes + (tokens - 1) % lanes
        for k in range(net.hidden):
            x[k] = x[at + k * lanes]
        tokens = 1
    normalise(last_norm(net), net.hidden, x, h, tokens, 1)
    low, high = portion(st.cuts, net.vocab, 1, rank)
    normed = packed_input(net.head_kind, address_of(h), address_of(st.packed[rank]), net.hidden, tokens, 1)
    matrix = Matrix(net.head_kind, net.head, 0, net.vocab, net.hidden, net.ahead[MATRIX_ROWS, net.head_kind])
    linear(st, matrix, low, high, normed, address_of(st.logits), net.vocab, 0)
    for token in range(tokens):
        logits = st.logits[token]
        if net.logit_scale != 1:
            for i in range(low, high):
                logits[i] *= net.logit_scale
        if net.logit_cap > 0:
            whole = (high - low) // LANES * LANES
            soft_cap(address_of(logits) + low * 4, whole, net.logit_cap)
            for i in range(low + whole, high):
                logits[i] = net.logit_cap * np.tanh(logits[i] / net.logit_cap)


@apart
def _add_workers(net: Network, st: State, layer: int, rank: int, panels: int, lanes: int) -> None:
    """Add the feed-forward's output to the residual."""
    x, h = st.x[rank], st.h[rank]
    norm = layer_norm(net, layer, FFN_POST_NORM)
    direct = norm.weight_at == 0 and net.residual_scale == 1
    to = x if direct else h
    if not direct:
        h[: panels * net.hidden * lanes] = 0
    _merge(st.handoff, to, panels, net.hidden, lanes)
    add_down_biases(net, st, layer, to, panels, lanes)
    if not direct:
        add_block(net, norm, h, h, x, panels, lanes)


@inlined
def _run_part(at: int, net: Network, st: State, layer: int, rank: int) -> int:
    result: int = call_at(at, net, st, layer, rank)
    return result


@inlined
def forward(rank: int, net: Network, st: State, parts: Parts) -> int:
    """Run the job in `st.job` as thread `rank` of the team; returns DONE, ABORTED, LATE or LOST."""
    hidden, q_rows, kv_rows = net.hidden, net.heads * net.head_dim, net.kv_heads * net.head_dim
    tokens = st.job[TOKENS]
    decode = st.job[DECODE] != 0
    lanes = 1 if decode else LANES
    panels = tokens if decode else panels_of(tokens)
    count = panels * hidden * lanes
    x, h = st.x[rank], st.h[rank]
    scratch_at, packed_at = address_of(st.scratch[rank]), address_of(st.packed[rank])
    low, high = portion(st.cuts, hidden, 8, rank)
    _embed(net, st, rank, panels, lanes)
    for layer in range(net.layers):
        _note(st.times, layer, rank, _START)
        # A thread could begin when the last worker had answered: later is its wait for a core that others use.
        since = clock_ns() if layer == 0 else _answered(st.handoff)
        normalise(layer_norm(net, layer, ATTN_NORM), hidden, x, h, panels, lanes)
        normed = packed_input(net.kinds[layer, Q], address_of(h), packed_at, hidden, panels, lanes)
        _project(net, st, layer, Q, 0, q_rows, rank, normed)
        _project(net, st, layer, K, q_rows, kv_rows, rank, normed)
        _project(net, st, layer, V, q_rows + kv_rows, kv_rows, rank, normed)
        _count(st.busy, rank, since)
        result = barrier(st.barrier)
        if result != DONE:
            return result
        if net.router.early:
            result = _run_part(parts.route, net, st, layer, rank)
            if result != DONE:
                return result
        if net.qk_norm:
            result = _run_part(parts.normalise_heads, net, st, layer, rank)
            if result != DONE:
                return result
        _note(st.times, layer, rank, _QKV)
        result = _run_part(parts.attend_batch if decode else parts.attend_panels, net, st, layer, rank)
        if result != DONE:
            return result
        _note(st.times, layer, rank, _ATTENTION)
        since = passed(st.barrier)
        attended = st.att
        if decode:
            attended = st.h[rank]
            for token in range(tokens):
                join(net, st, token, attended[token * q_rows : (token + 1) * q_rows])
        matrix = layer_matrix(net, layer, OUT, hidden, q_rows)
        mixed = packed_input(matrix.kind, address_of(attended), packed_at, q_rows, panels, lanes)
        linear(st, matrix, low, high, mixed, address_of(st.proj), hidden, scratch_at)
        _count(st.busy, rank, since)
        result = barrier(st.barrier)
        if result != DONE:
            return result
        post_norm = layer_norm(net, layer, ATTN_POST_NORM)
        if not net.parallel:
            add_block(net, post_norm, st.proj, h, x, panels, lanes)
        normalise(layer_norm(net, layer, FFN_NORM), hidden, x, h, panels, lanes)
        _note(st.times, layer, rank, _OUTPUT)
        if net.router.experts > 0 and not net.router.early:
            result = _run_part(parts.route, net, st, layer, rank)
            if result != DONE:
                return result
        if net.predicts and decode and (layer == 0 or not net.look_ahead):
            result = _run_part(parts.predict, net, st, layer, rank)
            if result != DONE:
                return result
        _note(st.times, layer, rank, _PREDICTOR)
        sequence = st.job[SEQUENCE] + layer + 1
        if rank == 0:
            _post(net, st, sequence, layer, h, panels, lanes)
            if st.job[CAPTURE] != 0:
                for i in range(count):
                    st.captured[layer, i] = h[i]
        _note(st.times, layer, rank, _POST)
        if net.look_ahead and decode and layer + 1 < net.layers:
            result = _run_part(parts.predict, net, st, layer + 1, rank)
            if result != DONE:
                return result
        if net.parallel:
            add_block(net, post_norm, st.proj, h, x, panels, lanes)
        result = _await_workers(st.handoff, sequence)
        if result != DONE:
            return result
        _add_workers(net, st, layer, rank, panels, lanes)
        _note_workers(st, layer, rank)
    if st.job[WANT_LOGITS] != 0:
        _output(net, st, rank, lanes)
    return DONE


@kernel
def serve_team(rank: int, net: Network, st: State, parts: Parts) -> None:
    """The resident loop of one thread: wait for a job of the engine, run it, report; a job of 0 tokens ends it."""
    handoff, sequence = st.handoff, 0
    while True:
        sequence += 1
        if await_sequence(handoff.go_at, sequence, handoff.abort_at, 0, 0) != DONE:
            return
        if st.job[TOKENS] == 0:
            if rank == 0:
                handoff.descriptor[LAYER] = QUIT
                announce(handoff.job_at, st.job[SEQUENCE] + 1)
            return
        result = forward(rank, net, st, parts)
        st.status[rank] = result
        if fetch_add(handoff.finished_at + LINE, 1) + 1 == st.threads * sequence:
            announce(handoff.finished_at, sequence)
        if result != DONE and result != LOST:
            return
