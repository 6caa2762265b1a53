"""Jobs of a CPU worker whose memory is a cache of the packed file: those of `jobs.py`, in two parts each.

    plan     the first thread: what of the wanted neurons is held, what is missing; that is asked for
    present  all threads: the groups whose wanted neurons are all there
    late     all threads: the others, one after the other, each as soon as it has arrived

A group is computed as a whole in either part, since the floats of its neurons are added up before they are rounded to
the exact sums; in which order groups come changes no bit. A prompt's tokens use all neurons: groups are read some at a
time, the next while those before are computed, and what the cache did not hold before is dropped again.
"""

from typing import Any

import numpy as np

from warmfront.cpu_worker.cache_table import (
    HEAD,
    LATE,
    STALL_NS,
    Cache,
    admit_units,
    all_held,
    begin_job,
    post,
    publish_requests,
    touch_units,
    unit_at,
)
from warmfront.cpu_worker.executor import GATES_OF_JOB, NEURONS_OF_JOB, Worker
from warmfront.cpu_worker.jobs import batch_of, compute_listed, find_open, notes_of, vectors_of
from warmfront.shared.kernels.atomics import clock_ns, drop_pages, fetch_add, load_acquire, store_release
from warmfront.shared.kernels.feed_forward.branches import users_groups, weighed
from warmfront.shared.kernels.feed_forward.ffn import Batch, open_neurons
from warmfront.shared.kernels.feed_forward.neuron_lists import group_start, list_masked
from warmfront.shared.kernels.jit import kernel
from warmfront.shared.kernels.prefill.dense_groups import add_dense_groups
from warmfront.shared.kernels.prefill.notes import NO_NOTES
from warmfront.shared.kernels.prefill.routed_groups import Routed, buffers_of, list_users, routed_groups
from warmfront.shared.kernels.rows import share
from warmfront.shared.model.bundle import GROUP
from warmfront.shared.wire.handoff import ABORTED, DONE, await_sequence, barrier

__all__ = ["cached_dense", "cached_gates", "cached_listed", "cached_routed", "cached_tiles"]


@kernel
def _units_of(c: Cache, neurons: Any) -> int:
    """The units of the wanted neurons of a group."""
    if c.units == 1:
        return 1 if neurons != 0 else 0
    return int(neurons)


@kernel
def _plan(c: Cache, layer: int, ids: Any, wanted: Any, groups: int) -> None:
    """Find out which of the wanted neurons, uint32 [groups], are there, and ask for the others.

    `present` gets the words of the groups of which all are there, else 0; `late` the other groups.
    """
    begin_job(c, layer)
    late = 0
    for i in range(groups):
        units = _units_of(c, wanted[i])
        touch_units(c, layer, ids[i], units)
        if all_held(c, layer, ids[i], units):
            c.present[i] = wanted[i]
        else:
            c.present[i] = 0
            c.late[late] = i
            late += 1
    for k in range(late):
        i = c.late[k]
        admit_units(c, layer, ids[i], _units_of(c, wanted[i]))
    publish_requests(c)
    if c.waits:
        await_sequence(c.done_at, c.state[HEAD], c.quit_at, 0, 0)
    c.state[LATE] = late
    store_release(c.late_taken_at, 0)


@kernel
def _await_units(c: Cache, rank: int, layer: int, group: int, units: int) -> int:
    """Wait until all of `units` have been read. Returns DONE or ABORTED."""
    if all_held(c, layer, group, units):
        return DONE
    began = clock_ns()
    while True:
        seen = load_acquire(c.done_at)
        if all_held(c, layer, group, units):
            if rank == 0:
                c.counters[STALL_NS] += clock_ns() - began
            return DONE
        result = await_sequence(c.done_at, seen + 1, c.quit_at, 0, 0)
        if result != DONE:
            return result


@kernel
def _next_late(c: Cache, rank: int, layer: int, ids: Any, wanted: Any) -> int:
    """A late group that no other thread has taken, once it is there; -1 if there is none, -2 if all is to end."""
    taken = fetch_add(c.late_taken_at, 1)
    if taken >= c.state[LATE]:
        return -1
    i = c.late[taken]
    return int(i) if _await_units(c, rank, layer, ids[i], _units_of(c, wanted[i])) == DONE else -2


@kernel
def _list_group(word: Any, i: int, listed: Any) -> int:
    """List the wanted neurons of group i of a list."""
    count = 0
    for neuron in range(GROUP):
        if word & (np.uint32(1) << np.uint32(neuron)):
            listed[count] = i * GROUP + neuron
            count += 1
    return count


@kernel
def cached_listed(w: Worker, rank: int, layer: int, groups: int, tokens: int) -> int:
    """`jobs.decode_listed`; the selection is not compared, for which all gates were to be read."""
    c, counts, listed = w.cache, w.counts[rank], w.listed[rank]
    if rank == 0:
        _plan(c, layer, w.ids[0], w.wanted[0], groups)
    batch = batch_of(w, rank, tokens)
    result = barrier(w.barrier)
    if result != DONE:
        return result
    count = list_masked(c.present, groups, listed)
    low, high = share(count, 1, rank, rank + 1, w.threads)
    low, high = group_start(listed, count, low), group_start(listed, count, high)
    counts[GATES_OF_JOB] = high - low
    counts[NEURONS_OF_JOB] = compute_listed(w, rank, low, high, batch)
    while True:
        i = _next_late(c, rank, layer, w.ids[rank], w.wanted[rank])
        if i < 0:
            return DONE if i == -1 else ABORTED
        count = _list_group(w.wanted[rank, i], i, listed)
        counts[GATES_OF_JOB] += count
        counts[NEURONS_OF_JOB] += compute_listed(w, rank, 0, count, batch)


@kernel
def cached_tiles(w: Worker, rank: int, layer: int, groups: int, tokens: int) -> int:
    """`jobs.decode_tiles`."""
    c, counts, branches = w.cache, w.counts[rank], w.branches[rank]
    if rank == 0:
        _plan(c, layer, w.ids[0], w.wanted[0], groups)
    batch = batch_of(w, rank, tokens)
    result = barrier(w.barrier)
    if result != DONE:
        return result
    low, high = share(groups, 1, rank, rank + 1, w.threads)
    done = 0
    for i in range(low, high):
        if c.present[i] != 0:
            own = weighed(batch, w.routing, branches[i], w.factors[rank])
            done += users_groups(w.bundles, w.owned[rank], i, i + 1, own, w.words[rank], w.bits[rank])
    while True:
        i = _next_late(c, rank, layer, w.ids[rank], w.wanted[rank])
        if i < 0:
            counts[GATES_OF_JOB] = counts[NEURONS_OF_JOB] = done * GROUP
            return DONE if i == -1 else ABORTED
        own = weighed(batch, w.routing, branches[i], w.factors[rank])
        done += users_groups(w.bundles, w.owned[rank], i, i + 1, own, w.words[rank], w.bits[rank])


@kernel
def _opened(w: Worker, rank: int, other: int, start: int, end: int, batch: Batch) -> int:
    """Entries start..end, of one branch, of the list of open gates of thread `other`."""
    opened = w.opened[other]
    own = weighed(batch, w.routing, w.branches[rank, opened[start] // GROUP], w.factors[rank])
    return int(open_neurons(w.bundles, w.owned[rank], w.gates[other], opened, start, end, own, w.bits[rank]))


@kernel
def cached_gates(w: Worker, rank: int, layer: int, groups: int, tokens: int) -> int:
    """`jobs.decode_gates`: the gates are pinned, what they open may be late."""
    c = w.cache
    batch = batch_of(w, rank, tokens)
    result = find_open(w, rank, groups, batch)
    if result != DONE:
        return result
    if rank == 0:
        wanted = w.wanted[0]
        wanted[:groups] = 0
        for other in range(w.threads):
            for k in range(w.opened_count[other, 0]):
                neuron = w.opened[other, k]
                wanted[neuron // GROUP] |= np.uint32(1) << np.uint32(neuron % GROUP)
        _plan(c, layer, w.ids[0], wanted, groups)
    result = barrier(w.barrier)
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
            last = start
            while last < end and opened[last] // GROUP == opened[start] // GROUP:
                last += 1
            if c.present[opened[start] // GROUP] != 0:
                done += _opened(w, rank, other, start, last, batch)
            start = last
        first += count
    while True:
        i = _next_late(c, rank, layer, w.ids[rank], w.wanted[0])
        if i < 0:
            w.counts[rank, NEURONS_OF_JOB] = done
            return DONE if i == -1 else ABORTED
        # A group's gates are all of one thread.
        other = 0
        while share(groups, 1, other, other + 1, w.threads)[1] <= i:
            other += 1
        opened, count = w.opened[other], w.opened_count[other, 0]
        start = int(np.searchsorted(opened[:count], np.int32(i * GROUP)))
        last = start
        while last < count and opened[last] // GROUP == i:
            last += 1
        done += _opened(w, rank, other, start, last, batch)


@kernel
def _stage(c: Cache, layer: int, ids: Any, low: int, high: int) -> None:
    """Ask for all of some groups that the cache does not hold."""
    every = (np.int64(1) << np.int64(c.units)) - 1
    for i in range(low, high):
        missing = every & ~np.int64(c.held[layer, ids[i]])
        if missing != 0:
            post(c, layer, ids[i], int(missing), 0)
    publish_requests(c)


@kernel
def _unstage(c: Cache, layer: int, ids: Any, low: int, high: int) -> None:
    """Drop what the cache does not hold."""
    groups = c.held.shape[1]
    for i in range(low, high):
        place = layer * groups + ids[i]
        spare = c.arrived[layer, ids[i]] & ~np.int64(c.held[layer, ids[i]])
        unit = 0
        while unit < c.units:
            end = unit
            while end < c.units and spare & (np.int64(1) << np.int64(end)):
                end += 1
            if end > unit:
                drop_pages(unit_at(c, place, unit), (end - unit) * c.unit_bytes)
            unit = end + 1
        fetch_add(c.arrived.ctypes.data + 8 * place, -spare)


@kernel
def _await_chunk(c: Cache, w: Worker, rank: int, layer: int, start: int, groups: int) -> tuple[int, int, int]:
    """Ask for the groups behind those from `start` on, and wait for this thread's share of these: its first and last
    group, and DONE or ABORTED."""
    ids, every = w.ids[rank], (np.int64(1) << np.int64(c.units)) - 1
    end = min(start + c.chunk, groups)
    if rank == 0:
        if start == 0:
            begin_job(c, -1)
            _stage(c, layer, ids, 0, end)
        _stage(c, layer, ids, end, min(end + c.chunk, groups))
    # What goes as the job begins is not to be taken for there.
    if start == 0 and barrier(w.barrier) != DONE:
        return 0, 0, ABORTED
    low, high = share(end - start, 1, rank, rank + 1, w.threads)
    for i in range(start + low, start + high):
        if _await_units(c, rank, layer, ids[i], int(every)) != DONE:
            return 0, 0, ABORTED
    return start + low, start + high, DONE


@kernel
def _end_chunk(c: Cache, w: Worker, rank: int, layer: int, start: int, groups: int) -> int:
    """Wait for the other threads and drop what is not to be kept. Returns DONE or ABORTED."""
    result = barrier(w.barrier)
    if result == DONE and rank == 0:
        _unstage(c, layer, w.ids[0], start, min(start + c.chunk, groups))
    return result


@kernel
def cached_dense(w: Worker, rank: int, layer: int, groups: int, tokens: int) -> int:
    """`jobs.prefill_dense`."""
    c, done = w.cache, 0
    for start in range(0, groups, c.chunk):
        low, high, result = _await_chunk(c, w, rank, layer, start, groups)
        if result == DONE:
            add_dense_groups(
                w.bundles, w.owned[rank], low, high, vectors_of(w, rank), tokens, w.ids[rank], notes_of(w, layer)
            )
            result = _end_chunk(c, w, rank, layer, start, groups)
        if result != DONE:
            return result
        done += high - low
    w.counts[rank, GATES_OF_JOB] = w.counts[rank, NEURONS_OF_JOB] = done * GROUP
    return DONE


@kernel
def cached_routed(w: Worker, rank: int, layer: int, groups: int, tokens: int) -> int:
    """`jobs.prefill_routed`."""
    c, done = w.cache, 0
    job = Routed(tokens, w.routing, w.branches[rank], buffers_of(w.routed, rank))
    list_users(w.routing, tokens, job.buffers)
    for start in range(0, groups, c.chunk):
        low, high, result = _await_chunk(c, w, rank, layer, start, groups)
        if result == DONE:
            routed_groups(w.bundles, w.owned[rank], low, high, vectors_of(w, rank), job, w.ids[rank], NO_NOTES)
            result = _end_chunk(c, w, rank, layer, start, groups)
        if result != DONE:
            return result
        done += high - low
    w.counts[rank, GATES_OF_JOB] = w.counts[rank, NEURONS_OF_JOB] = done * GROUP
    return DONE
