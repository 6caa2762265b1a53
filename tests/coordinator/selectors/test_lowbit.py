"""What is kept of a calibration.  pytest tests/coordinator/selectors/test_lowbit.py"""

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from warmfront.coordinator.packing import arrays
from warmfront.coordinator.selectors.lowbit import Lowbit


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))


def made(folder: Path, recall: float = 0.995, neurons: int = 64) -> Lowbit:
    file: Any = SimpleNamespace(path=folder / "m-auto-00-lowbit2-ab.safetensors")
    return Lowbit(file, 2, recall, np.full((2, 1, neurons), np.nan, np.float32), "relu")


def test_thresholds_are_kept_by_recall(tmp_path: Path) -> None:
    thresholds = np.random.default_rng(0).normal(size=(2, 1, 64)).astype(np.float32)
    first = made(tmp_path)
    first.thresholds[:] = thresholds
    first.save(pytest.fail)
    again, other = made(tmp_path), made(tmp_path, 0.9)
    for each in (again, other):
        each.load()
    assert again.calibrated
    np.testing.assert_array_equal(again.thresholds, thresholds)
    assert not other.calibrated


@pytest.mark.parametrize("damage", ["bit", "cut", "empty", "shape"])
def test_damaged_ones_are_calibrated_again(tmp_path: Path, damage: str) -> None:
    first = made(tmp_path, neurons=32 if damage == "shape" else 64)
    first.thresholds[:] = 1
    first.save(pytest.fail)
    (kept,) = tmp_path.glob("*.npz")
    data = bytearray(kept.read_bytes())
    if damage == "bit":
        data[data.index(np.float32(1).tobytes() * 4) + 70] ^= 1
    elif damage != "shape":
        del data[len(data) // 2 if damage == "cut" else 0 :]
    kept.write_bytes(data)
    again = made(tmp_path)
    again.load()
    assert not again.calibrated


def test_a_cache_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(30, os.strerror(30))

    monkeypatch.setattr(arrays, "write_whole", refuse)
    said: list[str] = []
    made(tmp_path).save(said.append)
    assert len(said) == 1
    assert said[0].startswith("cannot keep the thresholds in ")
    assert said[0].endswith("Read-only file system; they are measured again next time")
