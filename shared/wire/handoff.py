"""How one thread waits for another, in and across processes.

A *line* is 128 bytes of shared memory that start with five words:

    +0   sequence  only grows; written by one side with a release-store
    +8   sleepers  number of threads asleep in the kernel on the sequence
    +16  crowded   monotonic time until which waiters sleep at once
    +24  slice     monotonic time of the last long turn of a neighbour
    +32  period    ns for which the line was last crowded

`announce(line, n)` publishes everything written before as sequence n. `await_sequence(line, n, ...)` returns once
the sequence has reached n. A waiter spins for `spins` rounds (only sensible when the other side runs on a core of
its own), then yields its core for at most `PATIENCE_NS` (a hand-over by yield costs 2.3 us against 40 us through a
futex, and a yielding waiter costs a busy neighbour nothing), then sleeps in the kernel: nothing idle burns a core.

A yield that takes long has met another program's thread, which keeps the core for its whole slice each time (one such
neighbour: 5 instead of 110 tok/s). The scheduler lets a sleeper run as soon as it is woken; so after two such turns in
short succession (one may be the hypervisor's) the line is marked crowded. To find out whether it still is costs a
slice: each time that it is, it stays marked for twice as long.

Every wait also watches the abort word of its region: the supervisor sets it when a process has died.
"""

from typing import NamedTuple

import numpy as np

from warmfront.shared.kernels.atomics import (
    address_of,
    clock_ns,
    fence,
    fetch_add,
    futex_wait,
    futex_wake,
    load_acquire,
    pause,
    store_release,
    yield_core,
)
from warmfront.shared.kernels.jit import apart, kernel

__all__ = [
    "ABORTED",
    "BARRIER_SPINS",
    "DONE",
    "HANDOFF_SPINS",
    "LATE",
    "LINE",
    "Barrier",
    "announce",
    "await_sequence",
    "barrier",
    "passed",
    "wake",
]

LINE = 128
# Results of a wait.
DONE, ABORTED, LATE = 0, 1, 2
# The times below are those of Linux's scheduler and of people, not of the machine's speed.
# How long a waiter yields before it sleeps: longer than the pause between two tokens.
PATIENCE_NS = 3_000_000
# Upper bound of one sleep; a lost wake-up or an abort without one costs no more than this.
_NAP_NS = 200_000_000
# A turn of the neighbour at least this long is a slice of the scheduler's.
_SLICE_NS = 2_000_000
# Two slices this close to each other make a line crowded, for the shortest period at first, for the longest at last.
_CLOSE_NS, _SHORTEST_NS, _LONGEST_NS = 20_000_000, 200_000_000, 1_600_000_000
# Offsets of those words of a line.
_CROWDED, _SLICE, _PERIOD = 16, 24, 32
# Threads of one team run on different cores: spin, about 2 us. The coordinator's thread and the worker's thread that
# take turns share a core: spinning would keep that from the other.
BARRIER_SPINS, HANDOFF_SPINS = 100, 0


@kernel
def _reached(seen: int, sequence: int) -> bool:
    """Whether `seen` is `sequence` or later, across the wrap-around; unsigned, for overflow of signed is undefined."""
    return bool(np.uint64(seen) - np.uint64(sequence) < np.uint64(1 << 63))


@kernel
def announce(line: int, sequence: int) -> None:
    """Publish `sequence` on `line` and wake its sleepers."""
    store_release(line, sequence)
    fence()
    if load_acquire(line + 8) > 0:
        futex_wake(line)


@kernel
def wake(line: int) -> None:
    """Wake the sleepers of `line` so that they look at the abort word."""
    futex_wake(line)


@apart
def await_sequence(line: int, sequence: int, abort: int, spins: int, deadline_ns: int) -> int:
    """Wait until `line` carries `sequence` or a later one.

    `abort`: address of the abort word; `spins`: rounds of spinning first; `deadline_ns`: on the monotonic clock,
    0 for none. Returns DONE, ABORTED or LATE.
    """
    for _ in range(spins):
        if _reached(load_acquire(line), sequence):
            return DONE
        pause()
    patience_ends = 0
    while True:
        seen = load_acquire(line)
        if _reached(seen, sequence):
            return DONE
        if load_acquire(abort) != 0:
            # Who is dead may have answered between the two loads: all waiters must come to the same result.
            return DONE if _reached(load_acquire(line), sequence) else ABORTED
        now = clock_ns()
        if deadline_ns != 0 and now > deadline_ns:
            return LATE
        if patience_ends == 0:
            patience_ends = now + PATIENCE_NS
        if now > patience_ends or now < load_acquire(line + _CROWDED):
            _sleep(line, seen)
            continue
        yield_core()
        after = clock_ns()
        if after - now > _SLICE_NS:
            _note_slice(line, now, after)


@kernel
def _note_slice(line: int, now: int, after: int) -> None:
    """A neighbour kept the core from `now` until `after`: the line is crowded if one lately did."""
    period = load_acquire(line + _PERIOD)
    if now - load_acquire(line + _SLICE) < period + _CLOSE_NS:
        period = min(max(2 * period, _SHORTEST_NS), _LONGEST_NS)
        store_release(line + _CROWDED, after + period)
    else:
        period = 0
    store_release(line + _PERIOD, period)
    store_release(line + _SLICE, after)


@kernel
def _sleep(line: int, seen: int) -> None:
    nap = np.empty(2, np.int64)
    nap[0] = 0
    nap[1] = _NAP_NS
    fetch_add(line + 8, 1)
    fence()
    if load_acquire(line) == seen:
        futex_wait(line, seen, address_of(nap))
        nap[1] = 0  # an array is freed after its last use, and taking its address is not one
    fetch_add(line + 8, -1)


class Barrier(NamedTuple):
    """Where the threads of a team wait for each other."""

    # Address of two lines: the first counts generations; the second counts arrivals and notes when the last came.
    line: int
    threads: int
    # Rounds of spinning before a thread yields.
    spins: int
    # Address of the abort word.
    abort: int


@apart
def barrier(b: Barrier) -> int:
    """Wait until all threads of the team have arrived. Returns DONE or ABORTED."""
    if b.threads == 1:
        return DONE
    arrivals = fetch_add(b.line + LINE, 1) + 1
    generation = (arrivals + b.threads - 1) // b.threads
    if arrivals == generation * b.threads:
        store_release(b.line + LINE + 8, clock_ns())
        announce(b.line, generation)
        return DONE
    return await_sequence(b.line, generation, b.abort, b.spins, 0)


@kernel
def passed(b: Barrier) -> int:
    """When the barrier, of several threads, last let them go: ns on the monotonic clock."""
    return int(load_acquire(b.line + LINE + 8))
