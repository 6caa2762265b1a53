"""How the engines take turns, and what is reported of them.  pytest tests/scripts/test_compare_peers.py"""

import contextlib
import importlib
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

SCRIPTS = Path(__file__).parents[2] / "scripts"


class Meter:
    """A memory bandwidth without measuring."""

    def __init__(self, _cpus: list[int]) -> None:
        pass

    def measure(self) -> float:
        return 10.0


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The script as a module, without waiting for a quiet machine."""
    monkeypatch.syspath_prepend(SCRIPTS)
    module = importlib.import_module("compare_peers")
    monkeypatch.setattr(module, "PATIENCE_S", 0.0)
    monkeypatch.setattr(module, "Bandwidth", Meter)
    return module


def contender(script: ModuleType, name: str, decode: float, skipped: str = "") -> Any:
    @contextlib.contextmanager
    def load() -> Iterator[Any]:
        if skipped:
            raise script.Skip(skipped)
        yield lambda: script.Sample(decode, 2 * decode, (1, 2))

    return script.Contender(name, Path(), load)


def test_engines_take_turns(script: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    ours, peer = contender(script, "ours", 30.0), contender(script, "peer", 10.0)
    seen = script.compare([ours, contender(script, "absent", 1.0, "no such engine"), peer], 3)
    assert peer.ratios == [(3.0, 3.0)] * 3
    assert len(ours.samples) == len(peer.samples) == 3
    assert seen["bandwidth"] == [10.0] * 4
    assert "absent skipped: no such engine" in capsys.readouterr().out
    found = script.report([ours, peer], seen)
    assert found["peer"]["ratio"] == [3.0, 3.0]
    assert found["ours"]["decode"] == {"median": 30.0, "min": 30.0, "max": 30.0}


def test_without_peers_ours_is_measured_alone(script: ModuleType) -> None:
    ours = contender(script, "ours", 30.0)
    script.compare([ours], 2)
    assert [sample.decode for sample in ours.samples] == [30.0] * 2
