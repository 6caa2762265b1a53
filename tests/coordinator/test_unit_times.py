"""Unit times: the line through what workers report, and the cache.  pytest tests/coordinator/test_unit_times.py"""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from warmfront.coordinator.solver import Times
from warmfront.coordinator.unit_times import TimesKey, fit_line, load_times, save_times
from warmfront.shared.errors import ResourceError

KEY = TimesKey("tiny-auto-0123", "exact", ("cpu", "host (emulated GPU)"), (1, 1))
TIMES = Times(12_000.5, 0.03125, 41_000.25, 0.0009765625)


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
    assert load_times(KEY) is None
    save_times(KEY, TIMES)
    assert load_times(KEY) == TIMES
    others = [
        replace(KEY, model="tiny-q4-0123"),
        replace(KEY, selector="all"),
        replace(KEY, devices=("cpu", "cuda:0 NVIDIA H200")),
        replace(KEY, threads=(2, 1)),
    ]
    assert [load_times(other) for other in others] == [None] * 4
    save_times(KEY, TIMES._replace(cpu_job_ns=1.0))
    assert load_times(KEY) == TIMES._replace(cpu_job_ns=1.0)


@pytest.mark.parametrize(
    "damage",
    [
        "",
        "{",
        "[]",
        "null",
        "{}",
        '{"key": {}, "times": {}}',
        json.dumps({"times": TIMES._asdict()}),
        json.dumps({"key": {}, "times": TIMES._asdict()}),
        json.dumps({"key": json.loads(KEY.to_json()), "times": TIMES._asdict() | {"gpu_byte_ns": -1.0}}),
        json.dumps({"key": json.loads(KEY.to_json()), "times": TIMES._asdict() | {"gpu_byte_ns": float("nan")}}),
        json.dumps({"key": json.loads(KEY.to_json()), "times": TIMES._asdict() | {"gpu_byte_ns": "fast"}}),
        json.dumps({"key": json.loads(KEY.to_json()), "times": TIMES._asdict() | {"surplus": 1.0}}),
        json.dumps({"key": json.loads(KEY.to_json()), "times": 3}),
    ],
)
def test_a_damaged_cache_is_none(damage: str) -> None:
    save_times(KEY, TIMES)
    KEY.path.write_text(damage)
    assert load_times(KEY) is None


def test_a_cache_that_cannot_be_written(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/proc/self")
    save_times(KEY, TIMES)
    assert load_times(KEY) is None


def test_nothing_is_left_beside_it(cache: Path) -> None:
    save_times(KEY, TIMES)
    save_times(KEY, TIMES)
    assert [path for path in cache.rglob("*") if path.is_file()] == [KEY.path]
