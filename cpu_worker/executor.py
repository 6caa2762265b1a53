"""The CPU worker's compiled loop: wait on the board, compute the owned neurons of a layer, publish.

One resident thread per core runs `serve`. The neurons that the board's owner table, and with a predicting selector its
mask, give this worker are split evenly over the threads (by `exact` twice: all gates, then the open neurons); each
thread adds into sums of its own; after a barrier each adds up a slice of all sums in fixed order, and the last to
finish publishes. With a given number of threads and a given placement the result is the same bit for bit.
"""

from typing import Any, NamedTuple

import numpy as np
from numba import carray

from warmfront.shared.kernels.atomics import address_of, clock_ns, fetch_add, floats_at, pause
from warmfront.shared.kernels.ffn import (
    Bundles,
    dense_groups,
    list_masked,
    listed_neurons,
    mark,
    open_gates,
    open_neurons,
)
from warmfront.shared.kernels.gemm import panels_of
from warmfront.shared.kernels.jit import inlined, kernel
from warmfront.shared.kernels.rows import quantise, share
from warmfront.shared.model.bundle import GROUP
from warmfront.shared.wire.board import LEAVE
from warmfront.shared.wire.handoff import DONE, announce, await_sequence, barrier

__all__ = ["BUSY_NS", "BYTES", "FIRED", "HIT", "JOBS", "MEASURED", "NEURONS", "SELECTED", "Worker", "serve"]

# Columns of Worker.load.
JOBS, BUSY_NS, NEURONS, BYTES, MEASURED, SELECTED, FIRED, HIT = range(8)
# Columns of Worker.computed: gates, and neurons whose up and down rows were needed too, of this job; open gates of all
# neurons, if the job is measured.
_GATES, _NEURONS, _OPEN = range(3)


class Worker(NamedTuple):
    """What a worker's threads share. `*_at` are addresses, the rest arrays.

    exact, predicted: the selector's way; skip: a closed gate ends a neuron; slow: how many times as long as it takes a
    job is to take (an emulation). slot, owner, mask, taken, fired, firing: tables of the board. Of the owned groups, by
    thread, [threads, groups]: owned: int32 slots, ids: int32 numbers, words: uint32 of the mask, bits: uint32 of the
    neurons that fired. listed: int32 [threads, neurons of a layer], 0, 1, 2, ... where nothing is predicted; gates,
    opened: float32, int32 [threads, neurons of a layer]; opened_count, computed: int64 [threads, 16], a cache line
    each; sums: float32 [threads, max_tokens * hidden]; load: int64 [layers, 8], sums over all single-token jobs
    (prefill is dense and says nothing about the balance of decoding), the last four over those that were measured.
    """

    me: int
    threads: int
    exact: bool
    predicted: bool
    skip: bool
    slow: float
    bundles: Bundles
    gate_row_bytes: int
    down_row_bytes: int
    slot: Any
    owner: Any
    mask: Any
    taken: Any
    fired: Any
    firing: Any
    owned: Any
    ids: Any
    words: Any
    bits: Any
    listed: Any
    gates: Any
    opened: Any
    opened_count: Any
    computed: Any
    quantised: Any
    sums: Any
    scratch: Any
    started: Any
    load: Any
    job_at: int
    abort_at: int
    order: Any
    x_at: int
    y_at: int
    done_at: int
    record: Any
    barrier_at: int
    arrivals_at: int
    job_spins: int
    barrier_spins: int


@inlined
def _owned_groups(w: Worker, member: int, layer: int, tokens: int) -> int:
    """List the groups that this worker owns in `layer`: slots, numbers, words of the mask; returns how many.

    The first thread notes on the board what is asked of a single token.
    """
    owned, ids, words, bits = w.owned[member], w.ids[member], w.words[member], w.bits[member]
    notes = member == 0 and tokens == 1
    count = 0
    for group in range(w.owner.shape[1]):
        word = np.uint32(0)
        if w.owner[layer, group] == w.me:
            word = w.mask[layer, group] if w.predicted else np.uint32(0xFFFFFFFF)
            owned[count], ids[count] = w.slot[layer, group], group
            words[count], bits[count] = word, 0
            count += 1
        if notes:
            w.taken[layer, group] = word
    return count


@inlined
def _sparse(w: Worker, member: int, neurons: int, q_at: int) -> bool:
    """One token by `exact`; returns whether it was not aborted."""
    b, slots = w.bundles, w.owned[member]
    low, high = share(neurons, 1, member, w.threads)
    w.computed[member, _GATES] = high - low
    opened = open_gates(b, slots, low, high, w.x_at, q_at, w.gates[member], w.opened[member])
    for i in range(opened):
        mark(w.bits[member], w.opened[member, i])
    w.opened_count[member, 0] = opened
    if barrier(w.barrier_at, w.threads, w.barrier_spins, w.abort_at) != DONE:
        return False
    total = 0
    for other in range(w.threads):
        total += w.opened_count[other, 0]
    low, high = share(total, 1, member, w.threads)
    w.computed[member, _NEURONS] = high - low
    first = 0
    for other in range(w.threads):
        count = w.opened_count[other, 0]
        start, end = max(low - first, 0), min(high - first, count)
        sums_at, scratch_at = address_of(w.sums[member]), address_of(w.scratch[member])
        open_neurons(b, slots, w.gates[other], w.opened[other], start, end, w.x_at, q_at, sums_at, scratch_at)
        first += count
    return True


@inlined
def _compute(w: Worker, member: int, layer: int, groups: int, tokens: int) -> bool:
    """This thread's part of the job into its sums; returns whether it was not aborted."""
    slots, sums_at, computed = w.owned[member], address_of(w.sums[member]), w.computed[member]
    if tokens > 1:
        low, high = share(groups, 1, member, w.threads)
        scratch_at = address_of(w.scratch[member])
        ids, firing = w.ids[member], w.firing[layer]
        dense_groups(w.bundles, slots, low, high, w.x_at, panels_of(tokens), sums_at, scratch_at, ids, firing)
        computed[_GATES] = computed[_NEURONS] = (high - low) * GROUP
        return True
    q_at = quantise(w.x_at, address_of(w.quantised[member]), w.bundles.hidden)
    if w.exact:
        return _sparse(w, member, groups * GROUP, q_at)
    listed = w.listed[member]
    count = list_masked(w.words[member], groups, listed) if w.predicted else groups * GROUP
    low, high = share(count, 1, member, w.threads)
    scratch_at = address_of(w.scratch[member])
    computed[_GATES] = high - low
    computed[_NEURONS] = listed_neurons(
        w.bundles, slots, listed, low, high, w.skip, w.x_at, q_at, sums_at, scratch_at, w.bits[member]
    )
    if w.order[3] != 0:
        low, high = share(groups * GROUP, 1, member, w.threads)
        computed[_OPEN] = open_gates(w.bundles, slots, low, high, w.x_at, q_at, w.gates[member], w.opened[member])
    return True


@inlined
def _note_fired(w: Worker, layer: int, groups: int) -> None:
    """Join what the threads saw fire."""
    for i in range(groups):
        word = np.uint32(0)
        for member in range(w.threads):
            word |= w.bits[member, i]
        w.fired[layer, w.ids[0, i]] = word


@inlined
def _publish(w: Worker, member: int, layer: int, groups: int, tokens: int, size: int, sequence: int) -> None:
    """Add up this thread's slice of all sums; the last thread to come announces the job done."""
    y = carray(floats_at(w.y_at), (size,))
    low, high = share(size, 16, member, w.threads)
    for other in range(w.threads):
        part = w.sums[other]
        for i in range(low, high):
            y[i] = y[i] + part[i] if other else part[i]
    if fetch_add(w.arrivals_at, 1) + 1 != w.threads * sequence:
        return
    gates, neurons, fired = 0, 0, 0
    for other in range(w.threads):
        gates += w.computed[other, _GATES]
        neurons += w.computed[other, _NEURONS]
        fired += w.computed[other, _OPEN]
    moved = (gates + neurons) * w.gate_row_bytes + neurons * w.down_row_bytes
    if tokens == 1:
        _note_fired(w, layer, groups)
    now = clock_ns()
    until = w.started[0] + (now - w.started[0]) * w.slow
    while now < until:
        pause()
        now = clock_ns()
    w.record[0], w.record[1], w.record[2], w.record[3] = w.started[0], now, neurons, moved
    if tokens == 1:
        load = w.load[layer]
        load[JOBS] += 1
        load[BUSY_NS] += now - w.order[4]
        load[NEURONS] += neurons
        load[BYTES] += moved
        if w.order[3] != 0:
            load[MEASURED] += 1
            load[SELECTED] += gates
            load[FIRED] += fired
            load[HIT] += neurons
    announce(w.done_at, sequence)


@kernel
def serve(member: int, w: Worker) -> None:
    """The resident loop of thread `member`; returns when told to leave or when the board is aborted."""
    sums = w.sums[member]
    sequence = 0
    while True:
        sequence += 1
        if await_sequence(w.job_at, sequence, w.abort_at, w.job_spins, 0) != DONE:
            return
        layer, tokens, lanes = w.order[0], w.order[1], w.order[2]
        if layer == LEAVE:
            return
        if member == 0:
            w.started[0] = clock_ns()
        size = panels_of(tokens) * w.bundles.hidden * lanes
        sums[:size] = 0
        groups = _owned_groups(w, member, layer, tokens)
        if not _compute(w, member, layer, groups, tokens):
            return
        if barrier(w.barrier_at, w.threads, w.barrier_spins, w.abort_at) != DONE:
            return
        _publish(w, member, layer, groups, tokens, size, sequence)
