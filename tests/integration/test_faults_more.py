"""Killed at a random moment, a run ends within two seconds and leaves nothing.

pytest tests/integration/test_faults.py
"""

import contextlib
import gc
import os
import random
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from tests.integration.command import MARK, WARMFRONT, find_module, marked, needs_two_cores
from warmfront.coordinator.engine import Engine
from warmfront.shared.errors import UsageError, WorkerError

RUNS = 130
VICTIMS = ("cpu worker", "gpu worker", "coordinator", "interrupted", "terminated")
LIMIT_S = 2.0
# Python's own start: its handler of Ctrl-C is not there yet.
PYTHON_START_S = 0.15
pytestmark = pytest.mark.usefixtures("compiled")


@pytest.fixture(scope="module")
def endless(tiny_llama: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model with a long context and, for want of a tokenizer, no end."""
    folder = tmp_path_factory.mktemp("endless") / "model"
    original = tiny_llama(hidden_act="relu", intermediate_size=400, max_position_embeddings=100_000)
    shutil.copytree(original, folder, ignore=shutil.ignore_patterns("tokenizer*"))
    return folder


@pytest.fixture(scope="module", autouse=True)
def _packed(endless: Path, smollm2: Path, compiled: None) -> None:
    for model in (endless, smollm2):
        Engine.load(str(model)).close()


class Fault(NamedTuple):
    """What is done to a run, and when: seconds after its victim has started."""

    victim: str
    moment: float
    small: bool
    options: list[str]

    @classmethod
    def draw(cls, seed: int) -> "Fault":
        chance = random.Random(seed)
        victim = VICTIMS[seed % len(VICTIMS)]
        # A worker is there 0.3 s after the coordinator, answers after 0.8 s, generates after 1.5 s.
        moment = chance.uniform(0, 2) if "worker" in victim else chance.uniform(PYTHON_START_S, 2.5)
        gpu = ["--gpu", "host"] if victim == "gpu worker" or chance.random() < 0.4 else []
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
@pytest.mark.parametrize("fault", [Fault.draw(seed) for seed in range(30, RUNS)], ids=str)
def test_nothing_is_left(endless: Path, smollm2: Path, fault: Fault) -> None:
    mark = f"{os.getpid()}-{fault}"
    if fault.small:
        wishes: list[str | Path] = ["-m", endless, "--prompt-ids", "1,2,3", "-n", "90000", "--ctx", "99999"]
    else:
        wishes = ["-m", smollm2, "-p", "1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11,", "-n", "4000"]
    process = subprocess.Popen(
        [WARMFRONT, "generate", *wishes, *fault.options],
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
        struck = time.monotonic()
        addresses = {each["WARMFRONT_ADDRESS"] for each in marked(mark).values() if "WARMFRONT_ADDRESS" in each}
        process.wait(60)
        while marked(mark) and time.monotonic() < struck + 60:
            time.sleep(0.01)
        took = time.monotonic() - struck
        left = [address for address in addresses if address.removeprefix("ipc://") in sockets()]
        _, said = process.communicate()
    assert took < LIMIT_S, f"took {took:.1f} s: {said}"
    assert left == []
    assert set(os.listdir("/dev/shm")) <= shared
    if "worker" in fault.victim:
        name = f"{fault.victim[:3]}0"
        assert process.returncode == 1
        assert said.startswith(f"warmfront: worker {name} was killed by signal 9 while "), said
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


def worker_pid(engine: Engine, name: str) -> int:
    return next(worker.pid for worker in engine.workers() if worker.name == name)


def take(engine: Engine, count: int, after: int, action: Callable[[], Any]) -> list[int]:
    """The ids of `count` tokens; `action` is called once `after` of them are there."""
    tokens = []
    for token in engine.generate([1, 2, 3], max_new_tokens=count):
        tokens.append(token.id)
        if len(tokens) == after:
            action()
    return tokens


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


@pytest.mark.parametrize("name", ["cpu0", "gpu0"])
def test_a_dead_worker_is_an_error_and_another_engine_can_be_loaded(engine: Engine, endless: Path, name: str) -> None:
    pid = worker_pid(engine, name)
    start = time.monotonic()
    with pytest.raises(WorkerError, match=f"worker {name} was killed by signal 9 while generating"):
        take(engine, 1900, 20, lambda: os.kill(pid, signal.SIGKILL))
    assert time.monotonic() - start < LIMIT_S
    for _ in range(2):
        with pytest.raises(WorkerError, match=name):
            take(engine, 1, 0, lambda: None)
    engine.close()
    with Engine.load(str(endless), context=2000) as other:
        assert len(take(other, 5, 0, lambda: None)) == 5


def test_a_closed_engine_says_so(engine: Engine) -> None:
    engine.close()
    engine.close()
    with pytest.raises(UsageError, match="closed"):
        take(engine, 1, 0, lambda: None)
    with pytest.raises(UsageError, match="closed"):
        engine.workers()


def test_a_closed_engine_gives_its_memory_back(engine: Engine) -> None:
    def boards() -> int:
        return sum("warmfront-board" in line for line in Path("/proc/self/maps").read_text().splitlines())

    gc.collect()
    before = boards()
    gc.disable()
    try:
        engine.close()
    finally:
        gc.enable()
    assert boards() == before - 1


def test_an_answer_that_outlives_its_engine(engine: Engine) -> None:
    answer = engine.generate([1, 2, 3])
    next(answer)
    engine.close()
    with pytest.raises(UsageError, match="closed"):
        next(answer)


@needs_two_cores
def test_two_engines_side_by_side(endless: Path) -> None:
    with Engine.load(str(endless), threads=1) as one, Engine.load(str(endless), threads=1) as two:
        pairs = zip(one.generate([1, 2, 3], max_new_tokens=50), two.generate([1, 2, 3], max_new_tokens=50), strict=True)
        ids = [(first.id, second.id) for first, second in pairs]
    assert len(ids) == 50
    assert all(first == second for first, second in ids)


def test_an_answer_may_be_left_half_way(engine: Engine) -> None:
    whole = take(engine, 60, 0, lambda: None)
    for token, expected in zip(engine.generate([1, 2, 3]), whole[:10], strict=False):
        assert token.id == expected
    assert take(engine, 60, 0, lambda: None) == whole
