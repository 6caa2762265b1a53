"""The CPU worker's compiled loop: wait on the board, compute the owned neurons of a layer, publish.

One resident thread per core runs `serve`. The neurons that the board's owner table, and with some selectors its mask,
give this worker are split over the threads, evenly but for whole groups (by `exact` twice: all gates, then the open
neurons), and each thread adds into sums of its own (`jobs.py`); after a barrier each adds up a slice of all sums, and
the last to finish publishes. The sums are exact: they do not depend on the number of threads, nor on who owns what.
"""

from typing import Any, NamedTuple

import numpy as np
from numba import carray

from warmfront.shared.kernels.atomics import clock_ns, fetch_add, longs_at, pause
from warmfront.shared.kernels.by_address.kernels import call_at
from warmfront.shared.kernels.feed_forward.branches import uses_branch
from warmfront.shared.kernels.feed_forward.bundles import Bundles
from warmfront.shared.kernels.gemm import panels_of
from warmfront.shared.kernels.jit import inlined, kernel
from warmfront.shared.kernels.prefill.notes import Notes
from warmfront.shared.kernels.prefill.routed_groups import (
    RoutedBuffers,
)
from warmfront.shared.kernels.rows import share
from warmfront.shared.model.panels import LANES
from warmfront.shared.wire.board import ANNOUNCED_NS, COMPARE_SELECTION, JOB_LANES, JOB_TOKENS, LAYER, QUIT
from warmfront.shared.wire.handoff import DONE, Barrier, announce, await_sequence, barrier

__all__ = [
    "BUSY_NS",
    "BYTES",
    "COMPARED",
    "FIRED",
    "FIRED_OF_JOB",
    "GATES_OF_JOB",
    "HIT",
    "JOBS",
    "NEURONS",
    "NEURONS_OF_JOB",
    "SELECTED",
    "Worker",
    "serve",
]

# Columns of Worker.load. The last four are of jobs that compared the selection: jobs, neurons selected, neurons that
# fire, neurons that are both.
JOBS, BUSY_NS, NEURONS, BYTES, COMPARED, SELECTED, FIRED, HIT = range(8)
# Columns of Worker.counts, of this job: gates; neurons whose up and down rows were needed too; gates of all neurons
# that fire, if the selection is compared.
GATES_OF_JOB, NEURONS_OF_JOB, FIRED_OF_JOB = range(3)


class Worker(NamedTuple):
    """What a worker's threads share. `*_at` are addresses; tables [threads, ...] have a row that each thread writes."""

    # Index on the board.
    me: int
    threads: int
    # Only the neurons of the mask; to `skip` what does not fire once its gate or up is known.
    masked: bool
    skip: bool
    # Emulation: a job is made to take so many times as long as it does.
    slow: float
    bundles: Bundles
    # A `Cache` (`cache_table.py`) where the memory is one of the packed file, else 0.
    cache: Any
    # Bytes that a gate reads, and the rest of a neuron.
    gate_bytes: int
    rest_bytes: int
    # int64 [branches + 1]: the first group of each branch.
    bounds: Any
    # Tables of the board: see `shared/wire/board.py`.
    slot: Any
    owner: Any
    mask: Any
    routing: Any
    requested: Any
    computed: Any
    # Notes of the first layer, and bytes from one layer's table to the next.
    notes: Notes
    notes_step: int
    # Of the owned groups, int32 [threads, groups]: slots, numbers, branches.
    owned: Any
    ids: Any
    branches: Any
    # float32 [threads, BATCH]: 1 / unit of each token's sums, times a branch's weight.
    factors: Any
    routed: RoutedBuffers
    # uint32 [threads, BATCH, groups]: the masks, and what was computed whole; [threads, groups]: of any token's mask.
    words: Any
    bits: Any
    wanted: Any
    # int32 [threads, neurons of a layer]: neurons to compute; 0, 1, 2, ... where there is no mask.
    listed: Any
    # float32 [threads, BATCH * neurons of a layer], int32 [threads, neurons of a layer]: gates of the neurons that fire
    # for any token, and whose they are; int64 [threads, 16]: how many.
    gates: Any
    opened: Any
    opened_count: Any
    # int64 [threads, 16], a cache line each.
    counts: Any
    # uint8 [threads, n]: the inputs quantised; int64 [threads, max_tokens * hidden], uint8 [threads, n]: see `Vectors`.
    quantised: Any
    sums: Any
    scratch: Any
    # int64 [1]: when the first thread began the job, ns; by that thread.
    started: Any
    # int64 [layers, 8]: sums over all single-token jobs, by the last thread of each; prefill is dense and says nothing
    # about the balance of decoding, and what a batch reads is not told apart by tokens.
    load: Any
    # Hand-off.
    job_at: int
    quit_at: int
    descriptor: Any
    x_at: int
    inverse_at: int
    y_at: int
    done_at: int
    # int64 [4] on the board.
    record: Any
    barrier: Barrier
    # A word: threads that finished, of all time.
    arrivals_at: int
    # The last job before the worker's first: one that replaces another joins between two jobs.
    joined: int
    job_spins: int


@inlined
def _owned_groups(w: Worker, rank: int, layer: int, tokens: int, decode: bool) -> int:
    """List the groups that this worker owns in `layer`, of the branches that are used: slots, numbers, branches; of a
    batch the words of the masks too.

    The first thread notes on the board what is asked for the tokens of a batch. Returns how many groups there are.
    """
    owned, ids, branches, wanted = w.owned[rank], w.ids[rank], w.branches[rank], w.wanted[rank]
    count = 0
    for branch in range(len(w.bounds) - 1):
        if uses_branch(w.routing, branch, tokens):
            for group in range(w.bounds[branch], w.bounds[branch + 1]):
                if w.owner[layer, group] == w.me:
                    owned[count], ids[count], branches[count] = w.slot[layer, group], group, branch
                    wanted[count] = 0
                    count += 1
    if not decode:
        return count
    for token in range(tokens):
        words = w.words[rank, token]
        for i in range(count):
            words[i] = w.mask[token, layer, ids[i]] if w.masked else np.uint32(0xFFFFFFFF)
            if branches[i] > 0 and w.routing[token, branches[i]] == 0:
                words[i] = 0
            wanted[i] |= words[i]
        w.bits[rank, token, :count] = 0
        if rank == 0:
            w.requested[token, layer, :] = 0
            for i in range(count):
                w.requested[token, layer, ids[i]] = words[i]
    return count


@inlined
def _note_computed(w: Worker, layer: int, groups: int, decoded: int) -> None:
    """Join what the threads computed."""
    for token in range(decoded):
        for i in range(groups):
            word = np.uint32(0)
            for rank in range(w.threads):
                word |= w.bits[rank, token, i]
            w.computed[token, layer, w.ids[0, i]] = word


@inlined
def _publish(w: Worker, rank: int, layer: int, groups: int, decoded: int, size: int, sequence: int) -> None:
    """Add up this thread's slice of all sums; the last thread to come announces the job done.

    `decoded`: tokens of a batch, else 0.
    """
    y = carray(longs_at(w.y_at), (size,))
    low, high = share(size, LANES, rank, rank + 1, w.threads)
    # Thread by thread, not number by number: the sums of one thread are read in one stream.
    for other in range(w.threads):
        part = w.sums[other]
        for i in range(low, high):
            y[i] = y[i] + part[i] if other else part[i]
    if fetch_add(w.arrivals_at, 1) + 1 != w.threads * (sequence - w.joined):
        return
    gates, neurons, fired = 0, 0, 0
    for other in range(w.threads):
        gates += w.counts[other, GATES_OF_JOB]
        neurons += w.counts[other, NEURONS_OF_JOB]
        fired += w.counts[other, FIRED_OF_JOB]
    read = gates * w.gate_bytes + neurons * w.rest_bytes
    _note_computed(w, layer, groups, decoded)
    now = clock_ns()
    # Emulation of a slower machine; `slow` is 1 otherwise.
    until = w.started[0] + (now - w.started[0]) * w.slow
    while now < until:
        pause()
        now = clock_ns()
    w.record[0], w.record[1], w.record[2], w.record[3] = w.started[0], now, neurons, read
    if decoded == 1:
        load = w.load[layer]
        load[JOBS] += 1
        # From the announcement on: that a thread of the worker woke late is part of what a job costs.
        load[BUSY_NS] += now - w.descriptor[ANNOUNCED_NS]
        load[NEURONS] += neurons
        load[BYTES] += read
        if w.descriptor[COMPARE_SELECTION] != 0:
            load[COMPARED] += 1
            load[SELECTED] += gates
            load[FIRED] += fired
            load[HIT] += neurons
    announce(w.done_at, sequence)


@kernel
def serve(rank: int, w: Worker, decode_at: int, prefill_at: int) -> None:
    """The resident loop of thread `rank`; returns when told to quit or when the board is aborted.

    `decode_at` and `prefill_at`: the kernels that compute a batch and a prompt's tokens, compiled apart: each adds this
    thread's part to its sums, and returns DONE or ABORTED.
    """
    sums = w.sums[rank]
    sequence = w.joined
    while True:
        sequence += 1
        if await_sequence(w.job_at, sequence, w.quit_at, w.job_spins, 0) != DONE:
            return
        layer, tokens, lanes = w.descriptor[LAYER], w.descriptor[JOB_TOKENS], w.descriptor[JOB_LANES]
        if layer == QUIT:
            return
        if rank == 0:
            w.started[0] = clock_ns()
        decode = lanes == 1
        size = (tokens if decode else panels_of(tokens) * lanes) * w.bundles.hidden
        sums[:size] = 0
        groups = _owned_groups(w, rank, layer, tokens, decode)
        if call_at(decode_at if decode else prefill_at, w, rank, layer, groups, tokens) != DONE:
            return
        if barrier(w.barrier) != DONE:
            return
        _publish(w, rank, layer, groups, tokens if decode else 0, size, sequence)
