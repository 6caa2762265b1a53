"""A CPU worker that dies is replaced: what it was computing is computed again, and no request notices but by the time.

pytest tests/integration/test_replaced_workers.py
"""

import asyncio
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from warmfront.coordinator.engine.batching.async_engine import AsyncEngine
from warmfront.coordinator.engine.engine import Engine

pytestmark = pytest.mark.usefixtures("compiled")

PROMPTS = [[5 + i, 6, 7 + i] * (1 + 20 * i) for i in range(6)]
COUNT = 40


class Killer:
    """Kills a CPU worker of `engine` again and again, once it serves."""

    def __init__(self, engine: Engine, times: int) -> None:
        self._supervisor, self.ownership = engine.session.runtime.supervisor, engine.ownership
        self.killed = set[int]()
        self._thread = threading.Thread(target=self._live, args=(times,))

    def _live(self, times: int) -> None:
        supervisor, present = self._supervisor, self.ownership._present
        until = time.monotonic() + 60
        while len(self.killed) < times and time.monotonic() < until:
            name = f"cpu{len(self.killed) % 2}"
            pid = supervisor.hellos[name].pid
            if pid not in self.killed and present.all():
                os.kill(pid, signal.SIGKILL)
                self.killed.add(pid)
            time.sleep(0.05)

    def __enter__(self) -> "Killer":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._thread.join()


@pytest.fixture(scope="module")
def folder(tiny_llama: Callable[..., Path], compiled: None) -> Path:
    return tiny_llama(hidden_act="relu", intermediate_size=400, num_hidden_layers=3)


@pytest.fixture(params=[{}, {"gpu": "host", "vram_budget": 1_000_000}], ids=["cpu", "gpu"])
def engine(request: pytest.FixtureRequest, folder: Path) -> Iterator[Engine]:
    options: dict[str, Any] = request.param
    with Engine.load(
        str(folder), workers=2, threads=2, context=400, parallel=6, verify=True, force=True, **options
    ) as engine:
        yield engine


def test_no_request_is_lost(engine: Engine) -> None:
    """Killed six times in prompts, passes and between them: the tokens are those of an undisturbed engine."""

    def answer(ids: list[int]) -> list[int]:
        return [token.id for token in engine.generate(ids, max_new_tokens=COUNT, ignore_eos=True)]

    expected = []
    for ids in PROMPTS:
        engine.reset()
        expected.append(answer(ids))

    async def serve(killer: Killer) -> list[list[list[int]]]:
        async with AsyncEngine(engine) as served:

            async def one(ids: list[int]) -> list[int]:
                return [t.id async for t in served.generate(ids, max_new_tokens=COUNT, ignore_eos=True)]

            rounds = []
            while len(killer.killed) < 6:
                rounds.append(await asyncio.gather(*map(one, PROMPTS)))
            return rounds

    with Killer(engine, 6) as killer:
        rounds = asyncio.run(serve(killer))
    assert rounds
    assert all(answers == expected for answers in rounds)
    assert killer.ownership.lost >= 5


def test_killed_while_nothing_is_computed(engine: Engine) -> None:
    expected = engine.decode_ids(PROMPTS[1], 30)
    for name in ("cpu0", "cpu1"):
        os.kill(engine.session.runtime.supervisor.hellos[name].pid, signal.SIGKILL)
    time.sleep(0.3)
    engine.reset()
    assert engine.decode_ids(PROMPTS[1], 30) == expected
    assert [worker.groups for worker in engine.statistics.workers()]
