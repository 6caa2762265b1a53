"""Fixtures of the ownership table's tests."""

from types import SimpleNamespace

import pytest

from tests.coordinator.balancing.ownership_bench import Bench, Clock
from warmfront.coordinator.balancing import ownership as ownership_module


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    module = SimpleNamespace(monotonic_ns=clock.monotonic_ns, monotonic=clock.monotonic)
    monkeypatch.setattr(ownership_module, "time", module)
    return clock


@pytest.fixture
def bench() -> Bench:
    return Bench()
