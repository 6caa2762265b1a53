"""Which model lies at a path, told by its content.  pytest tests/coordinator/packing/test_content.py"""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from warmfront.coordinator.packing import content
from warmfront.coordinator.packing.content import content_of, known_sources

BIG = 300_000


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A folder that looks like a model; what is in its files does not matter here."""
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "tokenizer.json").write_text('{"a": 1}')
    (folder / "chat_template.jinja").write_text("{{ x }}")
    (folder / "model.safetensors").write_bytes(np.random.default_rng(0).bytes(BIG))
    (folder / "README.md").write_text("one")
    return folder


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Files that were read, by pieces."""
    seen: list[str] = []
    real = content._digest_piece

    def noting(piece: tuple[Path, int]) -> bytes:
        seen.append(piece[0].name)
        return real(piece)

    monkeypatch.setattr(content, "_digest_piece", noting)
    return seen


def key(path: Path) -> str:
    return content_of(path, pytest.fail)


@pytest.mark.parametrize(
    "change",
    [
        lambda folder: (folder / "README.md").write_text("two, longer"),
        lambda folder: (folder / "picture.png").write_bytes(b"\x89PNG"),
        lambda folder: (folder / ".gitattributes").write_text("*"),
        lambda folder: (folder / ".hidden.json").write_text("{}"),
        lambda folder: (folder / ".git").mkdir(),
        lambda folder: [os.utime(file) for file in folder.iterdir()],
        lambda folder: os.utime(folder / "model.safetensors", ns=(5, 5)),
        lambda folder: (folder / "config.json").write_text("{}"),
        lambda folder: (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()),
    ],
)
def test_what_is_no_content_does_not_count(model: Path, change: Callable[[Path], object]) -> None:
    before = key(model)
    change(model)
    assert key(model) == before


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "chat_template.jinja", "model.safetensors"])
@pytest.mark.parametrize("same_time", [True, False])
def test_every_byte_of_the_content_counts(model: Path, name: str, same_time: bool) -> None:
    """Also between the samples that one might take, and where somebody has set the time back."""
    file, before = model / name, key(model)
    times, data = file.stat(), bytearray(file.read_bytes())
    keys = {before}
    for at in {0, 1, len(data) // 2 - 1, len(data) - 1}:
        changed = bytearray(data)
        changed[at] ^= 1
        file.write_bytes(changed)
        if same_time:
            os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
        keys.add(key(model))
    assert len(keys) == 1 + len({0, 1, len(data) // 2 - 1, len(data) - 1})
    file.write_bytes(data)
    assert key(model) == before


def test_files_that_come_and_go(model: Path) -> None:
    before = key(model)
    (model / "generation_config.json").write_text("{}")
    other = key(model)
    (model / "generation_config.json").rename(model / "special_tokens_map.json")
    assert len({before, other, key(model)}) == 3
    (model / "special_tokens_map.json").unlink()
    assert key(model) == before


def test_pieces_are_put_together_in_order(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(content, "_PIECE", BIG // 3)
    before, file = key(model), model / "model.safetensors"
    data = file.read_bytes()
    third = BIG // 3
    file.write_bytes(data[third : 2 * third] + data[:third] + data[2 * third :])
    assert key(model) != before


def test_nothing_is_read_twice(model: Path, reads: list[str]) -> None:
    first = key(model)
    assert sorted(reads) == ["chat_template.jinja", "config.json", "model.safetensors", "tokenizer.json"]
    reads.clear()
    assert key(model) == first
    assert key(model.parent / "model" / ".." / "model") == first
    assert reads == []


def test_the_place_does_not_count(model: Path, tmp_path: Path) -> None:
    gguf = tmp_path / "a.gguf"
    gguf.write_bytes(b"GGUF")
    assert key(Path(shutil.copytree(model, tmp_path / "other"))) == key(model)
    assert key(Path(shutil.copy(gguf, tmp_path / "b.gguf"))) == key(gguf)
    (tmp_path / "link.gguf").symlink_to(gguf)
    assert key(tmp_path / "link.gguf") == key(gguf)
    assert {known.path for known in known_sources()} == {model, tmp_path / "other", gguf, tmp_path / "b.gguf"}
    assert all(known.current for known in known_sources())


@pytest.mark.parametrize("damage", ["", "[]", "{", "null", '{"path": 3}', "[" * 100_000, "KEEP {}", "KEEP 5"])
def test_a_damaged_record_is_none(model: Path, cache: Path, damage: str) -> None:
    before = key(model)
    (record,) = (cache / "sources").iterdir()
    facts = json.loads(record.read_bytes())
    if damage.startswith("KEEP"):
        facts["state"] = json.loads(damage.removeprefix("KEEP"))
        damage = json.dumps(facts)
    record.write_text(damage)
    assert key(model) == before
    assert json.loads(record.read_bytes())["content"] == before


def test_a_cache_that_cannot_be_written(model: Path, monkeypatch: pytest.MonkeyPatch, reads: list[str]) -> None:
    """The model is read each time; a line says so where that takes long."""
    first = key(model)
    os.utime(model / "model.safetensors")

    def refuse(*_: object) -> None:
        raise OSError(30, os.strerror(30))

    monkeypatch.setattr(content, "write_whole", refuse)
    reads.clear()
    assert key(model) == key(model) == first
    assert reads.count("model.safetensors") == 2
    monkeypatch.setattr(content, "_LONG", 0)
    said: list[str] = []
    assert content_of(model, said.append) == first
    assert said[0].startswith(f"reading {model} (")
    assert said[1] == f"the cache cannot keep what {model} is (Read-only file system): it is read again next time"
