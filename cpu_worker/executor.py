"""The CPU worker's compiled loop: wait on the board, compute the owned neurons of a layer, publish.

One resident thread per core runs `serve`. The neurons that the board's owner table gives this worker are split
evenly over the threads (by `exact` twice: all gates, then the open neurons); each thread adds into sums of its own;
after a barrier each adds up a slice of all sums in fixed order, and the last to finish publishes. With a given number
of threads and a given placement the result is the same bit for bit.
"""

from typing import Any, NamedTuple

from numba import carray

from warmfront.shared.atomics import clock_ns, fetch_add, floats_at
from warmfront.shared.board import LEAVE
from warmfront.shared.bundle import GROUP
from warmfront.shared.ffn import Bundles, dense, dense_groups, open_gates, open_neurons
from warmfront.shared.gemm import panels_of
from warmfront.shared.handoff import DONE, announce, await_sequence, barrier
from warmfront.shared.jit import kernel
from warmfront.shared.kernels import quantise, share

__all__ = ["BUSY_NS", "BYTES", "JOBS", "NEURONS", "Worker", "serve"]

# Columns of Worker.load.
JOBS, BUSY_NS, NEURONS, BYTES = range(4)


class Worker(NamedTuple):
    """What a worker's threads share. `*_at` are addresses, the rest arrays.

    slot: int32 [layers, groups], the place of each group in this worker's memory or -1; owner: uint8, same shape;
    owned: int32 [threads, groups]; gates, opened: float32, int32 [threads, neurons of a layer]; opened_count,
    computed: int64 [threads, 16], a cache line each; sums: float32 [threads, max_tokens * hidden]; load: int64
    [layers, 4], sums over all single-token jobs (prefill is dense and says nothing about the balance of decoding).
    """

    me: int
    threads: int
    exact: bool
    bundles: Bundles
    gate_row_bytes: int
    down_row_bytes: int
    slot: Any
    owner: Any
    owned: Any
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


@kernel
def _owned_groups(w: Worker, member: int, layer: int) -> int:
    """List the slots of the groups this worker owns in `layer`; returns their number."""
    owned = w.owned[member]
    count = 0
    for group in range(w.owner.shape[1]):
        if w.owner[layer, group] == w.me:
            owned[count] = w.slot[layer, group]
            count += 1
    return count


@kernel
def _sparse(w: Worker, member: int, neurons: int, q_at: int) -> int:
    """One token by `exact`; returns how many neurons this thread computed, or -1 if aborted."""
    b, slots = w.bundles, w.owned[member]
    low, high = share(neurons, 1, member, w.threads)
    w.opened_count[member, 0] = open_gates(b, slots, low, high, w.x_at, q_at, w.gates[member], w.opened[member])
    if barrier(w.barrier_at, w.threads, w.barrier_spins, w.abort_at) != DONE:
        return -1
    total = 0
    for other in range(w.threads):
        total += w.opened_count[other, 0]
    low, high = share(total, 1, member, w.threads)
    first = 0
    for other in range(w.threads):
        count = w.opened_count[other, 0]
        start, end = max(low - first, 0), min(high - first, count)
        sums_at, scratch_at = w.sums[member].ctypes.data, w.scratch[member].ctypes.data
        open_neurons(b, slots, w.gates[other], w.opened[other], start, end, w.x_at, q_at, sums_at, scratch_at)
        first += count
    return high - low


@kernel
def _compute(w: Worker, member: int, groups: int, tokens: int) -> int:
    """This thread's part of the job into its sums; returns how many neurons it computed, or -1 if aborted."""
    slots, sums_at = w.owned[member], w.sums[member].ctypes.data
    if tokens > 1:
        low, high = share(groups, 1, member, w.threads)
        scratch_at = w.scratch[member].ctypes.data
        dense_groups(w.bundles, slots, low, high, w.x_at, panels_of(tokens), sums_at, scratch_at)
        return (high - low) * GROUP
    q_at = quantise(w.x_at, w.quantised[member].ctypes.data, w.bundles.hidden)
    if w.exact:
        return _sparse(w, member, groups * GROUP, q_at)
    low, high = share(groups * GROUP, 1, member, w.threads)
    dense(w.bundles, slots, low, high, w.x_at, q_at, sums_at, w.scratch[member].ctypes.data)
    return high - low


@kernel
def _publish(w: Worker, member: int, layer: int, groups: int, tokens: int, size: int, sequence: int) -> None:
    """Add up this thread's slice of all sums; the last thread to come announces the job done."""
    y = carray(floats_at(w.y_at), (size,))
    low, high = share(size, 16, member, w.threads)
    y[low:high] = w.sums[0, low:high]
    for other in range(1, w.threads):
        part = w.sums[other]
        for i in range(low, high):
            y[i] += part[i]
    if fetch_add(w.arrivals_at, 1) + 1 != w.threads * sequence:
        return
    neurons = 0
    for other in range(w.threads):
        neurons += w.computed[other, 0]
    gates = groups * GROUP if w.exact and tokens == 1 else neurons
    moved = (gates + neurons) * w.gate_row_bytes + neurons * w.down_row_bytes
    now = clock_ns()
    w.record[0], w.record[1], w.record[2], w.record[3] = w.started[0], now, neurons, moved
    if tokens == 1:
        w.load[layer, JOBS] += 1
        w.load[layer, BUSY_NS] += now - w.started[0]
        w.load[layer, NEURONS] += neurons
        w.load[layer, BYTES] += moved
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
        groups = _owned_groups(w, member, layer)
        computed = _compute(w, member, groups, tokens)
        w.computed[member, 0] = computed
        if computed < 0 or barrier(w.barrier_at, w.threads, w.barrier_spins, w.abort_at) != DONE:
            return
        _publish(w, member, layer, groups, tokens, size, sequence)
