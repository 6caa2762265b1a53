"""Exponential, softmax and activations on vectors, against float64 numpy.

Run: pytest tests/shared/kernels/test_activation.py
"""

import numpy as np
import pytest

from tests.activations import NAMES, described, factors
from warmfront.shared.kernels.activation import activate_times, activation_of, exponentials, factor, softmax_rows
from warmfront.shared.kernels.jit import kernel
from warmfront.shared.machine.memory import address


@kernel
def run_exponentials(values: int, count: int, highest: float) -> float:
    return exponentials(values, count, np.float32(highest))


@kernel
def run_softmax(scores: int, count: int, state: int) -> None:
    softmax_rows(scores, count, state)


def test_exponentials() -> None:
    """Over the whole range that a softmax meets; what is far below is as good as zero."""
    values = np.concatenate((np.linspace(-87, 0, 4000), [-100, -1e30, -np.inf, 0] * 4)).astype(np.float32)
    got = values.copy()
    total = run_exponentials(address(got), got.size, 0.0)
    np.testing.assert_allclose(got, np.exp(values.astype(np.float64)), rtol=3e-7, atol=2e-38)
    assert total == pytest.approx(float(got.astype(np.float64).sum()), rel=1e-6)


def test_exponentials_of_differences() -> None:
    values = np.random.default_rng(0).normal(5, 3, 160).astype(np.float32)
    got = values.copy()
    run_exponentials(address(got), got.size, float(values.max()))
    np.testing.assert_allclose(got, np.exp(values.astype(np.float64) - values.max()), rtol=2e-6)


@pytest.mark.parametrize("activation", NAMES)
def test_nan_stays_nan(activation: str) -> None:
    values = np.array([1, np.nan, -2, 3] * 4, np.float32)
    scores, gates, ups = values.copy(), values.copy(), np.ones(16, np.float32)
    assert np.isnan(run_exponentials(address(scores), 16, 3.0))
    kind = activation_of(described(activation))
    activate_times(kind, address(gates), address(ups), 16)
    for got in (scores, gates):
        np.testing.assert_array_equal(np.isnan(got), np.isnan(values))
    assert np.isnan(factor(kind, np.float32(np.nan), np.float32(1)))
    assert np.isnan(factor(kind, np.float32(1), np.float32(np.nan)))


def test_softmax_rows() -> None:
    """In parts, some of which have no score that counts in a lane; exponentials shrink by the later parts' factors."""
    scores = np.random.default_rng(1).normal(0, 4, (50, 16)).astype(np.float32)
    scores[:30, 3] = scores[30:, 5] = -1e30
    scores[45, 7] = 80
    got, state = scores.copy(), np.zeros((3, 16), np.float32)
    state[0] = -3e38
    for first, last in ((0, 7), (7, 30), (30, 50)):
        run_softmax(address(got[first:]), last - first, address(state))
        got[:first] *= state[2]
    expected = np.exp(scores.astype(np.float64) - scores.max(0))
    np.testing.assert_allclose(got, expected, rtol=5e-6, atol=2e-36)
    np.testing.assert_allclose(state[0], scores.max(0))
    np.testing.assert_allclose(state[1], expected.sum(0), rtol=2e-6)


@pytest.mark.parametrize("activation", NAMES)
def test_activate_times(activation: str) -> None:
    gates = np.concatenate((np.linspace(-20, 20, 1000), [0, -0.0, 90, -90, 300, -300, 1e-6, -1e-6])).astype(np.float32)
    ups = np.random.default_rng(2).standard_normal(gates.size).astype(np.float32)
    got, kind = gates.copy(), activation_of(described(activation))
    activate_times(kind, address(got), address(ups), gates.size)
    expected = factors(activation, gates, ups)
    np.testing.assert_allclose(got, expected, rtol=2e-5, atol=2e-6)
    alone = [factor(kind, gate, up) for gate, up in zip(gates, ups, strict=True)]
    np.testing.assert_allclose(alone, expected, rtol=2e-5, atol=2e-6)


def test_gates_at_the_threshold_are_closed() -> None:
    for name, threshold in (("relu", 0.0), ("fatrelu:0.01", 0.01), ("fatrelu:-0.5", -0.5)):
        kind, at = activation_of(described(name)), np.float32(threshold)
        above = np.nextafter(at, np.float32(1))
        assert factor(kind, at, np.float32(1)) == 0
        assert factor(kind, above, np.float32(1)) == above
