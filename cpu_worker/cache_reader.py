"""The threads that read what a CPU worker's cache lacks: each takes a request, reads, checks, and puts it in its place.

They read past the page cache where the file system can (O_DIRECT): what the kernel kept would be memory beyond the
budget, and a second copy. Several read at a time, since a disk answers many requests nearly as fast as one. They sleep
in the kernel while they wait, and so leave the cores to those that compute.

A group is read as a whole for the first time, and checked by its checksum in the file. From then on each of its units
has a sum of its own, by which every later read is checked: a file that is changed while it is in use is never computed
with. A read that fails is tried again a few times; then, as after one that is too short or wrong, the worker gives up.
"""

from typing import Any

import numpy as np
from numba import carray

from warmfront.cpu_worker.cache_table import (
    BYTES_READ,
    READING_NS,
    REQUESTS,
    RING,
    Cache,
    unit_at,
)
from warmfront.shared.kernels.atomics import (
    bytes_at,
    clock_ns,
    fence,
    fetch_add,
    futex_wake,
    load_acquire,
    longs_at,
    read_at,
    store_release,
)
from warmfront.shared.kernels.feed_forward.bundles import arrange_group
from warmfront.shared.kernels.jit import kernel
from warmfront.shared.kernels.tiles import in_tiles, interleave
from warmfront.shared.model.bundle import GROUP
from warmfront.shared.wire.handoff import DONE, await_sequence

__all__ = ["DAMAGED", "FAILED", "TRUNCATED", "buffer_bytes", "read_requests"]

# What went wrong: a read; the file's length; its content.
FAILED, TRUNCATED, DAMAGED = 1, 2, 3
_ATTEMPTS = 4
_INTERRUPTED = -4


def buffer_bytes(group_bytes: int, alignment: int) -> int:
    """What a reader needs to read a group that begins anywhere."""
    return -(-group_bytes // alignment) * alignment + 2 * alignment


@kernel
def _read(c: Cache, offset: int, size: int, buffer: int) -> int:
    """Read bytes of the file; returns where they are, within the buffer, or minus what went wrong."""
    start = offset // c.alignment * c.alignment
    end = (offset + size + c.alignment - 1) // c.alignment * c.alignment
    at, failures = start, 0
    while at < offset + size:
        count = read_at(c.fd, buffer + at - start, end - at, at)
        if count == 0:
            return -TRUNCATED
        if count > 0:
            # What ends between two multiples is the end of the file.
            at += count if at + count >= offset + size else count // c.alignment * c.alignment
            if count < c.alignment and at < offset + size:
                return -TRUNCATED
        elif count != _INTERRUPTED:
            failures += 1
            if failures == _ATTEMPTS:
                c.failure[3] = -count
                return -FAILED
    return buffer + offset - start


@kernel
def _sum(at: int, size: int) -> Any:
    words = carray(longs_at(at), (size // 8,))
    total = np.int64(0)
    for i in range(len(words)):
        total += words[i]
    return np.uint64(total)


@kernel
def _copy(source: int, size: int, target: int) -> None:
    read, written = carray(bytes_at(source), (size,)), carray(bytes_at(target), (size,))
    for i in range(size):
        written[i] = read[i]


@kernel
def _pin(c: Cache, packed: int, layer: int, group: int) -> None:
    """Fill the pinned part of a group from the group as it is in the file."""
    at = c.at + (layer * c.held.shape[1] + group) * c.group_bytes
    b = c.bundles
    if c.apart:
        for neuron in range(GROUP):
            _copy(packed + neuron * c.bundle_bytes, b.row_bytes, at + neuron * b.row_bytes)
            if b.gate_bias != 0:
                _copy(packed + neuron * c.bundle_bytes + b.gate_bias, 4, at + c.biases_at + 4 * neuron)
        if in_tiles(b.gate_kind):
            interleave(b.gate_kind, at, GROUP, b.hidden)
    _copy(packed + c.tail_offset, c.packed_bytes - c.tail_offset, at + c.tail_at)


@kernel
def _put(c: Cache, packed: int, first: int, layer: int, group: int, units: int) -> None:
    """Put units into their places; `packed`: where unit `first` of the group is as in the file."""
    place = layer * c.held.shape[1] + group
    if c.units == 1:
        to = unit_at(c, place, 0)
        if c.apart:
            for neuron in range(GROUP):
                _copy(packed + neuron * c.bundle_bytes + c.skipped, c.step, to + neuron * c.step)
        else:
            _copy(packed, c.packed_bytes, to)
            arrange_group(c.bundles, to)
        return
    for unit in range(GROUP):
        if units & (np.int64(1) << np.int64(unit)):
            source = packed + (unit - first) * c.bundle_bytes + c.skipped
            _copy(source, c.bundle_bytes - c.skipped, unit_at(c, place, unit))


@kernel
def _serve_request(c: Cache, entry: Any, buffer: int) -> int:
    """Read what a request asks for; returns 0 or what went wrong."""
    layer, group, units, pinned = entry[0], entry[1], entry[2], entry[3]
    first, size = 0, c.packed_bytes
    whole = c.units == 1 or pinned != 0 or c.known[layer, group] == 0
    if not whole:
        while units & (np.int64(1) << np.int64(first)) == 0:
            first += 1
        last = first
        while last < GROUP and units >> np.int64(last) != 0:
            last += 1
        size = (last - first) * c.bundle_bytes
    if fetch_add(c.reading_at, 1) == 0:
        store_release(c.reading_at + 8, clock_ns())
    packed = _read(c, c.starts[layer] + group * c.packed_bytes + first * c.bundle_bytes, size, buffer)
    now = clock_ns()
    if fetch_add(c.reading_at, -1) == 1:
        fetch_add(c.counters.ctypes.data + 8 * READING_NS, now - load_acquire(c.reading_at + 8))
    if packed < 0:
        return -packed
    fetch_add(c.counters.ctypes.data + 8 * REQUESTS, 1)
    fetch_add(c.counters.ctypes.data + 8 * BYTES_READ, size)
    if whole:
        if _sum(packed, size) != c.group_sums[layer, group]:
            return DAMAGED
        if c.units > 1 and c.known[layer, group] == 0:
            for unit in range(GROUP):
                c.unit_sums[layer, group, unit] = _sum(packed + unit * c.bundle_bytes, c.bundle_bytes)
    else:
        for unit in range(first, first + size // c.bundle_bytes):
            if _sum(packed + (unit - first) * c.bundle_bytes, c.bundle_bytes) != c.unit_sums[layer, group, unit]:
                return DAMAGED
    if c.pinned_bytes > 0 and whole and (pinned != 0 or c.known[layer, group] == 0):
        _pin(c, packed, layer, group)
    _put(c, packed, first, layer, group, units)
    if whole:
        c.known[layer, group] = 1
    return 0


@kernel
def read_requests(c: Cache, reader: int) -> int:
    """The resident loop of a thread that reads; returns when told to quit, or when something went wrong."""
    buffer = c.buffers.ctypes.data + reader * c.buffers.shape[1]
    while True:
        ticket = fetch_add(c.taken_at, 1)
        if await_sequence(c.posted_at, ticket + 1, c.quit_at, 0, 0) != DONE:
            return 0
        entry = c.ring[ticket % RING]
        wrong = _serve_request(c, entry, buffer)
        if wrong != 0:
            c.failure[1], c.failure[2] = entry[0], entry[1]
            store_release(c.failure.ctypes.data, wrong)
            # Nobody is to wait for this any more.
            store_release(c.quit_at, 1)
            fence()
            futex_wake(c.done_at)
            return wrong
        fetch_add(c.arrived.ctypes.data + 8 * (entry[0] * c.held.shape[1] + entry[1]), entry[2])
        fetch_add(c.done_at, 1)
        fence()
        if load_acquire(c.done_at + 8) > 0:
            futex_wake(c.done_at)
