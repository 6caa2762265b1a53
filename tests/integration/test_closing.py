"""Engines that are closed, left half way, or used side by side.  pytest tests/integration/test_closing.py"""

import gc
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.integration.command import needs_two_cores
from tests.integration.faults import take
from warmfront.coordinator.engine.engine import Engine
from warmfront.shared.errors import UsageError

pytestmark = pytest.mark.usefixtures("compiled")


@pytest.fixture
def engine(endless: Path) -> Iterator[Engine]:
    with Engine.load(str(endless), context=2000, gpu="host") as engine:
        yield engine


def test_a_closed_engine_says_so(engine: Engine) -> None:
    engine.close()
    engine.close()
    with pytest.raises(UsageError, match="closed"):
        take(engine, 1, 0, lambda: None)
    with pytest.raises(UsageError, match="closed"):
        engine.statistics.workers()


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
