"""Killed at a random moment, a run ends within two seconds and leaves nothing behind.

pytest tests/integration/test_faults.py
"""

import contextlib
import os
import random
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.integration.command import MARK, WARMFRONT, find_module, marked
from tests.integration.faults import LIMIT_S, take, worker_pid
from warmfront.coordinator.engine.engine import Engine
from warmfront.shared.errors import WarmfrontError

RUNS = 30
VICTIMS = ("cpu worker", "coordinator", "interrupted", "terminated")
# Python's own start: its handler of Ctrl-C is not there yet.
PYTHON_START_S = 0.15
pytestmark = pytest.mark.usefixtures("compiled")


@pytest.fixture(scope="module", autouse=True)
def _packed(endless: Path, smollm2: Path, compiled: None) -> None:
    """Both models are packed: the moments of the faults below are those of a warm start."""
    Engine.load(str(smollm2)).close()


class Fault(NamedTuple):
    """What is done to a run, and when."""

    victim: str  # one of VICTIMS
    moment: float  # seconds after the victim has started
    small: bool  # with the tiny model
    options: list[str]

    @classmethod
    def draw(cls, seed: int) -> "Fault":
        chance = random.Random(seed)
        victim = VICTIMS[seed % len(VICTIMS)]
        # A worker starts 0.3 s after the coordinator, is ready after 0.8 s, generates after 1.5 s. Once it is ready it
        # is replaced: see test_replaced_workers.py.
        moment = chance.uniform(0, 0.3) if "worker" in victim else chance.uniform(PYTHON_START_S, 2.5)
        gpu = ["--gpu", "host"] if chance.random() < 0.4 else []
        return cls(victim, moment, chance.random() < 0.5, gpu)

    def __str__(self) -> str:
        model = "tiny" if self.small else "smollm2"
        return f"{self.victim} after {self.moment:.2f} s, {model}{' '.join(['', *self.options])}"

    def strike(self, process: "subprocess.Popen[str]", mark: str) -> None:
        """Wait for the moment, then do it."""
        pid: int | None = process.pid
        if "worker" in self.victim:
            while (pid := find_module(mark, f"warmfront.{self.victim.replace(' ', '_')}")) is None:
                assert process.poll() is None, process.communicate()
                time.sleep(0.005)
        time.sleep(self.moment)
        assert pid is not None
        assert process.poll() is None, f"over before the fault: {process.communicate()}"
        how = {"interrupted": signal.SIGINT, "terminated": signal.SIGTERM}.get(self.victim, signal.SIGKILL)
        os.kill(pid, how)


@pytest.mark.stress
@pytest.mark.slow
@pytest.mark.parametrize("fault", [Fault.draw(seed) for seed in range(RUNS)], ids=str)
def test_nothing_is_left(endless: Path, smollm2: Path, fault: Fault) -> None:
    mark = f"{os.getpid()}-{fault}"
    if fault.small:
        options: list[str | Path] = ["-m", endless, "--prompt-ids", "1,2,3", "-n", "90000", "--ctx", "99999"]
    else:
        options = ["-m", smollm2, "-p", "1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11,", "-n", "4000"]
    process = subprocess.Popen(
        [WARMFRONT, "generate", *options, *fault.options],
        env=os.environ | {MARK: mark},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    with process, contextlib.ExitStack() as stack:
        stack.callback(process.kill)
        shared = set(os.listdir("/dev/shm"))
        fault.strike(process, mark)
        struck_at = time.monotonic()
        addresses = {each["WARMFRONT_ADDRESS"] for each in marked(mark).values() if "WARMFRONT_ADDRESS" in each}
        process.wait(60)
        while marked(mark) and time.monotonic() < struck_at + 60:
            time.sleep(0.01)
        took = time.monotonic() - struck_at
        left = [address for address in addresses if address.removeprefix("ipc://") in sockets()]
        _, said = process.communicate()
    assert took < LIMIT_S, f"took {took:.1f} s: {said}"
    assert left == []
    assert set(os.listdir("/dev/shm")) <= shared
    if "worker" in fault.victim:
        assert process.returncode == 1
        assert said.startswith("warmfront: worker cpu0 was killed by signal 9 while "), said
        assert said.count("\n") == 1, said
    elif fault.victim == "interrupted":
        assert process.returncode == 130, said
        assert said.strip() == ""
    else:
        assert process.returncode == -(signal.SIGTERM if fault.victim == "terminated" else signal.SIGKILL)
        assert said == ""


def sockets() -> str:
    """The addresses of all Unix sockets."""
    return Path("/proc/net/unix").read_text()


@pytest.fixture
def engine(endless: Path) -> Iterator[Engine]:
    with Engine.load(str(endless), context=2000, gpu="host") as engine:
        yield engine


@pytest.mark.parametrize("name", ["cpu0", "gpu0"])
def test_a_stopped_worker_is_waited_for(engine: Engine, name: str) -> None:
    undisturbed = take(engine, 200, 0, lambda: None)
    engine.reset()
    pid = worker_pid(engine, name)
    waker = threading.Timer(1.5, os.kill, (pid, signal.SIGCONT))

    def pause() -> None:
        os.kill(pid, signal.SIGSTOP)
        waker.start()

    start = time.monotonic()
    assert take(engine, 200, 100, pause) == undisturbed
    assert time.monotonic() - start > 1.4
    waker.join()


def test_a_dead_cpu_worker_is_replaced(engine: Engine) -> None:
    undisturbed = take(engine, 400, 0, lambda: None)
    engine.reset()
    pid = worker_pid(engine, "cpu0")
    assert take(engine, 400, 20, lambda: os.kill(pid, signal.SIGKILL)) == undisturbed
    assert worker_pid(engine, "cpu0") != pid


def test_a_worker_that_nobody_can_replace_is_the_end_and_another_engine_can_be_loaded(endless: Path) -> None:
    """The model's packed file is gone: no successor gets ready."""
    with Engine.load(str(endless), context=2000) as engine:
        pid = worker_pid(engine, "cpu0")
        os.unlink(engine.model.path)
        with pytest.raises(WarmfrontError, match="worker cpu0"):
            take(engine, 1900, 20, lambda: os.kill(pid, signal.SIGKILL))
        for _ in range(2):
            with pytest.raises(WarmfrontError, match="cpu0"):
                take(engine, 1, 0, lambda: None)
    with Engine.load(str(endless), context=2000) as other:
        assert len(take(other, 5, 0, lambda: None)) == 5
