"""What a thread of a CPU worker computes of a job: a batch by what its tokens want, or a prompt's tokens.

`executor.serve` calls one of these by address, which `worker.py` chooses. Each adds this thread's part to its sums, and
returns DONE or ABORTED.

Of a batch, the neurons that any of its tokens wants are shared out together (`feed_forward/ffn.py`). With experts
(`shared/model/branches.py`) that is only groups of the branches that some token uses; a branch's weight is multiplied
into the unit of the token's sums, so that every kernel computes experts as it does any other neurons.
"""

import numpy as np

from warmfront.cpu_worker.executor import FIRED_OF_JOB, GATES_OF_JOB, NEURONS_OF_JOB, Worker
from warmfront.shared.kernels.atomics import address_of
from warmfront.shared.kernels.byte_dot import quantise_batch
from warmfront.shared.kernels.feed_forward.branches import branch_end, listed_end, users_groups, weighed
from warmfront.shared.kernels.feed_forward.bundles import Vectors
from warmfront.shared.kernels.feed_forward.ffn import (
    Batch,
    Selection,
    listed_neurons,
    open_gates,
    open_neurons,
    open_ups,
)
from warmfront.shared.kernels.feed_forward.neuron_lists import group_start, list_masked
from warmfront.shared.kernels.jit import inlined, kernel
from warmfront.shared.kernels.prefill.dense_groups import add_dense_groups
from warmfront.shared.kernels.prefill.notes import NO_NOTES, Notes
from warmfront.shared.kernels.prefill.routed_groups import Routed, buffers_of, cut_by_tokens, list_users, routed_groups
from warmfront.shared.kernels.rows import share
from warmfront.shared.model.bundle import GROUP
from warmfront.shared.wire.board import COMPARE_SELECTION
from warmfront.shared.wire.handoff import DONE, barrier

__all__ = [
    "batch_of",
    "compute_listed",
    "decode_gates",
    "decode_listed",
    "decode_tiles",
    "find_open",
    "notes_of",
    "prefill_dense",
    "prefill_routed",
    "vectors_of",
]


@inlined
def batch_of(w: Worker, rank: int, tokens: int) -> Batch:
    """The batch of the job: this thread's copy of its inputs, quantised, and its sums."""
    hidden = w.bundles.hidden
    quantised_at, row = quantise_batch(w.x_at, address_of(w.quantised[rank]), hidden, tokens)
    sums_at, scratch_at = address_of(w.sums[rank]), address_of(w.scratch[rank])
    return Batch(tokens, w.x_at, quantised_at, row, w.inverse_at, sums_at, scratch_at)


@kernel
def find_open(w: Worker, rank: int, groups: int, batch: Batch) -> int:
    """List the neurons that fire, of this thread's share of the groups, and wait for the others to do so.

    Returns DONE or ABORTED.
    """
    words = w.words[rank]
    low, high = share(groups, 1, rank, rank + 1, w.threads)
    users = 0
    for token in range(batch.tokens):
        for i in range(low, high):
            users += words[token, i] != 0
    w.counts[rank, GATES_OF_JOB] = users * GROUP
    opened = open_gates(w.bundles, w.owned[rank], low, high, batch, words, w.gates[rank], w.opened[rank])
    w.opened_count[rank, 0] = opened
    return int(barrier(w.barrier))


@kernel
def decode_gates(w: Worker, rank: int, layer: int, groups: int, tokens: int) -> int:
    """A batch by `exact`.

    The neurons that fire are counted over the threads before they are shared out: each thread would find more or fewer.
    """
    b, slots, branches = w.bundles, w.owned[rank], w.branches[rank]
    batch = batch_of(w, rank, tokens)
    result = find_open(w, rank, groups, batch)
    if result != DONE:
        return result
    total = 0
    for other in range(w.threads):
        total += w.opened_count[other, 0]
    low, high = share(total, 1, rank, rank + 1, w.threads)
    first, done = 0, 0
    for other in range(w.threads):
        opened, count = w.opened[other], w.opened_count[other, 0]
        start = group_start(opened, count, min(max(low - first, 0), count))
        end = group_start(opened, count, min(max(high - first, 0), count))
        while start < end:
            last = listed_end(branches, opened, start, end)
            own = weighed(batch, w.routing, branches[opened[start] // GROUP], w.factors[rank])
            done += open_neurons(b, slots, w.gates[other], opened, start, last, own, w.bits[rank])
            start = last
        first += count
    w.counts[rank, NEURONS_OF_JOB] = done
    return DONE


@kernel
def decode_tiles(w: Worker, rank: int, layer: int, groups: int, tokens: int) -> int:
    """A batch whose tokens want all neurons of the groups, in tiles."""
    slots, branches, counts = w.owned[rank], w.branches[rank], w.counts[rank]
    batch = batch_of(w, rank, tokens)
    low, high = share(groups, 1, rank, rank + 1, w.threads)
    done = 0
    while low < high:
        end = branch_end(branches, low, high)
        own = weighed(batch, w.routing, branches[low], w.factors[rank])
        done += users_groups(w.bundles, slots, low, end, own, w.words[rank], w.bits[rank])
        low = end
    counts[GATES_OF_JOB] = counts[NEURONS_OF_JOB] = done * GROUP
    return DONE


@kernel
def compute_listed(w: Worker, rank: int, low: int, high: int, batch: Batch) -> int:
    """Entries low..high of this thread's list, by branches; returns how many needed more than their gates."""
    branches, listed, done = w.branches[rank], w.listed[rank], 0
    selection = Selection(w.words[rank], w.skip, w.bits[rank])
    while low < high:
        end = listed_end(branches, listed, low, high)
        own = weighed(batch, w.routing, branches[listed[low] // GROUP], w.factors[rank])
        done += listed_neurons(w.bundles, w.owned[rank], listed, low, end, selection, own)
        low = end
    return done


@kernel
def decode_listed(w: Worker, rank: int, layer: int, groups: int, tokens: int) -> int:
    """A batch whose tokens want the neurons of the mask, or all in bundles."""
    slots, counts, listed = w.owned[rank], w.counts[rank], w.listed[rank]
    batch = batch_of(w, rank, tokens)
    count = list_masked(w.wanted[rank], groups, listed) if w.masked else groups * GROUP
    low, high = share(count, 1, rank, rank + 1, w.threads)
    low, high = group_start(listed, count, low), group_start(listed, count, high)
    counts[GATES_OF_JOB] = high - low
    counts[NEURONS_OF_JOB] = compute_listed(w, rank, low, high, batch)
    if w.descriptor[COMPARE_SELECTION] != 0:
        low, high = share(groups, 1, rank, rank + 1, w.threads)
        every = np.full((1, groups), 0xFFFFFFFF, np.uint32)
        opened = open_gates(w.bundles, slots, low, high, batch, every, w.gates[rank], w.opened[rank])
        counts[FIRED_OF_JOB] = open_ups(w.bundles, slots, w.opened[rank], opened, batch)
    return DONE


@inlined
def vectors_of(w: Worker, rank: int) -> Vectors:
    """What a prompt's job reads and what thread `rank` writes."""
    return Vectors(w.x_at, w.inverse_at, address_of(w.sums[rank]), address_of(w.scratch[rank]))


@inlined
def notes_of(w: Worker, layer: int) -> Notes:
    """Where a layer's neurons are noted."""
    return Notes(w.notes.by, w.notes.at + layer * w.notes_step, w.notes.width)


@kernel
def prefill_dense(w: Worker, rank: int, layer: int, groups: int, tokens: int) -> int:
    """A prompt's tokens, which all use all groups."""
    low, high = share(groups, 1, rank, rank + 1, w.threads)
    add_dense_groups(w.bundles, w.owned[rank], low, high, vectors_of(w, rank), tokens, w.ids[rank], notes_of(w, layer))
    w.counts[rank, GATES_OF_JOB] = w.counts[rank, NEURONS_OF_JOB] = (high - low) * GROUP
    return DONE


@kernel
def prefill_routed(w: Worker, rank: int, layer: int, groups: int, tokens: int) -> int:
    """A prompt's tokens, of which each uses some experts."""
    job = Routed(tokens, w.routing, w.branches[rank], buffers_of(w.routed, rank))
    list_users(w.routing, tokens, job.buffers)
    low = cut_by_tokens(job, groups, rank, w.threads)
    high = cut_by_tokens(job, groups, rank + 1, w.threads)
    routed_groups(w.bundles, w.owned[rank], low, high, vectors_of(w, rank), job, w.ids[rank], NO_NOTES)
    w.counts[rank, GATES_OF_JOB] = w.counts[rank, NEURONS_OF_JOB] = (high - low) * GROUP
    return DONE
