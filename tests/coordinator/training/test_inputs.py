"""What is kept of an interrupted training.  pytest tests/coordinator/training/test_inputs.py"""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from warmfront.coordinator.training.inputs import Inputs, token_bytes
from warmfront.shared.errors import ResourceError

SHAPE = (2, 10, 4)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "warmfront" / "models" / "m-training"


def numbers(tokens: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((2, tokens, 4)).astype(np.float32)


def test_what_is_added_comes_back_by_layers(folder: Path) -> None:
    inputs, parts = Inputs(folder, SHAPE, "k"), [numbers(3), numbers(7, 1)]
    for part in parts:
        inputs.add(part)
    whole = np.concatenate(parts, axis=1).astype(np.float16)
    for layer in range(2):
        np.testing.assert_array_equal(inputs.of(layer), whole[layer])
    assert (folder / "inputs").stat().st_size == 10 * token_bytes(2, 4)
    inputs.remove()
    assert not folder.exists()


def test_a_later_run_goes_on(folder: Path) -> None:
    first = Inputs(folder, SHAPE, "k")
    first.add(numbers(3))
    first.keep(1, "how", {"bias": np.ones(2)})
    again = Inputs(folder, SHAPE, "k")
    assert again.done == 3
    made = again.made(1, "how", ("bias",))
    assert made is not None
    np.testing.assert_array_equal(made["bias"], np.ones(2))
    assert again.made(1, "other", ("bias",)) is None
    assert again.made(0, "how", ("bias",)) is None


@pytest.mark.parametrize("damage", ["key", "short", "facts", "done"])
def test_what_does_not_fit_is_begun_anew(folder: Path, damage: str) -> None:
    Inputs(folder, SHAPE, "k").add(numbers(3))
    if damage == "short":
        with (folder / "inputs").open("r+b") as file:
            file.truncate(100)
    elif damage in ("facts", "done"):
        (folder / "facts.json").write_text('{"key": "k", "done": 11}' if damage == "done" else "{")
    assert Inputs(folder, SHAPE, "other" if damage == "key" else "k").done == 0


def test_no_room(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_path: Any) -> Any:
        return shutil._ntuple_diskusage(100, 99, 1)  # type: ignore[attr-defined]

    monkeypatch.setattr(shutil, "disk_usage", full)
    with pytest.raises(ResourceError, match=r"^the inputs of 10 tokens take 0\.0 GB in .*: pass --tokens or --disk"):
        Inputs(folder, SHAPE, "k")


def test_numbers_beyond_half_precision_are_cut(folder: Path) -> None:
    inputs = Inputs(folder, (1, 1, 2), "k")
    inputs.add(np.array([[[1e9, -1e9]]], np.float32))
    np.testing.assert_array_equal(inputs.of(0), [[65504, -65504]])
