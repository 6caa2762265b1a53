"""Announce, await, sleep, abort and barriers, between threads and between processes.

Run: pytest tests/shared/wire/test_handoff.py
"""

import contextlib
import os
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from warmfront.shared.kernels.atomics import clock_ns
from warmfront.shared.kernels.jit import kernel
from warmfront.shared.machine.memory import address, anonymous, create_shared, map_shared
from warmfront.shared.wire.handoff import (
    ABORTED,
    BARRIER_SPINS,
    DONE,
    LATE,
    LINE,
    PATIENCE_NS,
    Barrier,
    _note_slice,
    announce,
    await_sequence,
    barrier,
    wake,
)

ROOT = Path(__file__).parents[3]
ROUNDS = 20_000
# Words of each message: several cache lines, so that a reader could see half of one.
WORDS = 64
LIMIT_NS = 20_000_000_000
LAST = 2**63 - 1
# Offsets in a region: lines, then one message for each direction.
ABORT, PING, PONG, BARRIER, MESSAGES, SIZE = 0, LINE, 2 * LINE, 3 * LINE, 8 * LINE, 8 * LINE + 2 * 8 * WORDS


@kernel
def _wrong_words(message: np.ndarray, expected: int) -> int:
    wrong = 0
    for i in range(len(message)):
        wrong += message[i] != expected + i
    return wrong


@kernel
def take_turns(at: int, words: np.ndarray, me: int, rounds: int, spins: int) -> int:
    """Write a message, announce it, await the other's, check it; player 1 waits first. Returns wrong words seen."""
    mine, theirs = words[me * WORDS : (me + 1) * WORDS], words[(1 - me) * WORDS : (2 - me) * WORDS]
    my_line, their_line = at + PING + me * LINE, at + PING + (1 - me) * LINE
    limit = clock_ns() + LIMIT_NS
    wrong = 0
    for n in range(1, rounds + 1):
        if me == 1:
            if await_sequence(their_line, n, at + ABORT, spins, limit) != DONE:
                return -n
            wrong += _wrong_words(theirs, -n)
        for i in range(WORDS):
            mine[i] = i - n if me == 0 else i + n
        announce(my_line, n)
        if me == 0:
            if await_sequence(their_line, n, at + ABORT, spins, limit) != DONE:
                return -n
            wrong += _wrong_words(theirs, n)
    return wrong


@kernel
def meet(at: int, counts: np.ndarray, me: int, generations: int, spins: int) -> int:
    """Count up before each barrier, look at everybody's count after it. Returns wrong counts seen, -1 if aborted."""
    wrong = 0
    for generation in range(1, generations + 1):
        counts[me, 0] = generation
        if barrier(Barrier(at + BARRIER, len(counts), spins, at + ABORT)) != DONE:
            return -1
        for other in range(len(counts)):
            wrong += counts[other, 0] != generation
        if barrier(Barrier(at + BARRIER, len(counts), spins, at + ABORT)) != DONE:
            return -1
    return wrong


def words_of(region: np.ndarray) -> np.ndarray:
    return region[MESSAGES:].view(np.int64)


def until_asleep(region: np.ndarray, sleepers: int = 1) -> None:
    """Wait until so many threads sleep on the line PING."""
    deadline = time.monotonic() + LIMIT_NS / 1e9
    while region[PING + 8] != sleepers:
        assert time.monotonic() < deadline, "nobody fell asleep"
        time.sleep(0.001)


class Region:
    """Private memory with an abort word and lines."""

    def __init__(self) -> None:
        self.bytes = anonymous(SIZE)
        self.at = address(self.bytes)

    def word(self, offset: int) -> np.ndarray:
        return self.bytes[offset : offset + 8].view(np.int64)

    def wait(self, sequence: int = 1, deadline_ns: int | None = None) -> int:
        if deadline_ns is None:
            deadline_ns = time.monotonic_ns() + LIMIT_NS
        return int(await_sequence(self.at + PING, sequence, self.at + ABORT, 0, deadline_ns))


@pytest.fixture
def region() -> Iterator[Region]:
    """Ends waits that a failed test left behind."""
    region = Region()
    yield region
    region.word(ABORT)[0] = 1


class Task:
    """A function in a thread of its own; `result()` joins it."""

    def __init__(self, function: Callable[..., Any], *args: Any) -> None:
        self._results: list[Any] = []
        self._thread = threading.Thread(target=lambda: self._results.append(function(*args)), daemon=True)
        self._thread.start()

    def result(self) -> Any:
        self._thread.join(LIMIT_NS / 1e9)
        assert not self._thread.is_alive(), "the thread still waits"
        return self._results[0]


@pytest.mark.parametrize("spins", [0, BARRIER_SPINS])
def test_threads_take_turns(region: Region, spins: int) -> None:
    words = words_of(region.bytes)
    players = [Task(take_turns, region.at, words, me, ROUNDS, spins) for me in (0, 1)]
    assert [player.result() for player in players] == [0, 0]
    assert region.word(PING)[0] == region.word(PONG)[0] == ROUNDS


def be_the_other(fd: int, rounds: int, spins: int) -> None:
    """Player 1, in a process of its own."""
    mapping = map_shared(fd)
    print(take_turns(address(mapping), words_of(mapping), 1, rounds, spins))


@contextlib.contextmanager
def other_process(rounds: int, spins: int) -> Iterator[np.ndarray]:
    """A region shared with a process that plays `rounds` as player 1 and must see no wrong word."""
    fd = create_shared("warmfront-test", SIZE)
    try:
        shared = map_shared(fd)
        # By its module name: cached kernels belong to that.
        code = f"from {__name__} import be_the_other; be_the_other({fd}, {rounds}, {spins})"
        command = [sys.executable, "-c", code]
        with subprocess.Popen(command, cwd=ROOT, pass_fds=[fd], stdout=subprocess.PIPE, text=True) as other:
            try:
                yield shared
            except BaseException:
                other.kill()
                raise
            assert other.communicate()[0].split() == ["0"]
    finally:
        os.close(fd)


@pytest.mark.parametrize("spins", [0, BARRIER_SPINS])
def test_processes_take_turns(spins: int) -> None:
    with other_process(ROUNDS, spins) as shared:
        assert take_turns(address(shared), words_of(shared), 0, ROUNDS, spins) == 0


def test_a_sleeping_process_is_woken() -> None:
    """The futex is not private to a process."""
    times = []
    with other_process(9, 0) as shared:
        at = address(shared)
        for n in range(1, 10):
            until_asleep(shared)
            words_of(shared)[:WORDS] = np.arange(WORDS) - n
            started = time.monotonic()
            announce(at + PING, n)
            assert await_sequence(at + PONG, n, at + ABORT, 0, time.monotonic_ns() + LIMIT_NS) == DONE
            times.append(time.monotonic() - started)
    # Without the wake-up a sleeper looks again after 0.2 s: 0.1 s on average.
    assert statistics.median(times) < 0.03


@pytest.mark.parametrize("sequence", [0, 3, 5])
def test_a_sequence_reached_ends_the_wait_at_once(region: Region, sequence: int) -> None:
    """Even when it is late and the region is aborted."""
    announce(region.at + PING, 5)
    region.word(ABORT)[0] = 1
    assert region.wait(sequence, 1) == DONE


@pytest.mark.parametrize("wait_ms", [1, 50, 300])
def test_late(region: Region, wait_ms: int) -> None:
    """While it still yields, and after it went to sleep; never early."""
    started = time.monotonic_ns()
    assert region.wait(1, started + wait_ms * 1_000_000) == LATE
    elapsed_ms = (time.monotonic_ns() - started) / 1e6
    assert wait_ms <= elapsed_ms < wait_ms + 700
    assert region.word(PING + 8)[0] == 0


def test_already_late(region: Region) -> None:
    started = time.monotonic()
    assert region.wait(1, 1) == LATE
    assert time.monotonic() - started < 0.1


def test_already_aborted(region: Region) -> None:
    region.word(ABORT)[0] = 1
    assert region.wait() == ABORTED


@pytest.mark.parametrize("how", ["announce", "abort"])
def test_a_sleeper_is_woken(region: Region, how: str) -> None:
    times = []
    for n in range(1, 10):
        sleeper = Task(region.wait, n)
        until_asleep(region.bytes)
        started = time.monotonic()
        if how == "announce":
            announce(region.at + PING, n)
        else:
            region.word(ABORT)[0] = 1
            wake(region.at + PING)
        assert sleeper.result() == (DONE if how == "announce" else ABORTED)
        times.append(time.monotonic() - started)
        region.word(ABORT)[0] = 0
        assert region.word(PING + 8)[0] == 0
    assert statistics.median(times) < 0.03


def test_an_abort_without_a_wake_up_is_seen_all_the_same(region: Region) -> None:
    sleeper = Task(region.wait)
    until_asleep(region.bytes)
    started = time.monotonic()
    region.word(ABORT)[0] = 1
    assert sleeper.result() == ABORTED
    assert time.monotonic() - started < 1


def test_all_sleepers_are_woken(region: Region) -> None:
    sleepers = [Task(region.wait) for _ in range(3)]
    until_asleep(region.bytes, 3)
    announce(region.at + PING, 1)
    assert [sleeper.result() for sleeper in sleepers] == [DONE] * 3


def test_a_sleeper_uses_no_cpu(region: Region) -> None:
    def wait() -> tuple[int, float]:
        before = time.thread_time()
        return region.wait(), time.thread_time() - before

    sleeper = Task(wait)
    time.sleep(1)
    announce(region.at + PING, 1)
    result, used = sleeper.result()
    assert result == DONE
    # It yields for the length of its patience, then wakes five times a second.
    assert used < 5 * PATIENCE_NS / 1e9


def test_a_crowded_line_is_slept_on_at_once(region: Region) -> None:
    def wait() -> tuple[int, float]:
        before = time.thread_time()
        return region.wait(), time.thread_time() - before

    region.word(PING + 16)[0] = time.monotonic_ns() + LIMIT_NS
    sleeper = Task(wait)
    until_asleep(region.bytes)
    announce(region.at + PING, 1)
    result, used = sleeper.result()
    assert result == DONE
    assert used < PATIENCE_NS / 1e9 / 2


def test_a_busy_neighbour_makes_a_line_crowded(region: Region) -> None:
    """Each yield beside it lasts a slice of the scheduler's; alone on a core none does."""
    cpu = min(os.sched_getaffinity(0))

    def wait_often() -> bool:
        os.sched_setaffinity(0, {cpu})
        limit = time.monotonic() + LIMIT_NS / 1e9
        while region.word(PING + 16)[0] == 0 and time.monotonic() < limit:
            region.wait(deadline_ns=time.monotonic_ns() + 1_000_000)
        return bool(region.word(PING + 16)[0] > time.monotonic_ns())

    busy = subprocess.Popen([sys.executable, "-c", f"import os\nos.sched_setaffinity(0, {{{cpu}}})\nwhile True: pass"])
    try:
        assert Task(wait_often).result()
    finally:
        busy.kill()
        busy.wait()


def test_a_line_that_stays_crowded_is_looked_at_more_seldom(region: Region) -> None:
    """Every look costs a slice of the neighbour's."""
    line, slice_ns, period, now = region.at + PING, 3_000_000, 0, 10**12
    for _ in range(6):
        _note_slice(line, now, now + slice_ns)
        now += 10_000_000
        _note_slice(line, now, now + slice_ns)
        crowded = int(region.word(PING + 16)[0]) - now - slice_ns
        assert crowded >= min(2 * period, 1_600_000_000)
        period, now = crowded, now + slice_ns + crowded
    assert period == 1_600_000_000
    # A lone long turn, much later, may be the hypervisor's.
    region.word(PING + 16)[0] = 0
    _note_slice(line, now + 10**10, now + 10**10 + slice_ns)
    assert region.word(PING + 16)[0] == 0


def wrapped(value: int) -> int:
    return (value + 2**63) % 2**64 - 2**63


def test_sequences_wrap_around(region: Region) -> None:
    for n in range(LAST - 4, LAST + 5):
        announce(region.at + PING, wrapped(n))
        assert region.word(PING)[0] == wrapped(n)
        for past in (0, 1, 9):
            assert region.wait(wrapped(n - past)) == DONE
        for future in (1, 9):
            assert region.wait(wrapped(n + future), 1) == LATE


def test_a_sleeper_waits_across_the_wrap(region: Region) -> None:
    announce(region.at + PING, LAST - 1)
    sleeper = Task(region.wait, wrapped(LAST + 2))
    until_asleep(region.bytes)
    announce(region.at + PING, LAST)
    announce(region.at + PING, wrapped(LAST + 1))
    until_asleep(region.bytes)
    announce(region.at + PING, wrapped(LAST + 2))
    assert sleeper.result() == DONE


@pytest.mark.parametrize("spins", [0, BARRIER_SPINS])
def test_barrier(region: Region, spins: int) -> None:
    counts = np.zeros((3, LINE // 8), np.int64)
    team = [Task(meet, region.at, counts, me, 5000, spins) for me in range(3)]
    assert [thread.result() for thread in team] == [0, 0, 0]
    assert region.word(BARRIER)[0] == 10_000
    assert region.word(BARRIER + LINE)[0] == 30_000


def test_a_team_of_one_never_waits(region: Region) -> None:
    assert barrier(Barrier(region.at + BARRIER, 1, 0, region.at + ABORT)) == DONE
    assert not region.bytes.any()


def test_an_abort_ends_a_barrier(region: Region) -> None:
    counts = np.zeros((3, LINE // 8), np.int64)
    team = [Task(meet, region.at, counts, me, 10, 0) for me in range(2)]
    time.sleep(0.02)
    region.word(ABORT)[0] = 1
    wake(region.at + BARRIER)
    assert [thread.result() for thread in team] == [-1, -1]
