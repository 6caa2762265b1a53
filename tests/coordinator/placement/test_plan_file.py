"""Plan files: written, read back, and refused in one line.  pytest tests/coordinator/placement/test_plan_file.py"""

import json
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from warmfront.coordinator.packing.packer import ensure_packed
from warmfront.coordinator.placement.plan_file import read_plan, write_plan
from warmfront.shared.errors import ResourceError, UsageError
from warmfront.shared.files import check_writable
from warmfront.shared.model.store import PackedModel


@pytest.fixture
def model(tiny_gguf: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[PackedModel]:
    """One layer of 16 groups."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with PackedModel(ensure_packed(tiny_gguf(), "auto", print, lambda *_: None)) as packed:
        assert (packed.spec.layers, packed.layout.groups) == (1, 16)
        yield packed


@pytest.fixture
def plan(model: PackedModel) -> dict[str, Any]:
    return {
        "format": "warmfront-plan-1",
        "model": model.spec.name,
        "order": model.order,
        "vram_budget": 1000,
        "gpu": [[0, 3, 15]],
        "figures": {},
    }


def test_what_is_written_is_read(model: PackedModel, tmp_path: Path) -> None:
    path = tmp_path / "some.plan.json"
    path.write_text("what was there before")
    rng = np.random.default_rng(0)
    for share in (0, 0.3, 1):
        gpu = rng.random((1, 16)) < share
        write_plan(path, model, 5 * 10**9, gpu, {"speed": 1.5})
        np.testing.assert_array_equal(read_plan(path, model), gpu)
    written = json.loads(path.read_text())
    assert written["vram_budget"] == 5 * 10**9
    assert written["figures"] == {"speed": 1.5}
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["cache", "some.plan.json", "tiny.gguf"]


def test_a_plan_by_hand(model: PackedModel, plan: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    path.write_text(json.dumps(plan))
    assert np.flatnonzero(read_plan(path, model)[0]).tolist() == [0, 3, 15]


def test_the_order_is_the_models(model: PackedModel, plan: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    model.order = "cafe"
    write_plan(path, model, 1, np.ones((1, 16), np.bool_), {})
    assert read_plan(path, model).all()
    model.order = ""
    with pytest.raises(UsageError, match=r"another order of the neurons: run `warmfront plan` again$"):
        read_plan(path, model)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"format": "warmfront-plan-0"}, "not a plan of the format warmfront-plan-1"),
        ({"format": None}, "not a plan of the format"),
        ({"model": "other"}, "is for the model 'other', not for"),
        ({"order": "beef"}, "another order of the neurons"),
        ({"order": None}, "another order of the neurons"),
        ({"gpu": None}, "the groups of 1 layers"),
        ({"gpu": {"0": [1]}}, "the groups of 1 layers"),
        ({"gpu": []}, "the groups of 1 layers"),
        ({"gpu": [[0], [1]]}, "the groups of 1 layers"),
        ({"gpu": ["0"]}, "no list of group numbers for layer 0"),
        ({"gpu": [["0"]]}, "no list of group numbers for layer 0"),
        ({"gpu": [[True]]}, "no list of group numbers for layer 0"),
        ({"gpu": [[1.0]]}, "no list of group numbers for layer 0"),
        ({"gpu": [[0, 16]]}, "group 16 of layer 0 to the GPU, of 16 groups"),
        ({"gpu": [[-1]]}, "group -1 of layer 0"),
        ({"gpu": [[10**30]]}, "group 1000000000000000000000000000000 of layer 0"),
        ({"gpu": [[2, 5, 2]]}, "a group of layer 0 to the GPU twice"),
    ],
)
def test_wrong_plans(
    model: PackedModel, plan: dict[str, Any], tmp_path: Path, change: dict[str, Any], words: str
) -> None:
    path = tmp_path / "plan.json"
    path.write_text(json.dumps(plan | change))
    assert_refused(path, model, words)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "it is not JSON"),
        (b"{", "it is not JSON"),
        (b"\xff\xfe", "it is not JSON"),
        (b"[" * 100_000, "it is not JSON"),
        (b"[]", "not a plan of the format"),
        (b"7", "not a plan of the format"),
        (b"{}", "not a plan of the format"),
    ],
)
def test_files_that_are_no_plan(model: PackedModel, tmp_path: Path, content: bytes, words: str) -> None:
    path = tmp_path / "plan.json"
    path.write_bytes(content)
    assert_refused(path, model, words)


def test_no_file(model: PackedModel, tmp_path: Path) -> None:
    assert_refused(tmp_path / "absent.json", model, "cannot read the plan")
    assert_refused(tmp_path, model, "cannot read the plan")


def assert_refused(path: Path, model: PackedModel, words: str) -> None:
    with pytest.raises(UsageError, match=re.escape(words)) as refusal:
        read_plan(path, model)
    assert str(path) in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_where_nothing_can_be_written(model: PackedModel, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"there is no folder .*absent"):
        check_writable(tmp_path / "absent" / "x.json")
    with pytest.raises(ResourceError, match=r"cannot write .*x\.json.* -o FILE"):
        write_plan(tmp_path / "absent" / "x.json", model, 1, np.ones((1, 16), np.bool_), {})
    os.mkfifo(tmp_path / "pipe")
    for none in (Path(), tmp_path, tmp_path / "pipe", Path("/dev/stdout")):
        with pytest.raises(UsageError, match=r"cannot write .* it is no file"):
            check_writable(none)
    check_writable(tmp_path / "x.json")
    assert not (tmp_path / "x.json").exists()


def test_a_write_that_fails_keeps_the_old_plan(
    model: PackedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "plan.json"
    write_plan(path, model, 1, np.eye(1, 16, 3, dtype=np.bool_), {})
    before = path.read_bytes()

    def fail(*_: object) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "pwrite", fail)
    with pytest.raises(ResourceError, match="No space left on device"):
        write_plan(path, model, 2, np.ones((1, 16), np.bool_), {})
    assert path.read_bytes() == before
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["cache", "plan.json", "tiny.gguf"]
