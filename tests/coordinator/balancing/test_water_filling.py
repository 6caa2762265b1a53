"""Even loads against brute force.  pytest tests/coordinator/balancing/test_water_filling.py"""

import numpy as np
import pytest

from warmfront.coordinator.balancing.water_filling import even_loads, job_ns, select_heaviest


def poured(costs: np.ndarray, total: float, caps: np.ndarray) -> np.ndarray:
    """The loads of one layer, by bisection of the level."""
    low, high = 0.0, float((costs[:, 0] + costs[:, 1] * total).max()) + 1
    for _ in range(200):
        middle = (low + high) / 2
        loads = np.clip((middle - costs[:, 0]) / costs[:, 1], 0, caps)
        low, high = (middle, high) if loads.sum() < total else (low, middle)
    return loads


@pytest.mark.parametrize("workers", [1, 2, 5])
@pytest.mark.parametrize("capped", [False, True])
def test_even_loads_are_what_halving_finds(workers: int, capped: bool) -> None:
    rng = np.random.default_rng(workers)
    costs = np.column_stack((rng.uniform(0, 1e5, workers), rng.uniform(0.01, 0.3, workers)))
    total = np.concatenate(([0.0, 1.0], rng.uniform(0, 3e6, 30)))
    caps = np.full((workers, len(total)), np.inf)
    if capped:
        caps[1:] = rng.uniform(0, 1e6, (workers - 1, len(total)))
        caps[1:, ::3] = 0
    loads = even_loads(costs, total, caps if capped else None)
    for column, amount in enumerate(total):
        np.testing.assert_allclose(loads[:, column], poured(costs, amount, caps[:, column]), atol=1e-3)
    np.testing.assert_allclose(loads.sum(0), total, atol=1e-3)


def test_no_other_split_is_faster() -> None:
    rng = np.random.default_rng(7)
    costs = np.array([[10e3, 0.2], [60e3, 0.05], [5e3, 0.4]])
    best = job_ns(costs, even_loads(costs, np.array([1e6])))[:, 0].max()
    for split in rng.dirichlet(np.ones(3), 2000):
        assert job_ns(costs, split[:, None] * 1e6)[:, 0].max() >= best - 1e-6


def test_time_added_to_a_worker_counts() -> None:
    costs, total = np.array([[10.0, 0.2], [60.0, 0.05]]), np.array([1e3, 1e4])
    extra = np.array([[5.0, 50.0], [0.0, 0.0]])
    for layer in range(2):
        dearer = costs + np.array([[extra[0, layer], 0.0], [0.0, 0.0]])
        np.testing.assert_allclose(even_loads(costs, total, None, extra)[:, layer], even_loads(dearer, total)[:, layer])


def test_a_worker_whose_job_takes_longer_than_all_gets_nothing() -> None:
    loads = even_loads(np.array([[0.0, 0.1], [1e6, 0.001]]), np.array([1e6, 1e8]))
    assert loads[1, 0] == 0
    assert loads[1, 1] > 8e7


def test_what_the_caps_do_not_hold_is_left_out() -> None:
    loads = even_loads(np.array([[0.0, 0.1], [0.0, 0.2]]), np.array([100.0]), np.array([[30.0], [20.0]]))
    np.testing.assert_allclose(loads, [[30.0], [20.0]])


def test_select_heaviest_takes_the_heaviest_up_to_the_limit() -> None:
    rng = np.random.default_rng(8)
    weights = rng.exponential(1.0, (50, 12))
    allowed = rng.random(weights.shape) < 0.7
    limit = rng.uniform(-1, 8, 50)
    taken = select_heaviest(weights, limit, allowed)
    assert not (taken & ~allowed).any()
    for layer in range(50):
        heaviest = sorted(weights[layer][allowed[layer]], reverse=True)
        sums = np.concatenate(([0.0], np.cumsum(heaviest)))
        nearest = int(np.abs(sums - limit[layer]).argmin())
        assert sorted(weights[layer][taken[layer]], reverse=True) == heaviest[:nearest]


def test_of_equal_weights_as_many_are_taken_as_fit() -> None:
    weights = np.array([[1.0, 2.0, 2.0, 2.0, 2.0, 1.0], [3.0] * 6, [0.0] * 6])
    taken = select_heaviest(weights, np.array([5.5, 9.1, 0.0]), np.arange(6) != np.full((3, 1), 2))
    np.testing.assert_array_equal(taken, np.array([[0, 1, 0, 1, 1, 0], [1, 1, 0, 1, 0, 0], [0, 0, 0, 0, 0, 0]], bool))
