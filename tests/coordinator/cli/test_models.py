"""What `warmfront models` lists, of caches made by hand.  pytest tests/coordinator/cli/test_models.py"""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants

from warmfront.coordinator.cli.models import describe, pull, render
from warmfront.coordinator.packing.packer import ensure_packed
from warmfront.shared.errors import UsageError

Make = Callable[..., Path]
REVISION = "a" * 40


@pytest.fixture
def caches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Empty ones; returns the hub's."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


def put(hub: Path, repository: str, *files: Path) -> Path:
    """A repository with copies of these files, as the hub's library lays it out; returns its snapshot."""
    place = hub / f"models--{repository.replace('/', '--')}"
    for folder in ("refs", "blobs", f"snapshots/{REVISION}"):
        (place / folder).mkdir(parents=True)
    (place / "refs/main").write_text(REVISION)
    for i, file in enumerate(files):
        shutil.copy(file, place / "blobs" / f"{i:040x}")
        (place / "snapshots" / REVISION / file.name).symlink_to(Path("../../blobs", f"{i:040x}"))
    return place / "snapshots" / REVISION


def pack(path: Path, dtype: str) -> None:
    ensure_packed(path, dtype, print, lambda *_: None)


def rows() -> dict[str, dict[str, Any]]:
    found = describe()["models"]
    assert len(list(render({"models": found, "hub": ""}))) == len(found) + 1
    return {row["name"]: row for row in found}


def test_nothing(caches: Path) -> None:
    assert describe() == {"hub": str(caches), "models": []}
    assert list(render(describe())) == [f"0 models; the hub's cache is {caches}"]


def test_what_there_is(caches: Path, tiny_llama: Make, tiny_gguf: Make, tmp_path: Path) -> None:
    folder, file = tiny_llama(), tiny_gguf("m-F16.gguf")
    snapshot = put(caches, "org/folder", *folder.iterdir())
    put(caches, "org/m-GGUF", file)
    put(caches, "org/partly", folder / "config.json")
    put(caches, "org/words", folder / "tokenizer.json")
    local = tiny_gguf("local.gguf", kind="F32")
    gone = tiny_gguf("gone.gguf", kind="Q8_0")
    for path, dtype in ((snapshot, "auto"), (snapshot, "q8"), (local, "q4"), (gone, "auto")):
        pack(path, dtype)
    gone.unlink()
    found = rows()
    assert {name: (row["files"], row["family"], [*row["packed"]], row["complete"]) for name, row in found.items()} == {
        "org/folder": (len(list(folder.iterdir())), "llama", ["auto", "q8"], True),
        "org/m-GGUF:m-F16.gguf": (1, "llama", [], True),
        "org/partly": (0, None, [], False),
        str(local): (1, "llama", ["q4"], True),
        str(gone): (0, "llama", ["auto"], False),
    }
    assert found["org/folder"]["nbytes"] == sum(each.stat().st_size for each in folder.iterdir())
    assert found[str(local)]["nbytes"] == local.stat().st_size
    lines = {line.split()[0]: line for line in render(describe())}
    assert "packed: auto" in lines["org/folder"]
    assert lines["org/m-GGUF:m-F16.gguf"].endswith("not packed")
    assert "incomplete: `warmfront pull` goes on with it" in lines["org/partly"]
    assert lines[str(gone)].endswith("the model itself is gone")


def test_names_that_no_repository_has(caches: Path, tiny_gguf: Make, tmp_path: Path) -> None:
    file = tiny_gguf()
    for name in ("models--..--x", "models--a", "models--a--b--c", "models--a--\x1b[31m", "datasets--a--b"):
        (caches / name / "refs").mkdir(parents=True)
    put(caches, "org/odd\nname", file)
    put(caches, "org/links", file)
    (caches / "models--org--links/blobs" / f"{0:040x}").unlink()
    (caches / "models--org--links/blobs" / f"{0:040x}").symlink_to(file)
    (found,) = rows().values()
    assert (found["name"], found["complete"]) == ("org/links:tiny.gguf", False)


@pytest.mark.parametrize("name", ["none", "a/b/c", "/tmp"])
def test_what_cannot_be_pulled(name: str) -> None:
    with pytest.raises(UsageError, match=r"give one like ORG/NAME, ORG/NAME:FILE\.gguf or ORG/NAME:Q4_K_M"):
        pull(name, print, print)
