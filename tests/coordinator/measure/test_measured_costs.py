"""Measured costs: the line through what workers report, and the cache.

Run: pytest tests/coordinator/measure/test_measured_costs.py
"""

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from warmfront.coordinator.measure.measured_costs import CostsKey, fit_line, load_costs, measure_costs, save_costs
from warmfront.coordinator.placement.solver import DeviceCosts
from warmfront.shared.errors import ResourceError, WorkerError
from warmfront.shared.wire.messages import LoadReport

KEY = CostsKey("tiny-auto-0123", "exact", ("cpu", "host (emulated GPU)"), (1, 1))
COSTS = DeviceCosts(12_000.5, 0.03125, 41_000.25, 0.0009765625)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path


def test_a_line_through_points_that_lie_on_one() -> None:
    read = np.linspace(1e5, 4e6, 12)
    job, byte = fit_line(np.tile(20_000 + 0.03 * read, (5, 1)), np.tile(read, (5, 1)))
    assert job == pytest.approx(20_000)
    assert byte == pytest.approx(0.03)


def test_disturbed_rounds_do_not_count() -> None:
    """In two rounds of five each point takes up to ten times as long."""
    rng = np.random.default_rng(0)
    read = rng.uniform(1e5, 4e6, 40)
    busy = np.tile(20_000 + 0.03 * read, (5, 1))
    for point in range(40):
        busy[rng.permutation(5)[:2], point] *= rng.uniform(1, 10, 2)
    job, byte = fit_line(busy, np.tile(read, (5, 1)))
    # The median of five is at most the smallest disturbed one only where three are disturbed: here it is exact.
    assert job == pytest.approx(20_000, rel=1e-6)
    assert byte == pytest.approx(0.03, rel=1e-6)


def test_noise_averages_out() -> None:
    rng = np.random.default_rng(1)
    read = rng.uniform(1e5, 4e6, (5, 60))
    job, byte = fit_line((30_000 + 0.02 * read) * rng.uniform(0.95, 1.05, read.shape), read)
    assert job == pytest.approx(30_000, rel=0.2)
    assert byte == pytest.approx(0.02, rel=0.05)


def test_points_without_a_byte_do_not_count() -> None:
    read = np.array([[0.0, 1e6, 2e6, 0.0]])
    busy = np.array([[7.0, 1e4 + 3e4, 1e4 + 6e4, 9.0]])
    assert fit_line(busy, read) == pytest.approx((1e4, 0.03))
    with pytest.raises(ResourceError, match="nothing to compute"):
        fit_line(busy[:, :1], read[:, :1])


@pytest.mark.parametrize(
    ("read", "busy", "expected"),
    [
        ([1e6, 2e6], [5e4, 4e4], (4.5e4, 0.0)),  # falls
        ([1e6, 2e6], [1e4, 5e4], (0.0, (1e10 + 1e11) / 5e12)),  # starts below zero
        ([1e6, 1e6], [4e4, 6e4], (5e4, 0.0)),  # no line at all
        ([1e6], [4e4], (4e4, 0.0)),
    ],
)
def test_never_a_negative_time(read: list[float], busy: list[float], expected: tuple[float, float]) -> None:
    """Of the lines that neither fall nor start below zero it is the closest: no other is, on a grid."""
    x, y = np.array(read), np.array(busy)
    job, byte = fit_line(y[None], x[None])
    assert (job, byte) == pytest.approx(expected)
    off = np.sum((y - job - byte * x) ** 2)
    for some_job in np.linspace(0, 1e5, 51):
        for some_byte in np.linspace(0, 0.1, 51):
            assert np.sum((y - some_job - some_byte * x) ** 2) >= off * (1 - 1e-9)


def test_kept_for_the_same_key_only() -> None:
    assert load_costs(KEY) is None
    save_costs(KEY, COSTS)
    assert load_costs(KEY) == COSTS
    others = [
        replace(KEY, model="tiny-q4-0123"),
        replace(KEY, selector="all"),
        replace(KEY, devices=("cpu", "cuda:0 NVIDIA H200")),
        replace(KEY, threads=(2, 1)),
    ]
    assert [load_costs(other) for other in others] == [None] * 4
    save_costs(KEY, COSTS._replace(cpu_job_ns=1.0))
    assert load_costs(KEY) == COSTS._replace(cpu_job_ns=1.0)


@pytest.mark.parametrize(
    "damage",
    [
        "",
        "{",
        "[]",
        "null",
        "{}",
        '{"key": {}, "times": {}}',
        json.dumps({"times": COSTS._asdict()}),
        json.dumps({"key": {}, "times": COSTS._asdict()}),
        json.dumps({"key": json.loads(KEY.to_json()), "times": COSTS._asdict() | {"gpu_byte_ns": -1.0}}),
        json.dumps({"key": json.loads(KEY.to_json()), "times": COSTS._asdict() | {"gpu_byte_ns": float("nan")}}),
        json.dumps({"key": json.loads(KEY.to_json()), "times": COSTS._asdict() | {"gpu_byte_ns": "fast"}}),
        json.dumps({"key": json.loads(KEY.to_json()), "times": COSTS._asdict() | {"surplus": 1.0}}),
        json.dumps({"key": json.loads(KEY.to_json()), "times": 3}),
    ],
)
def test_a_damaged_cache_is_none(damage: str) -> None:
    save_costs(KEY, COSTS)
    KEY.path.write_text(damage)
    assert load_costs(KEY) is None


def test_a_cache_that_cannot_be_written(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/proc/self")
    save_costs(KEY, COSTS)
    assert load_costs(KEY) is None


def test_nothing_is_left_beside_it(cache: Path) -> None:
    save_costs(KEY, COSTS)
    save_costs(KEY, COSTS)
    assert [path for path in cache.rglob("*") if path.is_file()] == [KEY.path]


class Hall:
    """In an engine's stead: two CPU workers, one GPU worker, and what they would report by the costs they are given."""

    def __init__(self, costs: DeviceCosts, noise: float = 0.0) -> None:
        self.costs, self.noise = costs, noise
        self.rng = np.random.default_rng(0)
        layers, groups = 6, 40
        self.load = self.rng.uniform(1e4, 2e5, (layers, groups))
        home = np.tile((np.arange(groups) >= 20).astype(np.uint8), (layers, 1))
        self.owner = np.where(np.arange(groups) % 20 < [[8], [5], [1], [0], [3], [8]], 2, home).astype(np.uint8)
        self.ownership = SimpleNamespace(
            names=["cpu0", "cpu1", "gpu0"], home=home, owners=self.owner.copy, hand_over=self.hand_over
        )
        self.model = SimpleNamespace(spec=SimpleNamespace(layers=layers, vocab=100))
        self.statistics = SimpleNamespace(reports=self.reports)
        self.jobs = 0
        self.busy, self.read = np.zeros((2, 3, layers), np.int64)
        self.fails = False
        self.resets = 0

    def hand_over(self, owner: Any) -> None:
        assert ((owner == self.ownership.home) | (owner == 2)).all()
        self.owner = owner

    def reports(self) -> dict[str, LoadReport]:
        return {
            name: LoadReport(self.jobs, self.busy[i].tolist(), [], self.read[i].tolist(), [])
            for i, name in enumerate(self.ownership.names)
        }

    def decode_ids(self, ids: list[int], count: int) -> None:
        if self.fails and self.jobs > 100:
            raise KeyboardInterrupt
        for _ in range(count):
            read = np.array([np.sum(self.load, axis=1, where=self.owner == worker) for worker in range(3)])
            # Each CPU worker does half of the bytes in the time that both together take for all of them.
            job, byte = self.costs.cpu_job_ns, self.costs.cpu_byte_ns
            busy = [job + byte * read[:2].sum(0)] * 2 + [self.costs.gpu_job_ns + self.costs.gpu_byte_ns * read[2]]
            self.busy += (np.array(busy) * self.rng.uniform(1, 1 + self.noise, (3, 6))).astype(np.int64)
            self.read += read.astype(np.int64)
            self.jobs += 6

    def reset(self) -> None:
        self.resets += 1


def test_measuring_finds_the_costs_and_leaves_the_owners() -> None:
    hall = Hall(COSTS)
    before = hall.owner.copy()
    assert measure_costs(hall) == pytest.approx(COSTS, rel=1e-3)
    np.testing.assert_array_equal(hall.owner, before)
    assert hall.resets


def test_measuring_with_noise() -> None:
    costs = measure_costs(Hall(COSTS, noise=0.1))
    assert costs.cpu_byte_ns == pytest.approx(COSTS.cpu_byte_ns, rel=0.1)
    assert costs.gpu_job_ns == pytest.approx(COSTS.gpu_job_ns, rel=0.1)


def test_measuring_that_is_interrupted_leaves_the_owners() -> None:
    hall = Hall(COSTS)
    before, hall.fails = hall.owner.copy(), True
    with pytest.raises(KeyboardInterrupt):
        measure_costs(hall)
    np.testing.assert_array_equal(hall.owner, before)


def test_measuring_without_a_group_on_the_gpu() -> None:
    hall = Hall(COSTS)
    hall.owner = hall.ownership.home.copy()
    hall.ownership.owners = hall.owner.copy
    with pytest.raises(ResourceError, match="nothing to compute"):
        measure_costs(hall)


def test_measuring_when_a_worker_is_lost() -> None:
    hall = Hall(COSTS)
    hall.statistics.reports = lambda: {"cpu0": LoadReport(0, [], [], [], [])}
    with pytest.raises(WorkerError, match=r"a worker was lost .* run it again"):
        measure_costs(hall)
