"""A test that leaves a process, thread, descriptor or shared memory behind fails: `no_leaks`, for every test.

`tests/conftest.py` switches it on by importing it. What is compared before and after a test:

    processes    descendants of pytest, and anything that inherited this run's mark (so orphans are found too)
    threads      Python's, and ZeroMQ's I/O threads; pools of OpenMP, BLAS, torch and tqdm start once and stay
    descriptors  /proc/self/fd by target; a socket is shown with its abstract address
    /dev/shm     entries by name

Fixtures of wider scope (an engine kept for a module) are set up before and torn down after, and so do not count.
"""

import gc
import os
import threading
import time
import uuid
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

GRACE_S = 2.0
# Opened by a library once per process, at first use.
LASTING_FDS = ("/dev/urandom", "/dev/random", "/dev/nvidia", "anon_inode:[eventpoll]")
LASTING_THREADS = ("tqdm_monitor",)
LASTING_SHM = "__KMP_REGISTERED_LIB_"

os.environ["WARMFRONT_TEST_RUN"] = uuid.uuid4().hex
# Processes that are nobody's here: looking at all of the machine's twice a test would take a twentieth of the run. (A
# pid is not used again within the two looks of a test.)
_foreign: set[int] = set()
_MARK = f"WARMFRONT_TEST_RUN={os.environ['WARMFRONT_TEST_RUN']}".encode()


class Snapshot(NamedTuple):
    """What this process and its descendants hold."""

    processes: Counter[str]
    threads: Counter[str]
    descriptors: Counter[str]
    shared_memory: Counter[str]


def snapshot() -> Snapshot:
    """What there is now."""
    shared_memory = (name for name in os.listdir("/dev/shm") if not name.startswith(LASTING_SHM))
    return Snapshot(_processes(), _threads(), _descriptors(), Counter(shared_memory))


def left_since(before: Snapshot) -> list[str]:
    """A line for each thing there is now and was not before."""
    kinds = zip(Snapshot._fields, before, snapshot(), strict=True)
    return [f"{kind}: {thing} (x{count})" for kind, old, new in kinds for thing, count in (new - old).items()]


def assert_nothing_left(before: Snapshot) -> None:
    """Fail unless everything new since `before` goes away within `GRACE_S`."""
    deadline = time.monotonic() + GRACE_S
    while left := left_since(before):
        if time.monotonic() > deadline:
            pytest.fail("left behind:\n  " + "\n  ".join(left), pytrace=False)
        gc.collect()
        time.sleep(0.02)


@pytest.fixture(autouse=True)
def no_leaks() -> Iterator[None]:
    """Fail the test that leaves something behind."""
    before = snapshot()
    yield
    assert_nothing_left(before)


def _processes() -> Counter[str]:
    parents, lines, marked = {}, {}, set()
    pids = {int(name) for name in os.listdir("/proc") if name.isdecimal()}
    for pid in pids - _foreign:
        entry = Path("/proc", str(pid))
        try:
            _, _, stat = (entry / "stat").read_text().rpartition(")")
            lines[pid] = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")[:200]
            parents[pid] = int(stat.split()[1])
            if _MARK in (entry / "environ").read_bytes().split(b"\0"):
                marked.add(pid)
        except OSError:  # gone meanwhile, or another user's
            continue
    ours = marked - {os.getpid()}
    for pid in parents:
        ancestor = parents[pid]
        while ancestor in parents and ancestor != os.getpid():
            ancestor = parents[ancestor]
        if ancestor == os.getpid():
            ours.add(pid)
    _foreign.intersection_update(pids)
    _foreign.update(parents.keys() - ours - {os.getpid()})
    return Counter(f"{pid} {lines[pid] or '(zombie)'}" for pid in ours)


def _threads() -> Counter[str]:
    names = [f"{thread.name} {thread.ident}" for thread in threading.enumerate() if thread.name not in LASTING_THREADS]
    for task in Path("/proc/self/task").iterdir():
        try:
            name = (task / "comm").read_text().strip()
        except OSError:
            continue
        if name.startswith("ZMQbg"):
            names.append(f"{name} {task.name}")
    return Counter(names)


def _descriptors() -> Counter[str]:
    table = (line.split() for line in Path("/proc/net/unix").read_text().splitlines()[1:])
    addresses = {f"socket:[{fields[6]}]": fields[7] for fields in table if len(fields) > 7}
    targets = []
    for entry in Path("/proc/self/fd").iterdir():
        try:
            target = os.readlink(entry)
        except OSError:  # the descriptor of this very listing
            continue
        if not target.startswith(LASTING_FDS):
            targets.append(f"{target} {addresses.get(target, '')}".strip())
    return Counter(targets)
