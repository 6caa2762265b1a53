"""Packing in little memory, and going on where a killed run ended.  pytest tests/coordinator/packing/test_killed.py"""

import json
import signal
import subprocess
import sys
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.coordinator.packing.packed import pack, tensors_of
from warmfront.coordinator.models import source as source_module
from warmfront.coordinator.models.open import open_source
from warmfront.coordinator.packing.packer import PackingPlan, ensure_packed
from warmfront.shared.model.store import FORMAT

Make = Callable[..., Path]

KILLED = """
import os, sys
from pathlib import Path
from warmfront.coordinator.packing.packer import ensure_packed
kill = lambda done, total: done >= total * float(sys.argv[2]) and os.kill(os.getpid(), 9)
ensure_packed(Path(sys.argv[1]), 'auto', print, kill)
"""


def killed(folder: Path, models: Path, share: float) -> Path:
    """What a run has left that was killed when it had written that share of the file."""
    run = subprocess.run([sys.executable, "-c", KILLED, str(folder), str(share)])
    assert run.returncode == -signal.SIGKILL
    (partial,) = models.iterdir()
    assert partial.suffix == ".partial"
    return partial


def again(folder: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, list[str], list[str]]:
    """The packed file, which tensors were made for it, and what was said."""
    made: list[str] = []
    said: list[str] = []
    real = PackingPlan.data

    def noted(plan: PackingPlan, name: str) -> Iterator[Any]:
        made.append(name)
        yield from real(plan, name)

    monkeypatch.setattr(PackingPlan, "data", noted)
    return ensure_packed(folder, "auto", said.append, lambda done, total: None), made, said


def interrupted(folder: Path, models: Path, share: float) -> Path:
    """As `killed`, by Ctrl-C."""

    def interrupt(done: int, total: int) -> None:
        if done >= total * share:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        ensure_packed(folder, "auto", lambda line: None, interrupt)
    (partial,) = models.iterdir()
    return partial


@pytest.mark.parametrize(("end", "share"), [(killed, 0.5), (interrupted, 0.8), (killed, 1)])
def test_a_run_that_was_killed_is_gone_on_with(
    folder: Path, models: Path, monkeypatch: pytest.MonkeyPatch, end: Callable[..., Path], share: float
) -> None:
    """No tensor that was finished is made again, and the file is that of a run at once."""
    whole = pack(folder)
    expected, names = whole.read_bytes(), list(PackingPlan(open_source(folder), "auto").shapes)
    whole.unlink()
    end(folder, models, share)
    packed, made, said = again(folder, monkeypatch)
    assert packed.read_bytes() == expected
    assert list(models.iterdir()) == [packed]
    assert made == names[len(names) - len(made) :]
    assert len(made) < len(names) if share < 1 else not made
    assert said == ["checking what a run that was interrupted has packed, to go on with it"]


@pytest.mark.parametrize("share", [0.3, 0.9, None])
def test_what_is_damaged_of_a_killed_run_is_made_again(
    folder: Path, models: Path, monkeypatch: pytest.MonkeyPatch, share: float | None
) -> None:
    """A wrong byte in a finished tensor; or zeros in place of all checksums, as after a power cut."""
    whole = pack(folder)
    expected = whole.read_bytes()
    whole.unlink()
    with killed(folder, models, 0.95).open("r+b") as file:
        if share is None:
            header = int.from_bytes(expected[:8], "little")
            start, end = json.loads(expected[8 : 8 + header])["sums"]["data_offsets"]
            file.seek(8 + header + start)
            file.write(bytes(end - start - 8))
        else:
            file.seek(int(share * len(expected)))
            file.write(bytes(byte ^ 1 for byte in expected[int(share * len(expected)) :][:1]))
    packed, made, _ = again(folder, monkeypatch)
    assert packed.read_bytes() == expected
    assert (len(made) == len(tensors_of(packed)[0])) == (share is None)


def test_what_another_version_has_left_is_not_used(folder: Path, models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = pack(folder)
    expected = whole.read_bytes()
    whole.unlink()
    partial = killed(folder, models, 0.9)
    partial.write_bytes(partial.read_bytes().replace(FORMAT.encode(), b"warmfront-XX", 1))
    packed, made, _ = again(folder, monkeypatch)
    assert packed.read_bytes() == expected
    assert len(made) == len(tensors_of(packed)[0])


@pytest.mark.parametrize("experts", [False, True])
def test_packing_holds_a_part_of_the_model(
    tiny_llama: Make, tiny_family: Make, models: Path, monkeypatch: pytest.MonkeyPatch, experts: bool
) -> None:
    """As much as is widened at a time and a little more, whatever the size of tensors and layers."""
    sizes = {"hidden_size": 128, "intermediate_size": 2048, "num_hidden_layers": 1}
    folder = tiny_family("mixtral", **sizes) if experts else tiny_llama(**sizes)
    whole = pack(folder)
    expected = whole.read_bytes()
    whole.unlink()
    monkeypatch.setattr(source_module, "CHUNK", 32 * 128)
    tracemalloc.start()
    try:
        packed = pack(folder)
        assert tracemalloc.get_traced_memory()[1] < len(expected) / 4
    finally:
        tracemalloc.stop()
    assert packed.read_bytes() == expected
