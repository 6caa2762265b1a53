"""Without its GPU worker, whenever that dies, a run goes on with the same tokens.

pytest tests/integration/test_gpu_faults.py
"""

import os
import random
import re
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.integration.command import MARK, find_module
from tests.integration.faults import LIMIT_S
from tests.integration.gpu import Restless, budget_for, watch
from tests.leak_check import assert_nothing_left, snapshot
from warmfront.coordinator.engine.engine import Engine
from warmfront.shared.errors import WorkerError
from warmfront.shared.wire.messages import Move

pytestmark = pytest.mark.usefixtures("compiled")

# Half of the model's 26 groups.
GPU: dict[str, Any] = {
    "gpu": "host",
    "vram_budget": budget_for(13, hidden=64, ffn=400, context=8000),
    "dtype": "f32",
    "context": 8000,
    "verify": True,
}
PROMPT, LONG_PROMPT = [1, 2, 3], [3 + (7 * i + i // 13) % 290 for i in range(3000)]


@pytest.fixture(scope="module")
def undisturbed(endless: Path) -> dict[str, list[int]]:
    """The greedy tokens that follow each prompt, without a GPU."""
    with Engine.load(str(endless), dtype="f32", context=8000, gpu="none") as engine:
        return {
            "short": engine.decode_ids(PROMPT, 4000),
            "long": engine.decode_ids(LONG_PROMPT, 200),
        }


class Victim:
    """The GPU worker of an engine, whichever process it is at the moment."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self.killed: list[int] = []

    def kill(self) -> None:
        """Kill the process that runs now."""
        process = self._engine.session.runtime.supervisor._processes["gpu0"]
        os.kill(process.pid, signal.SIGKILL)
        self.killed.append(process.pid)

    def kill_next(self, after_s: float) -> None:
        """Kill it, and its successor `after_s` seconds after that has been started."""
        self.kill()
        deadline = time.monotonic() + 30
        while (
            self._engine.session.runtime.supervisor._processes["gpu0"].pid == self.killed[-1]
            and time.monotonic() < deadline
        ):
            time.sleep(0.001)
        time.sleep(after_s)
        self.kill()

    def back(self) -> bool:
        """Whether another process is in its place and holds groups; a killed one seems to until that is noticed."""
        ownership, pid = self._engine.ownership, self._engine.session.runtime.supervisor.hellos["gpu0"].pid
        there = bool(ownership._present[-1]) and pid not in self.killed
        return there and bool(ownership.resident[-1].any()) and not ownership._batches


def assert_it_goes_on(
    engine: Engine, victim: Victim, expected: list[int], after: int = 2, strike: Callable[[], None] = lambda: None
) -> None:
    """Generate, with `strike` called at token `after`, until the GPU worker is back and has computed something."""
    striker, tokens, longest = threading.Thread(target=strike), [], 0.0
    answer = engine.generate(PROMPT, max_new_tokens=len(expected))
    tokens.append(next(answer).id)
    while len(tokens) < after + 100 or striker.is_alive() or not victim.back():
        started = time.monotonic()
        tokens.append(next(answer).id)
        longest = max(longest, time.monotonic() - started)
        if len(tokens) == after:
            striker.start()
        if len(tokens) > after + 100:
            time.sleep(0.02)  # or the tiny model would fill its context before the process is back
    striker.join()
    assert tokens == expected[: len(tokens)]
    assert longest < LIMIT_S, f"a gap of {longest:.2f} s"
    assert engine.session.runtime.supervisor.hellos["gpu0"].pid not in victim.killed
    assert not any(Path(f"/proc/{pid}").exists() for pid in victim.killed)
    assert engine.decode_ids(PROMPT, 50) == expected[:50]
    assert worker_neurons(engine, "gpu0") > 0


def worker_neurons(engine: Engine, name: str) -> int:
    return next(worker.neurons for worker in engine.statistics.workers() if worker.name == name)


@pytest.fixture(scope="class")
def engine(endless: Path) -> Iterator[Engine]:
    """One for all tests after which the GPU worker is back. Nothing is left when it is closed."""
    before = snapshot()
    with Engine.load(str(endless), **GPU) as engine:
        yield engine
    assert_nothing_left(before)


@pytest.fixture
def restless(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> Engine:
    """Groups move to and from the emulated GPU at every token, and the tables are checked at every boundary."""
    engine.reset()
    watch(engine, Restless(1), monkeypatch)
    return engine


class TestRestless:
    """Groups move whatever happens."""

    @pytest.fixture(autouse=True)
    def no_leaks(self) -> None:
        """The shared engine has another process for its GPU worker after a test: `engine` looks in its place."""

    def test_ctrl_c_waits_until_the_tables_agree(
        self, restless: Engine, undisturbed: dict[str, list[int]], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        ownership, presses = restless.ownership, []
        arrived = ownership._arrived

        def pressed(*arguments: Any) -> None:
            presses.append(signal.raise_signal(signal.SIGINT))
            arrived(*arguments)

        with monkeypatch.context() as patch:
            patch.setattr(ownership, "_arrived", pressed)
            with pytest.raises(KeyboardInterrupt):
                restless.decode_ids(PROMPT, 500)
        assert presses
        ownership.boundary()
        assert restless.decode_ids(PROMPT, 100) == undisturbed["short"][:100]

    @pytest.mark.stress
    @pytest.mark.slow
    @pytest.mark.parametrize("seed", range(12))
    def test_a_gpu_worker_may_die_at_any_moment(
        self, restless: Engine, undisturbed: dict[str, list[int]], seed: int
    ) -> None:
        chance, victim = random.Random(seed), Victim(restless)

        def strike() -> None:
            time.sleep(chance.uniform(0, 0.05))
            victim.kill()

        assert_it_goes_on(restless, victim, undisturbed["short"], chance.randrange(2, 200), strike)

    @pytest.mark.stress
    @pytest.mark.slow
    @pytest.mark.parametrize("pause", [0.0, 0.1, 0.5, 1.0, 1.5])
    def test_its_successor_may_die_too(self, restless: Engine, undisturbed: dict[str, list[int]], pause: float) -> None:
        """Before it has said Hello, while it loads, while it is refilled."""
        victim = Victim(restless)
        assert_it_goes_on(restless, victim, undisturbed["short"], 20, lambda: victim.kill_next(pause))
        assert len(set(victim.killed)) == 2

    @pytest.mark.stress
    @pytest.mark.slow
    @pytest.mark.parametrize("nth", [1, 5, 20])
    def test_a_gpu_worker_may_die_during_a_move(
        self, restless: Engine, undisturbed: dict[str, list[int]], monkeypatch: pytest.MonkeyPatch, nth: int
    ) -> None:
        """A batch is in flight when the process dies."""
        victim, supervisor, moves = Victim(restless), restless.session.runtime.supervisor, []
        move = supervisor.move

        def deadly(worker: str, message: Move) -> None:
            move(worker, message)
            moves.append(message)
            if len(moves) == nth:
                victim.kill()

        monkeypatch.setattr(supervisor, "move", deadly)
        assert_it_goes_on(restless, victim, undisturbed["short"])
        assert len(moves) > nth

    @pytest.mark.stress
    @pytest.mark.slow
    @pytest.mark.parametrize("moment", [0.0, 0.3, 0.6, 0.9])
    def test_a_gpu_worker_may_die_during_the_prefill(
        self, restless: Engine, undisturbed: dict[str, list[int]], moment: float
    ) -> None:
        victim = Victim(restless)
        restless.decode_ids(LONG_PROMPT, 1)
        killer = threading.Timer(moment * restless.stats.prefill_s, victim.kill)
        restless.reset()
        killer.start()
        start = time.monotonic()
        answer = restless.decode_ids(LONG_PROMPT, 200)
        killer.join()
        assert answer == undisturbed["long"]
        assert time.monotonic() - start < 30
        assert_it_goes_on(restless, victim, undisturbed["short"])


@pytest.mark.stress
@pytest.mark.slow
@pytest.mark.parametrize("moment", [0.0, 0.2, 0.4, 0.6, 0.8, 1.0, 1.2])
def test_a_gpu_worker_that_dies_while_loading_is_an_error(
    endless: Path, undisturbed: dict[str, list[int]], moment: float
) -> None:
    """Until all workers are ready; once the GPU is being filled, the run goes on without it."""
    killed: list[int] = []
    error: WorkerError | None = None

    def strike() -> None:
        deadline = time.monotonic() + 30
        while (pid := find_module(os.environ[MARK], "warmfront.gpu_worker")) is None and time.monotonic() < deadline:
            time.sleep(0.002)
        assert pid is not None
        time.sleep(moment)
        os.kill(pid, signal.SIGKILL)
        killed.append(pid)

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(MARK, f"loading-{os.getpid()}-{moment}")
        killer = threading.Thread(target=strike)
        killer.start()
        try:
            with Engine.load(str(endless), **GPU) as engine:
                killer.join()
                assert engine.decode_ids(PROMPT, 300) == undisturbed["short"][:300]
        except WorkerError as raised:
            error = raised
        killer.join()
    assert len(killed) == 1
    if error is not None:
        phases = "starting|waiting for its plan|loading the model"
        assert re.match(f"worker gpu0 was killed by signal 9 while ({phases}): ", str(error))
