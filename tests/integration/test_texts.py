"""Texts side by side: each gets the tokens that it gets alone, whoever else is served, and those of transformers.

pytest tests/integration/test_texts.py
"""

import asyncio
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaForCausalLM

from tests.integration.reference import choices
from warmfront.coordinator.engine.batching.async_engine import AsyncEngine
from warmfront.coordinator.engine.engine import Engine
from warmfront.shared.config import Sampling

pytestmark = pytest.mark.usefixtures("compiled")

RNG = np.random.default_rng(11)
SHARED = RNG.integers(5, 250, 100).tolist()
# Short and long, of several jobs, and some that begin alike: for three pages, within a page, all of it.
PROMPTS = [
    [7],
    SHARED,
    [*SHARED[:98], 6, 9],
    RNG.integers(5, 250, 330).tolist(),
    [*SHARED, 8],
    SHARED[:40],
    RNG.integers(5, 250, 33).tolist(),
    [*SHARED[:64]],
]
COUNT = 20
MAKER = Path(__file__).parents[2] / "scripts" / "make_synthetic_model.py"


def alone(engine: Engine, sampling: Sampling | None = None) -> list[list[int]]:
    """The tokens that each prompt gets from an empty cache."""
    answers = []
    for ids in PROMPTS:
        engine.reset()
        tokens = engine.generate(ids, max_new_tokens=COUNT, ignore_eos=True, sampling=sampling)
        answers.append([token.id for token in tokens])
    return answers


async def together(engine: AsyncEngine, which: Sequence[int], sampling: Sampling | None = None) -> list[list[int]]:
    async def one(number: int) -> list[int]:
        options: dict[str, Any] = {"max_new_tokens": COUNT, "ignore_eos": True, "sampling": sampling}
        return [token.id async for token in engine.generate(PROMPTS[number], **options)]

    return await asyncio.gather(*map(one, which))


def assert_as_alone(engine: Engine, sampling: Sampling | None = None) -> list[list[int]]:
    """1, 3 and 8 at a time, in orders that share pages differently; closes the engine."""
    expected = alone(engine, sampling)
    most = 0

    async def rounds() -> None:
        nonlocal most
        async with AsyncEngine(engine) as served:

            def count(tokens: int) -> None:
                nonlocal most
                most = max(most, tokens)

            served.after_pass = count
            for which in ((1,), (1, 2, 4), range(8), range(7, -1, -1), (3, 0, 3), (4,)):
                assert await together(served, which, sampling) == [expected[number] for number in which]

    asyncio.run(rounds())
    if engine.session.single:
        assert most == 1
    else:
        assert most == 8
        assert engine.session.pages.used == 0, "pages of texts that are over"
    return expected


def test_greedy_tokens(tiny_llama: Callable[..., Path]) -> None:
    folder = tiny_llama()
    answers = assert_as_alone(Engine.load(str(folder), dtype="f32", context=400, parallel=8))
    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    for ids, tokens in zip(PROMPTS, answers, strict=True):
        assert tokens == choices(model, ids, tokens)[:-1]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sparse model with predictors."""
    folder = tmp_path_factory.mktemp("texts") / "made"
    shape = {"hidden": 256, "layers": 2, "ffn": 1024, "heads": 4, "kv-heads": 2, "vocab": 512, "rank": 31}
    sizes = [f"--{name}={size}" for name, size in shape.items()]
    subprocess.run([sys.executable, MAKER, folder, *sizes, "--formats=hf"], check=True, capture_output=True)
    return folder / "hf"


@pytest.mark.parametrize(
    "options",
    [
        {"selector": "lowrank", "dtype": "q8", "kv": "q8"},
        {"selector": "exact", "dtype": "q4", "gpu": "host", "vram_budget": 3_000_000, "verify": True},
        {"selector": "core", "keep": 0.5, "dtype": "f16"},
        {"selector": "lowrank", "dtype": "f16", "attention": "host"},
    ],
    ids=["lowrank", "exact-gpu", "core", "torch"],
)
def test_with_selectors(made: Path, options: dict[str, Any]) -> None:
    engine = Engine.load(str(made), context=400, parallel=8, **options)
    if options.get("attention") == "host":
        # A token a pass: nothing is promised to the bit, but each text has its own keys and values.
        expected = alone(engine)

        async def rounds() -> list[list[int]]:
            async with AsyncEngine(engine) as served:
                return await together(served, range(8))

        assert asyncio.run(rounds()) == expected
        return
    assert_as_alone(engine)


def test_a_seed_is_a_requests_own(tiny_llama: Callable[..., Path]) -> None:
    sampling = Sampling(temperature=1.5, top_k=50, seed=4)
    assert_as_alone(Engine.load(str(tiny_llama()), dtype="f16", context=400, parallel=8), sampling)
