"""Costs fitted to load reports.  pytest tests/coordinator/balancing/test_cost_model.py"""

import numpy as np
import pytest

from warmfront.coordinator.balancing.cost_model import WorkerCosts

LAYERS, JOBS = 20, 8


def report(
    rng: np.random.Generator, a: float, b: float, spread: float = 0.3, noise: float = 0.02
) -> tuple[np.ndarray, np.ndarray]:
    """busy ns and bytes of each layer over JOBS jobs; bytes of about a megabyte a job."""
    per_job = 1e6 * (1 + spread * rng.uniform(-1, 1, LAYERS))
    time = (a + b * per_job) * (1 + noise * rng.standard_normal(LAYERS))
    return JOBS * time, JOBS * per_job


def test_a_line_without_noise_is_found() -> None:
    rng = np.random.default_rng(0)
    costs = WorkerCosts(20_000.0, 0.5)
    for _ in range(6):
        costs.update(JOBS, *report(rng, 50_000, 0.2, noise=0))
    # The prior's pull on a: 0.0025 against the bytes' squared variation of 0.03.
    assert costs.job_ns == pytest.approx(50_000, rel=0.08)
    assert costs.byte_ns == pytest.approx(0.2, rel=0.02)


@pytest.mark.parametrize("seed", range(5))
def test_predicted_times_are_right_under_noise(seed: int) -> None:
    rng = np.random.default_rng(seed)
    costs = WorkerCosts(0.0, 1.0)
    for _ in range(6):
        costs.update(JOBS, *report(rng, 50_000, 0.2))
    for size in (0.7e6, 1e6, 1.3e6):
        assert costs.job_ns + costs.byte_ns * size == pytest.approx(50_000 + 0.2 * size, rel=0.03)


def test_a_hiccup_of_one_layer_changes_little() -> None:
    rng = np.random.default_rng(1)
    costs = WorkerCosts(50_000.0, 0.2)
    for number in range(8):
        busy, read = report(rng, 50_000, 0.2)
        busy[number] *= 10
        costs.update(JOBS, busy, read)
        assert costs.job_ns + costs.byte_ns * 1e6 == pytest.approx(250_000, rel=0.03)


@pytest.mark.parametrize("factor", [0.5, 2.0])
def test_another_speed_is_known_after_four_reports(factor: float) -> None:
    rng = np.random.default_rng(2)
    costs = WorkerCosts(10_000.0, 0.2)
    for _ in range(10):
        costs.update(JOBS, *report(rng, 10_000, 0.2))
    for _ in range(4):
        costs.update(JOBS, *report(rng, 10_000, 0.2 * factor))
    assert costs.byte_ns == pytest.approx(0.2 * factor, rel=0.12)
    for _ in range(4):
        costs.update(JOBS, *report(rng, 10_000, 0.2 * factor))
    assert costs.byte_ns == pytest.approx(0.2 * factor, rel=0.04)


def test_equal_layers_leave_the_cost_of_a_job_as_hinted() -> None:
    rng = np.random.default_rng(3)
    costs = WorkerCosts(60_000.0, 1.0)
    for _ in range(10):
        costs.update(JOBS, *report(rng, 40_000, 0.05, spread=0.005, noise=0.01))
    assert costs.job_ns == pytest.approx(60_000, rel=0.1)
    # What they take together is known all the same.
    assert costs.job_ns + costs.byte_ns * 1e6 == pytest.approx(90_000, rel=0.02)


def test_scattered_times_say_little_about_the_cost_of_a_job() -> None:
    """The times scatter by 30 %, the layers' bytes differ by 6 %: a byte keeps costing about what it did."""
    rng = np.random.default_rng(3)
    costs, byte_ns = WorkerCosts(20_000.0, 0.2), []
    for _ in range(40):
        costs.update(JOBS, *report(rng, 20_000, 0.2, spread=0.06, noise=0.3))
        byte_ns.append(costs.byte_ns)
    assert min(byte_ns) > 0.12
    assert max(byte_ns) < 0.28


def test_costs_stay_positive_whatever_is_reported() -> None:
    rng = np.random.default_rng(4)
    costs = WorkerCosts(60_000.0, 1.0)
    for _ in range(50):
        read = rng.uniform(0.5, 1.5, LAYERS) * 1e6
        # The more bytes, the less time; then chance.
        costs.update(1.0, 3e5 - 0.1 * read if rng.random() < 0.5 else rng.exponential(1e5, LAYERS) + 1, read)
        assert costs.job_ns >= 0
        assert costs.byte_ns > 0


def test_layers_without_work_do_not_count() -> None:
    rng = np.random.default_rng(5)
    costs = WorkerCosts(10_000.0, 0.2)
    costs.update(0, np.zeros(LAYERS), np.zeros(LAYERS))
    costs.update(JOBS, np.full(LAYERS, 700.0), np.zeros(LAYERS))
    assert (costs.job_ns, costs.byte_ns) == (10_000.0, 0.2)
    for _ in range(8):
        busy, read = report(rng, 30_000, 0.4)
        busy[::2], read[::2] = 500, 0
        costs.update(JOBS, busy, read)
    assert costs.job_ns + costs.byte_ns * 1e6 == pytest.approx(430_000, rel=0.03)
