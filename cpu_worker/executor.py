"""The CPU worker's compiled loop: wait on the board, compute the owned neurons of a layer, publish.

One resident thread per core runs `serve`. The neurons that the board's owner table gives this worker are split
evenly over the threads; each thread adds into an accumulator of its own; after a barrier each adds up a slice of
all accumulators in fixed order, and the last to finish publishes. With a given number of threads and a given
placement the result is the same bit for bit.

    all     gate and up dot, axpy of the down row
    exact   phase 1: the gate of every neuron; barrier; phase 2: up and down of those whose gate is open, split anew

Several tokens (prefill) are computed densely, as small GEMMs over whole groups.
"""

import math
from typing import Any, NamedTuple

import numpy as np
from numba import carray

from warmfront.shared.atomics import clock_ns, fetch_add, floats_at
from warmfront.shared.board import LEAVE
from warmfront.shared.bundle import GROUP
from warmfront.shared.handoff import DONE, LINE, announce, await_sequence, barrier
from warmfront.shared.jit import kernel
from warmfront.shared.kernels import LANES, axpy, dot, multiply, panels_of, share, widen
from warmfront.shared.model import ACTIVATIONS

__all__ = ["BUSY_NS", "BYTES", "JOBS", "NEURONS", "Worker", "serve"]

_SILU, _RELU, _GELU, _GELU_TANH = range(len(ACTIVATIONS))
# Columns of Worker.load.
JOBS, BUSY_NS, NEURONS, BYTES = range(4)


class Worker(NamedTuple):
    """What a worker's threads share. `*_at` are addresses, the rest arrays.

    slot: int32 [layers, groups], the place of each group in this worker's memory or -1; owner: uint8, same shape;
    gates: float32 and open: int32 [threads, neurons of a layer], one row a thread; counts: int64 [threads, 16];
    sums: float32 [threads, max_tokens * hidden]; load: int64 [layers, 4], sums over all single-token jobs
    (prefill is dense and says nothing about the balance of decoding).
    """

    index: int
    threads: int
    hidden: int
    activation: int
    exact: bool
    weights_at: int
    bundle_bytes: int
    up_offset: int
    down_offset: int
    gate_kind: int
    down_kind: int
    gate_row_bytes: int
    down_row_bytes: int
    slot: Any
    owner: Any
    owned: Any
    gates: Any
    open: Any
    counts: Any
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
def activate(code, value):  # type: ignore[no-untyped-def]
    """The activation function of ACTIVATIONS[code]."""
    if code == _RELU:
        return max(value, np.float32(0))
    if code == _SILU:
        return value / (np.float32(1) + np.float32(math.exp(-value)))
    if code == _GELU:
        return np.float32(0.5) * value * (np.float32(1) + np.float32(math.erf(value * np.float32(0.7071067811865476))))
    inner = np.float32(0.7978845608028654) * (value + np.float32(0.044715) * value * value * value)
    return np.float32(0.5) * value * (np.float32(1) + np.float32(math.tanh(inner)))


@kernel
def _owned_groups(w, member, layer):  # type: ignore[no-untyped-def]
    """List the slots of the groups this worker owns in `layer`; returns their number."""
    owned = w.owned[member]
    count = 0
    for group in range(w.owner.shape[1]):
        if w.owner[layer, group] == w.index:
            owned[count] = w.slot[layer, group]
            count += 1
    return count


@kernel
def _bundle(w, owned, neuron):  # type: ignore[no-untyped-def]
    """Address of the bundle of the `neuron`-th owned neuron of the layer."""
    return w.weights_at + (np.int64(owned[neuron // GROUP]) * GROUP + neuron % GROUP) * w.bundle_bytes


@kernel
def _dense(w, member, groups, sums_at):  # type: ignore[no-untyped-def]
    """One token, every owned neuron."""
    owned = w.owned[member]
    low, high = share(groups * GROUP, 1, member, w.threads)
    for neuron in range(low, high):
        at = _bundle(w, owned, neuron)
        gate = dot(w.gate_kind, at, w.x_at, w.hidden)
        up = dot(w.gate_kind, at + w.up_offset, w.x_at, w.hidden)
        axpy(w.down_kind, activate(w.activation, gate) * up, at + w.down_offset, sums_at, w.hidden)
    return high - low


@kernel
def _gates(w, member, groups):  # type: ignore[no-untyped-def]
    """Phase 1 of exact: list this thread's neurons with an open gate."""
    owned, gates, open_ = w.owned[member], w.gates[member], w.open[member]
    low, high = share(groups * GROUP, 1, member, w.threads)
    count = 0
    for neuron in range(low, high):
        gate = dot(w.gate_kind, _bundle(w, owned, neuron), w.x_at, w.hidden)
        if gate > 0:
            gates[count] = gate
            open_[count] = neuron
            count += 1
    w.counts[member, 0] = count


@kernel
def _open_neurons(w, member, sums_at):  # type: ignore[no-untyped-def]
    """Phase 2 of exact: this thread's share of all open neurons of the team."""
    owned = w.owned[member]
    total = 0
    for other in range(w.threads):
        total += w.counts[other, 0]
    low, high = share(total, 1, member, w.threads)
    first = 0
    for other in range(w.threads):
        count = w.counts[other, 0]
        for i in range(max(low - first, 0), min(high - first, count)):
            at = _bundle(w, owned, w.open[other, i])
            up = dot(w.gate_kind, at + w.up_offset, w.x_at, w.hidden)
            factor = activate(w.activation, w.gates[other, i]) * up
            axpy(w.down_kind, factor, at + w.down_offset, sums_at, w.hidden)
        first += count
    return high - low


@kernel
def _prefill(w, member, groups, panels, sums_at):  # type: ignore[no-untyped-def]
    """Several tokens, every owned neuron: gate and up as GEMM by 8 rows, down by whole groups."""
    owned, hidden = w.owned[member], w.hidden
    low, high = share(groups, 1, member, w.threads)
    scratch_at = w.scratch[member].ctypes.data
    # scratch: a group's rows [32, hidden], then gate and up [panels, 32, lanes].
    gate_at = scratch_at + GROUP * hidden * 4
    size = panels * GROUP * LANES
    gate, up = carray(floats_at(gate_at), (size,)), carray(floats_at(gate_at + 4 * size), (size,))
    panel_bytes, wide_bytes = hidden * LANES * 4, GROUP * LANES * 4
    for group in range(low, high):
        base = w.weights_at + np.int64(owned[group]) * GROUP * w.bundle_bytes
        for part in range(2):
            for row in range(0, GROUP, 8):
                for i in range(8):
                    at = base + (row + i) * w.bundle_bytes + part * w.up_offset
                    widen(w.gate_kind, at, scratch_at + i * hidden * 4, hidden)
                out_at = gate_at + part * 4 * size + row * LANES * 4
                multiply(scratch_at, hidden * 4, 4, hidden, w.x_at, panel_bytes, out_at, wide_bytes, panels, 0)
        for i in range(size):
            gate[i] = activate(w.activation, gate[i]) * up[i]
        for row in range(GROUP):
            widen(w.down_kind, base + row * w.bundle_bytes + w.down_offset, scratch_at + row * hidden * 4, hidden)
        for column in range(0, hidden, 8):
            out_at = sums_at + column * LANES * 4
            multiply(
                scratch_at + column * 4, 4, hidden * 4, GROUP, gate_at, wide_bytes, out_at, panel_bytes, panels, 1
            )
    return (high - low) * GROUP


@kernel
def _publish(w, member, layer, tokens, size, sequence):  # type: ignore[no-untyped-def]
    """Add up this thread's slice of all accumulators; the last thread to come announces the job done."""
    y = carray(floats_at(w.y_at), (size,))
    low, high = share(size, 16, member, w.threads)
    y[low:high] = w.sums[0, low:high]
    for other in range(1, w.threads):
        part = w.sums[other]
        for i in range(low, high):
            y[i] += part[i]
    if fetch_add(w.arrivals_at, 1) + 1 != w.threads * sequence:
        return
    neurons, opened = 0, 0
    for other in range(w.threads):
        neurons += w.counts[other, 1]
        opened += w.counts[other, 2]
    now = clock_ns()
    moved = neurons * w.gate_row_bytes + opened * (w.gate_row_bytes + w.down_row_bytes)
    w.record[0], w.record[1], w.record[2], w.record[3] = w.started[0], now, opened, moved
    if tokens == 1:
        w.load[layer, JOBS] += 1
        w.load[layer, BUSY_NS] += now - w.started[0]
        w.load[layer, NEURONS] += opened
        w.load[layer, BYTES] += moved
    announce(w.done_at, sequence)


@kernel
def serve(member, w):  # type: ignore[no-untyped-def]
    """The resident loop of thread `member`; returns when told to leave or when the board is aborted."""
    sums = w.sums[member]
    sums_at = sums.ctypes.data
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
        panels = panels_of(tokens)
        size = panels * w.hidden * lanes
        groups = _owned_groups(w, member, layer)
        sums[:size] = 0
        low, high = share(groups * GROUP, 1, member, w.threads)
        w.counts[member, 1] = high - low
        if lanes > 1:
            w.counts[member, 2] = _prefill(w, member, groups, panels, sums_at)
        elif w.exact:
            _gates(w, member, groups)
            if barrier(w.barrier_at, w.threads, w.barrier_spins, w.abort_at) != DONE:
                return
            w.counts[member, 2] = _open_neurons(w, member, sums_at)
        else:
            w.counts[member, 2] = _dense(w, member, groups, sums_at)
        if barrier(w.barrier_at, w.threads, w.barrier_spins, w.abort_at) != DONE:
            return
        _publish(w, member, layer, tokens, size, sequence)
