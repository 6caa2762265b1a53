"""The engine for asyncio: the same tokens as the iterator's, in order, cancelled, refused, closed.

pytest tests/integration/test_async_engine.py
"""

import asyncio
import gc
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from warmfront.coordinator.engine.batching.async_engine import Answer, AsyncEngine
from warmfront.coordinator.engine.batching.batcher import Batcher, Request
from warmfront.coordinator.engine.engine import Engine
from warmfront.coordinator.text.constraint import FORBIDDEN
from warmfront.coordinator.text.reply import Wishes
from warmfront.shared.errors import BusyError, UsageError

pytestmark = pytest.mark.usefixtures("compiled")

PROMPTS = ([5, 6, 7], [8, 9, 10, 11], [12, 13])
COUNT = 12


@pytest.fixture(scope="module")
def model(tiny_llama: Callable[..., Path], compiled: None) -> str:
    return str(tiny_llama(hidden_act="relu"))


@pytest.fixture(scope="module")
def alone(model: str) -> list[list[int]]:
    """The greedy tokens of each prompt from the plain iterator."""
    with Engine.load(model) as engine:
        return [
            [token.id for token in engine.generate(prompt, max_new_tokens=COUNT, ignore_eos=True)] for prompt in PROMPTS
        ]


@pytest.fixture(scope="module")
def engine(model: str) -> Iterator[AsyncEngine]:
    engine = AsyncEngine(Engine.load(model), queue=4)
    yield engine
    engine.close()


async def tokens_of(engine: AsyncEngine, prompt: list[int], count: int = COUNT) -> list[int]:
    return [token.id async for token in engine.generate(prompt, max_new_tokens=count, ignore_eos=True)]


def test_concurrent_requests_get_what_they_would_alone(engine: AsyncEngine, alone: list[list[int]]) -> None:
    async def all_of_them() -> list[list[int]]:
        return await asyncio.gather(*(tokens_of(engine, prompt) for prompt in PROMPTS))

    assert asyncio.run(all_of_them()) == alone
    assert len({tuple(answer) for answer in alone}) > 1


def test_an_answer_has_figures_of_its_own(engine: AsyncEngine) -> None:
    async def two() -> tuple[int, int, int, str | None]:
        first = engine.generate(PROMPTS[0], max_new_tokens=3, ignore_eos=True)
        second = engine.generate(PROMPTS[1], max_new_tokens=5, ignore_eos=True)
        for answer in (first, second):
            async for _ in answer:
                pass
        return first.stats.new_tokens, second.stats.new_tokens, second.stats.prompt_tokens, first.stats.finish_reason

    assert asyncio.run(two()) == (3, 5, 4, "length")


def test_a_full_queue_refuses_and_what_is_dropped_is_not_computed(engine: AsyncEngine) -> None:
    async def crowd() -> int:
        reader = engine.generate(PROMPTS[0], max_new_tokens=400, ignore_eos=True)
        await anext(reader)
        waiting: list[Answer] = []

        def ask() -> None:
            for _ in range(100):  # as many may be computed at once as the engine likes
                waiting.append(engine.generate(PROMPTS[1], max_new_tokens=400, ignore_eos=True))

        with pytest.raises(BusyError, match="waiting already"):
            ask()
        await waiting.pop().aclose()
        del waiting[1:]
        gc.collect()
        # Behind one that goes on waiting.
        while len(engine._batcher.waiting) > 1:
            await asyncio.sleep(0.001)
        assert reader.stats.new_tokens < 400
        waiting.clear()
        gc.collect()
        await reader.aclose()
        assert [token async for token in reader] == []
        computed = 0

        def count(tokens: int) -> None:
            nonlocal computed
            computed += tokens

        engine.after_pass = count
        await tokens_of(engine, PROMPTS[2], 5)
        engine.after_pass = None
        return computed

    assert asyncio.run(crowd()) < 40  # of the thousands that were asked for
    assert engine.waiting == 0


def test_wrong_requests_are_refused_at_once(engine: AsyncEngine) -> None:
    async def wrong() -> None:
        with pytest.raises(UsageError, match="the context holds"):
            engine.generate([5] * 5000)
        with pytest.raises(UsageError, match="outside the vocabulary"):
            engine.generate([10**6])
        with pytest.raises(UsageError, match="max_new_tokens"):
            await anext(engine.generate([5], max_new_tokens=0))
        with pytest.raises(ZeroDivisionError):
            await engine.call(lambda _engine: 1 // 0)
        assert await engine.call(lambda engine: engine.plan.context) == 512

    asyncio.run(wrong())


class OnlyEven:
    """Allows even ids, and is complete with the fourth."""

    def __init__(self) -> None:
        self.seen = 0

    def allowed(self, logits: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        masked = logits.copy()
        masked[1::2] = FORBIDDEN
        return masked

    def push(self, token: int) -> bool:
        self.seen += 1
        return self.seen == 4


def test_a_constraint_holds(engine: AsyncEngine) -> None:
    async def held() -> tuple[list[int], str | None]:
        answer = engine.generate(PROMPTS[0], ignore_eos=True, constraint=OnlyEven())
        return [token.id async for token in answer], answer.stats.finish_reason

    ids, reason = asyncio.run(held())
    assert len(ids) == 4
    assert all(token % 2 == 0 for token in ids)
    assert reason == "stop"


def test_what_ends_the_thread_ends_readers(model: str) -> None:
    def fail(_tokens: int) -> None:
        raise ZeroDivisionError

    async def ended() -> None:
        async with await AsyncEngine.load(model) as engine:
            answers = [engine.generate(prompt, max_new_tokens=500, ignore_eos=True) for prompt in PROMPTS]
            await anext(answers[0])
            assert engine.failure is None
            engine.after_pass = fail
            for answer in answers:
                with pytest.raises(ZeroDivisionError):
                    _ = [token async for token in answer]
            assert isinstance(engine.failure, ZeroDivisionError)
            with pytest.raises(UsageError, match="this engine is closed"):
                engine.generate([5])

    asyncio.run(ended())


@pytest.mark.parametrize("options", [{"attention": "host"}, {"selector": "core"}])
def test_hidden_states_come_from_every_way_of_running(engine: AsyncEngine, model: str, options: dict[str, str]) -> None:
    ids = [5 + i % 40 for i in range(300)]

    async def states(engine: AsyncEngine) -> npt.NDArray[np.float32]:
        return np.concatenate([some async for some in engine.hidden_states(ids)])

    async def of_another() -> npt.NDArray[np.float32]:
        async with await AsyncEngine.load(model, **options) as other:
            await tokens_of(other, PROMPTS[0], 2)
            return await states(other)

    expected = asyncio.run(states(engine))
    assert expected.shape == (300, 64)
    np.testing.assert_allclose(asyncio.run(of_another()), expected, rtol=0.02, atol=0.02)


@pytest.mark.parametrize("embeds", [True, False])
def test_short_prompts_do_not_hold_up_an_answer(engine: AsyncEngine, embeds: bool) -> None:
    """However many wait, a token of those that decode comes between two of them."""
    plain, order = engine.engine, list[str]()
    batcher = Batcher(plain)
    batcher.waiting.append(Request(plain, PROMPTS[0], Wishes(max_new_tokens=20, ignore_eos=True)))
    while not batcher.step():
        pass
    batcher.waiting += [Request(plain, [14 + i, 5], Wishes(max_new_tokens=1), embeds=embeds) for i in range(6)]
    long = batcher.running[0]
    while batcher.waiting or len(batcher.running) > 1:
        came = batcher.step() or ()
        order += ["token" if request is long else "other" for request, event in came if event is not None]
    while batcher.step() is not None:
        pass
    assert order[:12] in (["other", "token"] * 6, ["token", "other"] * 6)


def test_close_ends_readers(model: str) -> None:
    async def ended() -> None:
        async with await AsyncEngine.load(model) as engine:
            answers = [engine.generate(prompt, max_new_tokens=500, ignore_eos=True) for prompt in PROMPTS]
            await anext(answers[0])
        for answer in answers:
            with pytest.raises(UsageError, match="this engine is closed"):
                _ = [token async for token in answer]
        with pytest.raises(UsageError, match="this engine is closed"):
            engine.generate([5])
        with pytest.raises(UsageError, match="this engine is closed"):
            await engine.call(lambda _engine: 1)

    asyncio.run(ended())
