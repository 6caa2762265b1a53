"""The estimate of activity and the homes' margin.  pytest tests/coordinator/balancing/test_activity.py"""

import numpy as np
import pytest

from warmfront.coordinator.balancing.activity import ActivityEstimate, Margin
from warmfront.coordinator.balancing.interface import BalancerState

SHAPE = (4, 50)


def rates(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).gamma(0.5, 1e5, SHAPE)


def error(found: np.ndarray, true: np.ndarray) -> float:
    return float(np.linalg.norm(found - true) / np.linalg.norm(true))


def test_while_nothing_changes_the_long_run_is_expected() -> None:
    rng, true = np.random.default_rng(0), rates(1)
    estimate = ActivityEstimate(true, 512, 20, 16)
    errors = []
    for _ in range(300):
        estimate.observe(true * rng.exponential(1.0, SHAPE))
        errors.append(error(estimate.expected_load, true))
    # An average over 20 tokens alone would be off by 1 / sqrt(40).
    assert np.mean(errors) < 0.5 / np.sqrt(40)


def test_after_a_change_the_last_tokens_are() -> None:
    rng, true = np.random.default_rng(0), rates(2)
    estimate = ActivityEstimate(rates(1), 512, 20, 16)
    for token in range(64):
        estimate.observe(true * rng.exponential(1.0, SHAPE))
        if token == 31:
            # The last tokens know all but exp(-32 / 20), and are trusted.
            assert error(estimate.expected_load, true) < 0.4 * error(rates(1), true)
    assert error(estimate.expected_load, true) < 0.3


def state(costs: list[tuple[float, float]], homes: int) -> BalancerState:
    held = np.ones((len(costs), *SHAPE), bool)
    none = np.zeros(len(costs), np.int64)
    is_home = np.arange(len(costs)) < homes
    return BalancerState(np.zeros(SHAPE, np.uint8), held, held, none, is_home, np.array(costs), 1.0, 0, False)


@pytest.mark.parametrize("ratio", [2.0, 4.0, 20.0])
def test_no_other_margin_makes_the_mean_layer_faster(ratio: float) -> None:
    rng = np.random.default_rng(3)
    costs = [(0.0, 0.2), (0.0, 0.2 / ratio)]
    owner = np.zeros(SHAPE, np.uint8)
    owner[:, 25:] = 1
    margin = Margin(SHAPE[0], 1000)
    margin.watch(state(costs, 1), owner)
    bytes_read = rng.normal(1000, 300, (2000, *SHAPE))
    for read in bytes_read:
        margin.observe(read)
    home, cache = 0.2 * bytes_read[:, 0, :25].sum(1), 0.2 / ratio * bytes_read[:, 0, 25:].sum(1)

    def mean_time(ahead: float) -> float:
        """With bytes moved such that the home is `ahead` ns earlier than the cache."""
        moved = (home.mean() - cache.mean() + ahead) / (0.2 + 0.2 / ratio)
        return float(np.maximum(home - 0.2 * moved, cache + 0.2 / ratio * moved).mean())

    best = min(mean_time(ahead) for ahead in np.linspace(-2000, 4000, 601))
    assert margin.ns.shape == SHAPE[:1]
    assert mean_time(margin.ns[0]) - best < 0.05 * (mean_time(0.0) - best)


def test_workers_alone_need_no_margin() -> None:
    margin = Margin(SHAPE[0], 64)
    for token in range(20):
        margin.observe(rates(token))
    assert not margin.ns.any()
    margin.watch(state([(0.0, 0.2), (0.0, 0.1)], 2), np.zeros(SHAPE, np.uint8))
    for token in range(20):
        margin.observe(rates(token))
    assert not margin.ns.any()
