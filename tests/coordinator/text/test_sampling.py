"""The sampler against transformers' logits processors.  pytest tests/coordinator/text/test_sampling.py

What the filters leave, and with what probability, is computed by transformers in float64; the draws of the sampler
must fit that by the chi-square test. Seeds are fixed: a failure is no bad luck.
"""

import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from warmfront.coordinator.text.sampling import Sampler, token_logprobs
from warmfront.shared.config import Sampling
from warmfront.shared.errors import ModelError

VOCAB, DRAWS = 40, 6000
SEEN = [3, 7, 7, 12, 39, 0]


def logits_of(seed: int, size: int = VOCAB) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, 2, size).astype(np.float32)


def reference(logits: np.ndarray, seen: list[int], sampling: Sampling) -> np.ndarray:
    """The probability of each token."""
    steps = LogitsProcessorList()
    if sampling.repetition_penalty != 1:
        steps.append(RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty))
    steps.append(TemperatureLogitsWarper(float(sampling.temperature)))
    if sampling.top_k:
        steps.append(TopKLogitsWarper(sampling.top_k))
    if sampling.top_p < 1:
        steps.append(TopPLogitsWarper(sampling.top_p))
    if sampling.min_p:
        steps.append(MinPLogitsWarper(sampling.min_p))
    scores = steps(torch.tensor([seen], dtype=torch.long), torch.tensor(logits[None], dtype=torch.float64))
    return np.asarray(torch.softmax(scores[0], 0).numpy())


def draws(logits: np.ndarray, sampling: Sampling, seen: list[int] | None = None, count: int = DRAWS) -> list[int]:
    sampler = Sampler(sampling)
    return [sampler.pick(logits, seen or []) for _ in range(count)]


def assert_fits(tokens: list[int], probabilities: np.ndarray) -> None:
    """Chi-square over the tokens that should come five times or more, the others as one; p above about 1e-6."""
    counts, expected = np.bincount(tokens, minlength=probabilities.size), probabilities * len(tokens)
    assert not counts[expected == 0].any(), "a token came that the filters remove"
    often = expected >= 5
    seen = np.append(counts[often], counts[~often].sum())
    wanted = np.append(expected[often], expected[~often].sum())
    seen, wanted = seen[wanted > 0], wanted[wanted > 0]
    statistic, freedom = float(((seen - wanted) ** 2 / wanted).sum()), seen.size - 1
    # Wilson and Hilferty: the cube root is nearly normal.
    if freedom:
        spread = 2 / (9 * freedom)
        assert ((statistic / freedom) ** (1 / 3) - (1 - spread)) / math.sqrt(spread) < 4.75


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 1},
        {"temperature": 0.5},
        {"temperature": 3},
        {"temperature": 1, "top_k": 5},
        {"temperature": 1, "top_k": 1},
        {"temperature": 1, "top_k": 1000},
        {"temperature": 1, "top_p": 0.8},
        {"temperature": 2, "top_p": 0.05},
        {"temperature": 1.5, "min_p": 0.1},
        {"temperature": 1, "min_p": 1},
        {"temperature": 1, "repetition_penalty": 1.8},
        {"temperature": 1, "repetition_penalty": 0.6},
        {"temperature": 1.4, "top_k": 20, "top_p": 0.9, "min_p": 0.03, "repetition_penalty": 1.3},
        {"temperature": 2, "top_k": 12, "top_p": 0.7},
        {"temperature": 1.2, "top_p": 0.95, "min_p": 0.2},
    ],
)
def test_distribution(options: dict[str, Any]) -> None:
    sampling = Sampling(seed=1, **options)
    logits = logits_of(5)
    assert_fits(draws(logits, sampling, SEEN), reference(logits, SEEN, sampling))


def test_the_check_of_the_distribution_can_fail() -> None:
    """Draws at another temperature, or with top_k off by one, do not fit."""
    logits = logits_of(5)
    for drawn, claimed in (
        (Sampling(seed=1, temperature=1), Sampling(temperature=1.1)),
        (Sampling(seed=1, temperature=1, top_k=6), Sampling(temperature=1, top_k=5)),
        (Sampling(seed=1, temperature=1, top_k=5), Sampling(temperature=1, top_k=6)),
    ):
        with pytest.raises(AssertionError):
            assert_fits(draws(logits, drawn), reference(logits, [0], claimed))


@pytest.mark.parametrize("penalty", [1.0, 1.5, 0.7])
def test_greedy(penalty: float) -> None:
    """Whatever the filters say: the largest logit after the penalty."""
    sampler = Sampler(Sampling(temperature=0, top_k=3, top_p=0.5, repetition_penalty=penalty))
    differs = 0
    for seed in range(200):
        logits, seen = logits_of(seed), list(np.random.default_rng(seed).integers(0, VOCAB, 15))
        scores = torch.tensor(logits[None])
        if penalty != 1:
            scores = RepetitionPenaltyLogitsProcessor(penalty)(torch.tensor(np.array([seen])), scores)
        assert sampler.pick(logits, seen) == int(scores.argmax())
        differs += int(scores.argmax()) != int(logits.argmax())
    assert (differs > 0) == (penalty != 1)


def test_equal_logits_greedily_give_the_first() -> None:
    assert Sampler(Sampling()).pick(np.zeros(5, np.float32), []) == 0


@pytest.mark.parametrize("temperature", [0, 1])
def test_the_logits_are_left_alone(temperature: float) -> None:
    logits = logits_of(1)
    before = logits.copy()
    Sampler(Sampling(temperature=temperature, top_k=4, repetition_penalty=1.5)).pick(logits, SEEN)
    np.testing.assert_array_equal(logits, before)


def test_the_penalty_counts_a_token_once() -> None:
    logits = np.array([2.0, 1.5], np.float32)
    sampler = Sampler(Sampling(repetition_penalty=1.2))
    assert sampler.pick(logits, [0] * 50) == 0


def test_a_seed_repeats_the_draws() -> None:
    logits, sampling = logits_of(2), Sampling(temperature=1, seed=77)
    first = draws(logits, sampling, count=50)
    assert draws(logits, sampling, count=50) == first
    assert draws(logits, Sampling(temperature=1, seed=78), count=50) != first
    assert len(set(first)) > 5


def test_without_a_seed_draws_differ() -> None:
    logits, sampling = logits_of(2), Sampling(temperature=1)
    assert draws(logits, sampling, count=50) != draws(logits, sampling, count=50)


def test_large_logits_do_not_overflow() -> None:
    logits = np.array([3e38, -3e38, 2.9e38], np.float32)
    assert draws(logits, Sampling(temperature=0.01, top_p=0.9, seed=0), count=20) == [0] * 20


@pytest.mark.parametrize("draw", [0.0, 1 - 2.0**-53])
@pytest.mark.parametrize("options", [{}, {"top_p": 0.999999}, {"min_p": 1e-12}, {"top_k": 9000}])
def test_the_extreme_draws_give_a_token(draw: float, options: dict[str, Any]) -> None:
    """The sum of many weights depends on the order of adding: the last draw must not fall beyond the last token."""

    class Fixed:
        def random(self) -> float:
            return draw

    for seed in range(20):
        logits = logits_of(seed, 10_000)
        sampler = Sampler(Sampling(temperature=1, **options))
        sampler._random = Fixed()  # type: ignore[assignment]
        token = sampler.pick(logits, [])
        assert (token == logits.argmax()) == (draw == 0)


@pytest.mark.parametrize("size", [1, 65, 5003])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"top_k": 50},
        {"top_k": 1900},
        {"top_p": 0.3},
        {"top_p": 0.9},
        {"top_p": 0.999},
        {"min_p": 0.02},
        {"top_k": 400, "top_p": 0.8, "min_p": 0.01, "repetition_penalty": 1.2},
    ],
)
@pytest.mark.parametrize("spread", [1.5, 4])
def test_what_the_filters_leave_of_large_vocabularies(options: dict[str, Any], size: int, spread: float) -> None:
    """Evenly spread draws give each token as often as its probability in float64 says."""
    count = 1000
    logits = (np.random.default_rng(size).normal(0, spread, size)).astype(np.float32)
    seen, sampling = [0, size // 2, size - 1], Sampling(temperature=0.8, **options)
    probabilities = reference(logits, seen, sampling)
    sampler = Sampler(sampling)
    points = iter((np.arange(count) + 0.5) / count)
    sampler._random = SimpleNamespace(random=lambda: next(points))  # type: ignore[assignment]
    counts = np.bincount([sampler.pick(logits, seen) for _ in range(count)], minlength=size)
    assert counts.size == size
    assert not counts[probabilities == 0].any()
    # A token's share of the range lies in one piece.
    np.testing.assert_allclose(counts, probabilities * count, rtol=1e-5, atol=1 + 1e-3)


@pytest.mark.parametrize(
    "options",
    [{"top_p": 0.95}, {"top_k": 40, "top_p": 0.95, "min_p": 0.05, "repetition_penalty": 1.1}, {"min_p": 0.05}, {}],
)
def test_the_vocabulary_is_not_sorted(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Sorting 128,256 logits takes longer than a small model takes for the token."""
    logits = logits_of(3, 128_256)
    logits[:50] += np.linspace(0, 12, 50, dtype=np.float32)  # as in a language model, a few stand out
    sizes = []
    for name in ("sort", "argsort", "partition", "argpartition", "unique", "cumsum"):
        original = getattr(np, name)

        def spy(values: Any, *args: Any, original: Any = original, **options: Any) -> Any:
            sizes.append(len(values))
            return original(values, *args, **options)

        monkeypatch.setattr(np, name, spy)
    sampler, seen = Sampler(Sampling(temperature=0.8, seed=1, **options)), list(range(4000))
    sampler.pick(logits, seen)  # counts the prompt
    sizes.clear()
    for _ in range(5):
        seen.append(sampler.pick(logits, seen))
    assert sum(sizes) < 5 * 9000


@pytest.mark.parametrize("temperature", [5e-324, 1e-308, 1e-40, 1e-31, 1e-12])
@pytest.mark.parametrize("options", [{}, {"top_p": 0.5}, {"top_k": 3}, {"min_p": 0.1}, {"repetition_penalty": 1.5}])
def test_the_least_temperatures_are_greedy(temperature: float, options: dict[str, Any]) -> None:
    for seed in range(20):
        logits = logits_of(seed, 300)
        greedy = Sampler(Sampling(repetition_penalty=options.get("repetition_penalty", 1))).pick(logits, SEEN)
        assert Sampler(Sampling(temperature=temperature, seed=seed, **options)).pick(logits, SEEN) == greedy


def test_the_least_temperature_draws_no_lots() -> None:
    assert set(draws(np.zeros(50, np.float32), Sampling(temperature=1e-308, seed=1), count=20)) == {0}


def test_the_greatest_temperature_is_even() -> None:
    assert_fits(draws(logits_of(1), Sampling(temperature=1e308, seed=1)), np.full(VOCAB, 1 / VOCAB))


@pytest.mark.parametrize("penalty", [0.01, 100])
def test_a_penalty_does_not_overflow(penalty: float) -> None:
    logits = np.array([3e38, -3e38, 2e38, -2e38], np.float32)
    for temperature in (0, 1):
        sampler = Sampler(Sampling(temperature=temperature, repetition_penalty=penalty, seed=1))
        assert sampler.pick(logits, [0, 1]) == (0 if penalty < 1 else 2)


@pytest.mark.parametrize(
    "options", [{}, {"temperature": 1}, {"temperature": 1, "top_k": 5}, {"temperature": 1, "top_p": 0.1}]
)
@pytest.mark.parametrize("wrong", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("at", [0, 17, 39])
def test_logits_that_are_not_finite(options: dict[str, Any], wrong: float, at: int) -> None:
    logits = logits_of(1)
    logits[at] = wrong
    with pytest.raises(ModelError, match="logits that are not finite"):
        Sampler(Sampling(seed=1, repetition_penalty=1.1, **options)).pick(logits, SEEN)


def test_a_growing_answer_is_penalised_as_a_whole_one() -> None:
    """Counts of a growing list are kept; another list, or one that has shrunk, is counted from the start."""
    kept, seen = Sampler(Sampling(repetition_penalty=3)), [5, 5]
    for seed in range(60):
        logits = logits_of(seed)
        token = kept.pick(logits, seen)
        assert token == Sampler(Sampling(repetition_penalty=3)).pick(logits, list(seen))
        seen.append(token)
        if seed == 30:
            del seen[4:]
        if seed == 45:
            seen = [1] * len(seen)


@pytest.mark.parametrize("count", [0, 1, 5, 39, 40, 100])
def test_log_probabilities(count: int) -> None:
    logits = logits_of(6)
    expected = torch.log_softmax(torch.tensor(logits, dtype=torch.float64), 0)
    own, top = token_logprobs(logits, 7, count)
    assert own == pytest.approx(float(expected[7]), abs=1e-12)
    values, order = torch.topk(expected, min(count, VOCAB))
    assert [token for token, _ in top] == order.tolist()
    assert [value for _, value in top] == pytest.approx(values.tolist(), abs=1e-12)
