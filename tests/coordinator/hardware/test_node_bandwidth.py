"""Speeds: measured where it matters, kept, measured again if damaged.

Run: pytest tests/coordinator/hardware/test_node_bandwidth.py
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from warmfront.coordinator.hardware import bandwidth, node_bandwidth
from warmfront.coordinator.hardware.node_bandwidth import worker_speeds
from warmfront.shared.machine.core_plan import CorePlan, WorkerCores

TWO_NODES = CorePlan((WorkerCores(0, (0, 1), 0), WorkerCores(1, (4, 5), 1)))


@pytest.fixture
def measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """A machine of two nodes, of which the second has slow memory: what was measured on it."""
    calls: list[tuple[Any, ...]] = []

    class Fake:
        def __init__(self, cpus: Sequence[int], node: int | None) -> None:
            self._cpus, self._node = cpus, node

        def measure(self) -> float:
            calls.append((self._cpus, self._node))
            return 20.0 if self._node == 0 else 5.0

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(node_bandwidth, "bindable", lambda _nodes: True)
    monkeypatch.setattr(bandwidth, "Bandwidth", Fake)
    return calls


def test_measured_once(measured: list[Any]) -> None:
    assert worker_speeds(TWO_NODES) == [20.0, 5.0]
    assert set(measured) == {((0, 1), 0), ((4, 5), 1)}
    measured.clear()
    assert worker_speeds(TWO_NODES) == [20.0, 5.0]
    assert measured == []
    assert worker_speeds(CorePlan((WorkerCores(0, (0,), 0), WorkerCores(1, (4, 5), 1)))) == [20.0, 5.0]
    assert measured, "another plan is measured for itself"


@pytest.mark.parametrize(
    "text",
    ["", "{", "null", "7", "[1.0]", "[1, 0]", "[1, NaN]", "[Infinity, 1]", '["a", 1]', "[null, 1]", "\xff", "{}"],
)
def test_a_damaged_file_is_measured_again(text: str, measured: list[Any], tmp_path: Path) -> None:
    worker_speeds(TWO_NODES)
    (file,) = tmp_path.rglob("bandwidth/*.json")
    file.write_text(text, "latin-1")
    measured.clear()
    assert worker_speeds(TWO_NODES) == [20.0, 5.0]
    assert measured
    measured.clear()
    assert worker_speeds(TWO_NODES) == [20.0, 5.0]
    assert measured == [], "and mended"


@pytest.mark.parametrize(
    ("workers", "speeds"),
    [
        ([WorkerCores(0, (0, 1, 2)), WorkerCores(0, (3,))], [3.0, 1.0]),
        ([WorkerCores(0, (0, 1), 0), WorkerCores(1, (4,), 0)], [2.0, 1.0]),
        ([WorkerCores(None, (0, 1, 4))], [3.0]),
    ],
)
def test_one_memory_needs_no_measuring(workers: list[WorkerCores], speeds: list[float], measured: list[Any]) -> None:
    assert worker_speeds(CorePlan(tuple(workers))) == speeds
    assert measured == []


def test_unbound_memory_cannot_be_measured(measured: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(node_bandwidth, "bindable", lambda _nodes: False)
    assert worker_speeds(TWO_NODES) == [2.0, 2.0]
    assert measured == []
