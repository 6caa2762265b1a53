"""What is kept of the dense model's distributions, and comparisons with it, against float64; pieces of texts.

pytest tests/coordinator/measure/test_forced_decode.py
"""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from warmfront.coordinator.measure.evaluate import cut
from warmfront.coordinator.measure.forced_decode import TOP, Reference, compare, neurons_of, reference_of
from warmfront.coordinator.measure.selector_wishes import overrides_of
from warmfront.shared.errors import UsageError
from warmfront.shared.model.architecture import Experts


def log_softmax(logits: np.ndarray) -> np.ndarray:
    wide = logits.astype(np.float64)
    return np.asarray(wide - np.log(np.exp(wide).sum()))


def referred(logprobs: np.ndarray) -> Reference:
    tokens, kept, rest = reference_of(logprobs)
    return Reference(tokens[None], kept[None], np.array([rest]))


@pytest.mark.parametrize(("vocab", "least"), [(300, 1 - 1e-5), (TOP, 1 - 1e-5), (4 * TOP, 0.97)])
def test_divergence(vocab: int, least: float) -> None:
    """Exact for a vocabulary that is kept whole; else at most the true one, and near it."""
    random = np.random.default_rng(vocab)
    for scale in (0.01, 0.3, 2.0):
        logits = 3 * random.standard_normal(vocab)
        dense, other = log_softmax(logits), log_softmax(logits + scale * random.standard_normal(vocab))
        true = float((np.exp(dense) * (dense - other)).sum())
        found = compare(referred(dense), 0, other)
        # What is kept is float32.
        assert least * true - 1e-7 <= found.divergence <= true * (1 + 1e-5) + 1e-7
        assert found.agrees == (dense.argmax() == other.argmax())


def test_a_distribution_agrees_with_itself() -> None:
    dense = log_softmax(np.random.default_rng(0).standard_normal(5000))
    found = compare(referred(dense), 0, dense)
    assert found.agrees
    assert abs(found.divergence) < 1e-6  # of float32


def test_the_rest_may_have_no_probability_left() -> None:
    dense = log_softmax(np.zeros(2 * TOP))
    other = np.full(2 * TOP, -np.inf)
    other[referred(dense).tokens[0]] = -np.log(TOP)
    assert compare(referred(dense), 0, other).divergence > 100


def spec(ffn: int, experts: Experts | None = None) -> Any:
    feed_forward = SimpleNamespace(experts=experts)
    return SimpleNamespace(layers=2, ffn=ffn, architecture=SimpleNamespace(feed_forward=feed_forward))


def test_padding_is_no_neuron() -> None:
    assert np.bitwise_count(neurons_of(spec(80), 3)).sum(1).tolist() == [80, 80]
    mixture = Experts(number=3, active=1, shared=40, dense_layers=(0,), dense=100)
    words = neurons_of(spec(48, mixture), 8)
    assert np.bitwise_count(words).sum(1).tolist() == [100, 40 + 3 * 48]
    assert words[1].tolist() == [0xFFFFFFFF, 0xFF, *[0xFFFFFFFF, 0xFFFF] * 3]


def test_pieces() -> None:
    texts = [[1, *range(10, 21)], [1, 30, 31, 32], [1, 40]]
    # Each begins with what texts begin with; of the last of a text too little may be left.
    assert cut(texts, [1], 5, 2, 100) == [[1, 10, 11, 12, 13], [1, 14, 15, 16, 17], [1, 18, 19, 20], [1, 30, 31, 32]]
    assert cut(texts, [1], 5, 2, 9) == [[1, 10, 11, 12, 13], [1, 14, 15, 16]]
    assert cut([[5, 6, 7]], [], 8, 1, 100) == [[5, 6, 7]]
    assert cut([[5, 6, 7]], [], 8, 2, 100) == []


def test_wishes() -> None:
    assert overrides_of("exact") == {"selector": "exact"}
    assert overrides_of("lowbit:0.9") == {"selector": "lowbit", "recall": 0.9}
    assert overrides_of("core|lowbit:0.3") == {"selector": "core|lowbit", "keep": 0.3}


@pytest.mark.parametrize(
    ("wish", "words"),
    [
        ("some", ["'some'", "lowrank"]),
        ("", ["''", "lowrank"]),
        ("exact:0.5", ["'exact:0.5'", "lowbit:0.98"]),
        ("lowbit:much", ["'much'", "lowbit:0.98"]),
        ("lowbit:1.5", ["recall", "1.5"]),
        ("lowbit:nan", ["recall"]),
    ],
)
def test_wrong_wishes(wish: str, words: list[str]) -> None:
    with pytest.raises(UsageError) as error:
        overrides_of(wish)
    for word in words:
        assert word in str(error.value)
