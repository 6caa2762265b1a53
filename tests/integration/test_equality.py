"""Tokens and logits equal those of transformers in float32.  pytest tests/integration/test_equality.py"""

from collections.abc import Callable, Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.integration.command import needs_two_cores
from tests.integration.gpu import budget_for
from tests.integration.reference import all_logits, choices, llama_from_folder
from warmfront.coordinator.engine.engine import Engine

STORY = (
    "The lighthouse keeper wrote in his diary that the sea had been calm for twelve days, and that the supply boat "
    "had come on the third of them with oil, flour and two letters. The first letter was from his sister. "
)
PROMPTS = (
    "The capital of France is",
    "def fibonacci(n):",
    "<|im_start|>user\nWhy is the sky blue?<|im_end|>\n<|im_start|>assistant\n",
    "1, 2, 3, 4, 5, 6, 7,",
    STORY * 7,  # several prefill jobs
)
FOLLOW_UP = "<|im_end|>\n<|im_start|>user\nAnd at night?<|im_end|>\n<|im_start|>assistant\n"
NEW_TOKENS = 64
# A policy that leaves the GPU what it begins with, though these models would be faster without.
GPU = {"gpu": "host", "policy": "static"}


def tokens_of(engine: Engine, ids: Sequence[int], count: int = NEW_TOKENS) -> list[int]:
    return [token.id for token in engine.generate(ids, max_new_tokens=count)]


@cache
def chosen(model: Any, ids: tuple[int, ...], answer: tuple[int, ...]) -> list[int]:
    """`choices`, found out once for all engines that answer alike."""
    return choices(model, ids, answer)


def assert_greedy(engine: Engine, model: Any, ids: Sequence[int], answer: list[int]) -> None:
    """`answer` is what `model` would say, up to where it would end: its last token if that brought held back text."""
    *expected, after = chosen(model, tuple(ids), tuple(answer))
    assert answer == expected
    if len(answer) < NEW_TOKENS:
        assert {answer[-1], after} & engine.tokenizer.end_ids


def assert_same_logits(engine: Engine, model: Any, ids: Sequence[int], prefill: int) -> None:
    """After the prefill and after each forced token, within a ten-thousandth of the largest logit."""
    ours = np.stack(list(engine.forced_logits(ids, prefill)))
    theirs = all_logits(model, ids)[prefill - 1 :]
    assert ours.shape == theirs.shape
    error = np.abs(ours - theirs).max(1) / np.abs(theirs).max(1)
    assert error.max() < 1e-4, f"relative error {error.max():.1e} after token {prefill - 1 + int(error.argmax())}"


def assert_gpu_has_a_third(engine: Engine) -> None:
    """The budget gives this many slots, and they were used."""
    workers = engine.statistics.workers()
    assert workers[-1].name == "gpu0"
    assert workers[-1].neurons > 0
    slots = engine.session.runtime.supervisor.readies["gpu0"].slots
    assert slots == sum(worker.groups for worker in workers) // 3
    assert workers[-1].groups == slots


@pytest.fixture(
    scope="module",
    params=[
        {"workers": 1},
        pytest.param({"workers": 2}, marks=needs_two_cores),
        {"workers": 1, **GPU, "vram_budget": budget_for(30 * 48 // 3, hidden=576, ffn=1536, context=8192)},
    ],
    ids=["one worker", "two workers", "gpu"],
)
def engine(request: pytest.FixtureRequest, smollm2: Path) -> Iterator[Engine]:
    """The default model with its own weights in float32."""
    with Engine.load(str(smollm2), dtype="f32", **request.param) as engine:
        yield engine


@pytest.mark.slow
@pytest.mark.parametrize("prompt", PROMPTS, ids=["fact", "code", "chat", "numbers", "story"])
def test_smollm2_greedy_tokens(engine: Engine, smollm2_in_transformers: Any, prompt: str) -> None:
    ids = engine.prompt_ids(prompt)
    assert_greedy(engine, smollm2_in_transformers, ids, tokens_of(engine, ids))


@pytest.mark.slow
def test_smollm2_logits(engine: Engine, smollm2_in_transformers: Any) -> None:
    assert_same_logits(engine, smollm2_in_transformers, engine.prompt_ids(STORY), prefill=20)
    if engine.plan.config.gpu == "host":
        assert_gpu_has_a_third(engine)


@pytest.mark.slow
def test_a_conversation_goes_on_from_the_cache(engine: Engine, smollm2_in_transformers: Any) -> None:
    first = engine.prompt_ids(PROMPTS[2])
    answer = tokens_of(engine, first)
    second = first + answer + engine.tokenizer.encode(FOLLOW_UP)
    assert_greedy(engine, smollm2_in_transformers, second, tokens_of(engine, second))
    # The last token of an answer is never put in: nothing follows it.
    assert engine.stats.prefilled == len(second) - len(first) - len(answer) + 1


RELU = {"hidden_act": "relu", "intermediate_size": 400, "num_hidden_layers": 3}  # the last group is not full
TINY_THIRD = budget_for(3 * 13 // 3, hidden=64, ffn=400)
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
# The most that the tiny models see: prompts with every kind of token, and their answers stay inside the context.
SHORT = [5, 17, 200, 42, 101, 7, 250, 33]
LONG = [3 + (7 * i + i // 13) % 290 for i in range(300)]


@pytest.fixture(scope="session")
def in_transformers() -> Callable[[Path], Any]:
    """The reference of a folder, loaded once."""
    models: dict[Path, Any] = {}

    def load(folder: Path) -> Any:
        if folder not in models:
            models[folder] = llama_from_folder(folder)
        return models[folder]

    return load


def assert_equal_throughout(engine: Engine, model: Any) -> None:
    """A short and a long prompt: greedy tokens, and logits of prefill and of decode."""
    lengths: list[int] = []
    for ids, prefill in ((SHORT, 3), (LONG, 280)):
        answer = tokens_of(engine, ids)
        assert_greedy(engine, model, ids, answer)
        lengths.append(len(answer))
        assert_same_logits(engine, model, ids, prefill)
    assert sum(lengths) > 5, "the answers are too short to tell anything: change the prompts"


@pytest.mark.parametrize("selector", ["all", "exact"])
@pytest.mark.parametrize(
    "overrides",
    [
        {"workers": 1},
        pytest.param({"workers": 2}, marks=needs_two_cores),
        {"workers": 1, **GPU, "vram_budget": TINY_THIRD},
        pytest.param({"workers": 2, **GPU, "vram_budget": TINY_THIRD}, marks=needs_two_cores),
    ],
    ids=["one worker", "two workers", "gpu", "two workers and gpu"],
)
def test_relu(
    tiny_llama: Callable[..., Path], in_transformers: Callable[[Path], Any], overrides: dict[str, Any], selector: str
) -> None:
    folder = tiny_llama(**RELU)
    with Engine.load(str(folder), dtype="f32", selector=selector, **overrides) as engine:
        assert_equal_throughout(engine, in_transformers(folder))
        if "gpu" in overrides:
            assert_gpu_has_a_third(engine)
        active = engine.statistics.active_fraction(engine.statistics.workers())
        assert active is not None
        assert active == 1 if selector == "all" else 0.2 < active < 0.8


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"hidden_act": "gelu"},
        {"hidden_act": "gelu_new"},
        {"hidden_act": "gelu_pytorch_tanh"},
        {"attention_bias": True},
        {"tie_word_embeddings": True},
        {"rope_parameters": LLAMA3},
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}},
        {"dtype": "bfloat16"},
        {"dtype": "float16"},
        {"head_dim": 32},
        {"head_dim": 8},
        {"num_key_value_heads": 4},
        {"num_key_value_heads": 1},
        {"hidden_act": "relu", "attention_bias": True, "tie_word_embeddings": True, "dtype": "bfloat16"},
    ],
    ids=lambda options: (
        " ".join(f"{k}={v['rope_type'] if isinstance(v, dict) else v}" for k, v in options.items()) or "silu"
    ),
)
def test_variants(
    tiny_llama: Callable[..., Path], in_transformers: Callable[[Path], Any], options: dict[str, Any]
) -> None:
    folder = tiny_llama(**options)
    with Engine.load(str(folder), dtype="f32") as engine:
        assert_equal_throughout(engine, in_transformers(folder))


@pytest.mark.parametrize("overrides", [{}, {**GPU, "vram_budget": TINY_THIRD}], ids=["cpu", "gpu"])
def test_prompts_that_share_a_beginning(
    tiny_llama: Callable[..., Path], in_transformers: Callable[[Path], Any], overrides: dict[str, Any]
) -> None:
    folder = tiny_llama(**RELU)
    model = in_transformers(folder)
    with Engine.load(str(folder), dtype="f32", **overrides) as engine, Engine.load(str(folder), dtype="f32") as fresh:
        answer = tokens_of(engine, LONG[:150])
        kept = 150 + len(answer) - 1
        longer = LONG[:150] + answer + [9, 8, 7]
        parting = [*LONG[:140], 9, 8, 7]
        for ids, prefilled in ((longer, len(longer) - kept), (parting, 3), (parting, 1), (SHORT, len(SHORT))):
            tokens = tokens_of(engine, ids)
            assert engine.stats.prefilled == prefilled
            fresh.reset()
            assert tokens == tokens_of(fresh, ids)
            assert fresh.stats.prefilled == len(ids)
            assert_greedy(engine, model, ids, tokens)
