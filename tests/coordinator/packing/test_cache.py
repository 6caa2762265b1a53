"""`warmfront cache` on folders made by hand.  pytest tests/coordinator/packing/test_cache.py"""

import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from warmfront.coordinator.cli.main import _run
from warmfront.coordinator.packing.content import content_of
from warmfront.shared import files
from warmfront.shared.files import locked

DAY = 86_400
Run = Callable[..., tuple[int, list[str], list[str]]]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """`warmfront cache ARGS` in this process: exit code, lines of stdout and of stderr."""

    def call(*args: str) -> tuple[int, list[str], list[str]]:
        monkeypatch.setattr("sys.argv", ["warmfront", "cache", *args])
        code = _run()
        out, err = capsys.readouterr()
        return code, out.splitlines(), err.splitlines()

    return call


def write(path: Path, size: int = 1000, *, days: float = 0) -> Path:
    """A file that was last used so many days ago."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(bytes(size))
    os.utime(path, (time.time() - days * DAY,) * 2)
    return path


@pytest.fixture
def packed(cache: Path, tmp_path: Path) -> Callable[..., Path]:
    """A packed model that was made from a model in `tmp_path`, and what was made from it."""

    def make(name: str, dtype: str = "auto", size: int = 1000, days: float = 0) -> Path:
        model = tmp_path / f"{name}.gguf"
        model.write_bytes(name.encode())
        stem = f"{name}-{dtype}-{content_of(model, pytest.fail)}"
        write(cache / "models" / f"{stem}-lowbit2.safetensors", 30, days=days)
        write(cache / "models" / f"{stem}-lowbit2.0.995.npy", 3, days=days)
        return write(cache / "models" / f"{stem}.safetensors", size, days=days)

    return make


def items(run: Run) -> dict[str, dict[str, Any]]:
    """Those of `ls --json`, by part and name, or dtype of models."""
    code, out, err = run("ls", "--json")
    assert (code, len(out), err) == (0, 1, [])
    facts = json.loads(out[0])
    assert facts["nbytes"] == sum(item["nbytes"] for item in facts["items"])
    return {f"{item['part']}/{item['name']}{item['dtype'] and '-' + item['dtype']}": item for item in facts["items"]}


def test_what_there_is(run: Run, cache: Path, packed: Callable[..., Path], tmp_path: Path) -> None:
    one = packed("one", "auto", 5_000_000, days=3)
    packed("one", "q4", 7)
    packed("gone", "f16").exists()
    (tmp_path / "gone.gguf").unlink()
    packed("edited")
    (tmp_path / "edited.gguf").write_bytes(b"another")
    write(cache / "downloads" / "m.gguf", 20)
    write(cache / "kernels" / "abc" / "x" / "k.nbc", 40)
    write(cache / "profiles" / "auto-0123.npz", 50)
    write(cache / "tuning.json", 60)
    found = items(run)
    assert {name: (item["nbytes"], item["state"]) for name, item in found.items() if name != "/sources"} == {
        "models/one-auto": (5_000_033, "current"),
        "models/one-q4": (40, "current"),
        "models/gone-f16": (1033, "gone"),
        "models/edited-auto": (1033, "changed"),
        "downloads/m.gguf": (20, ""),
        "kernels/abc": (40, ""),
        "profiles/auto-0123.npz": (50, ""),
        "/tuning.json": (60, ""),
    }
    item = found["models/one-auto"]
    assert (item["source"], item["id"]) == (str(tmp_path / "one.gguf"), one.stem[-20:])
    assert item["used"] == pytest.approx(time.time() - 3 * DAY, abs=100)
    code, out, _ = run("ls")
    assert code == 0
    line = next(line for line in out if "one (auto" in line)
    for word in (item["id"][:8], "5.0 MB", str(tmp_path / "one.gguf"), "[current]"):
        assert word in line
    assert out[-1].startswith(f"{cache}: 5.0 MB in all")


def test_a_cache_that_is_not_there(run: Run, cache: Path) -> None:
    assert run("ls") == (0, [f"{cache}: 0.0 MB in all"], [])
    assert run("prune") == (0, ["0.0 MB freed, 0.0 MB left"], [])
    assert run("rm", "--all") == (0, ["0.0 MB freed, 0.0 MB left"], [])
    assert not cache.exists()


def test_remove_by_name_id_or_part(run: Run, cache: Path, packed: Callable[..., Path]) -> None:
    first, second, third = packed("one"), packed("two"), packed("three", "q4")
    other = packed("one-more")
    for name in ("a", "b"):
        write(cache / "downloads" / name)
    assert run("rm", "one", second.stem[-20:])[0] == 0
    assert sorted((cache / "models").iterdir()) == sorted(
        path for kept in (third, other) for path in kept.parent.glob(f"{kept.stem}*")
    )
    code, out, _ = run("rm", third.stem[-20:][:8], "downloads")
    assert code == 0
    assert out == [
        f"removed three (q4, {third.stem[-20:][:8]}), 0.0 MB",
        "removed downloads/a, 0.0 MB",
        "removed downloads/b, 0.0 MB",
        "0.0 MB freed, 0.0 MB left",
    ]
    assert list((cache / "downloads").iterdir()) == []
    assert not first.exists()


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["one", "nonsense"], "nothing in the cache is called 'nonsense'"),
        (["../outside"], "nothing in the cache is called '../outside'"),
        ([""], "nothing in the cache is called ''"),
        ([], "either names"),
        (["one", "--all"], "either names"),
    ],
)
def test_what_cannot_be_meant(
    run: Run, packed: Callable[..., Path], tmp_path: Path, args: list[str], words: str
) -> None:
    """Nothing is removed then."""
    kept, outside = packed("one"), write(tmp_path / "home" / "outside")
    code, out, err = run("rm", *args)
    assert (code, out, len(err)) == (2, [], 1)
    assert words in err[0]
    assert kept.exists()
    assert outside.exists()


def test_remove_all_but_what_is_the_user_s_work(run: Run, cache: Path, packed: Callable[..., Path]) -> None:
    packed("one")
    for name in ("downloads/m.gguf", "kernels/abc/k.nbc", "times/a.json", "junk"):
        write(cache / name)
    work = [write(cache / name) for name in ("profiles/auto-0123.npz", "tuning.json")]
    assert run("rm", "--all")[0] == 0
    assert sorted(path for path in cache.rglob("*") if path.is_file()) == work
    assert run("rm", "profiles", "tuning.json")[0] == 0
    assert [path for path in cache.rglob("*") if path.is_file()] == []


def test_links_are_not_followed(run: Run, cache: Path, tmp_path: Path, packed: Callable[..., Path]) -> None:
    """Files, folders, and the cache's own folders, which the user may have put on another disk."""
    one = packed("one")
    outside = write(tmp_path / "outside" / "a" / "f", 10_000)
    one.with_name("linked-auto-" + "0" * 20 + ".safetensors").symlink_to(outside)
    (cache / "downloads").mkdir()
    (cache / "downloads" / "folder").symlink_to(outside.parent)
    (cache / "downloads" / "dangling").symlink_to(tmp_path / "nothing")
    (cache / "kernels").symlink_to(tmp_path / "outside")
    found = items(run)
    assert found["models/linked-auto"]["nbytes"] == found["downloads/folder"]["nbytes"] == 0
    assert not any(name.startswith("kernels/") for name in found)
    assert run("prune", "--keep-size", "0")[0] == 0
    assert run("rm", "--all")[0] == 0
    assert list((cache / "models").iterdir()) == list((cache / "downloads").iterdir()) == []
    assert outside.stat().st_size == 10_000
    assert (cache / "kernels").is_symlink()


def test_junk(run: Run, cache: Path, tmp_path: Path) -> None:
    """Anything may lie there: it is shown on a line each, and removed if nobody can use it."""
    names = ["x", "-auto-.safetensors", "two\nlines", "a-auto-" + "g" * 20 + ".safetensors", "b.partial", "caf\udce9"]
    for name in names:
        write(cache / "models" / name)
    (cache / "models" / "folder" / "deep").mkdir(parents=True)
    os.mkfifo(cache / "models" / "pipe")
    write(cache / "sources" / "x.json")
    (cache / "locks").mkdir()
    code, out, _ = run("ls")
    assert code == 0
    assert sum("[left]" in line for line in out) == len(names) + 2
    code, out, err = run("prune")
    assert (code, err) == (0, [])
    assert list((cache / "models").iterdir()) == []


def test_prune_removes_what_nobody_uses(run: Run, cache: Path, packed: Callable[..., Path], tmp_path: Path) -> None:
    keep = [packed("current", days=400), packed("touched"), write(cache / "profiles" / "auto-0.npz", days=400)]
    os.utime(tmp_path / "touched.gguf")
    lost = [packed("gone"), packed("edited"), packed("unknown")]
    (tmp_path / "gone.gguf").unlink()
    (tmp_path / "edited.gguf").write_bytes(b"another")
    for record in (cache / "sources").iterdir():
        if json.loads(record.read_bytes())["path"] == str(tmp_path / "unknown.gguf"):
            record.unlink()
    keep += [write(cache / "kernels" / "new" / "k", days=40), write(cache / "downloads" / "m.gguf", days=400)]
    lost += [write(cache / "kernels" / "old" / "k", days=50), write(cache / "models" / "x.partial")]
    keep += [write(cache / "downloads" / ".fetch-1" / "now")]
    lost += [write(cache / "downloads" / ".fetch-2" / "old", days=2)]
    write(cache / "locks" / "0123")
    code, out, err = run("prune")
    assert (code, err) == (0, [])
    assert [path for path in keep if not path.exists()] == []
    assert [path for path in lost if path.exists()] == []
    said = "\n".join(out)
    for words in ("the model is gone", "no model has this content any more", "not used for 30 days"):
        assert words in said
    assert said.count("left by a run that was killed") == 2
    assert list((cache / "locks").iterdir()) == []
    assert {json.loads(record.read_bytes())["path"] for record in (cache / "sources").iterdir()} == {
        str(tmp_path / f"{name}.gguf") for name in ("current", "touched", "edited")
    }
    assert run("prune")[1][0].startswith("0.0 MB freed")


def test_prune_by_age(run: Run, cache: Path, packed: Callable[..., Path]) -> None:
    """A download is as old as the use of what was packed from it."""
    old, new = packed("old", days=11), packed("new", days=9)
    kernel, work = write(cache / "kernels" / "k" / "x", days=11), write(cache / "profiles" / "p.npz", days=11)
    used, idle = write(cache / "downloads" / "used.gguf", days=99), write(cache / "downloads" / "idle.gguf", days=99)
    stem = f"used-auto-{content_of(used, pytest.fail)}"
    write(cache / "models" / f"{stem}.safetensors")
    code, out, _ = run("prune", "--older-than", "10")
    assert code == 0
    assert [path.exists() for path in (old, kernel, idle, new, work, used)] == [False] * 3 + [True] * 3
    assert out[0].endswith(": not used for 10 days")


def test_prune_to_a_size(run: Run, cache: Path, packed: Callable[..., Path]) -> None:
    """The least recently used go first, and no more than need to."""
    paths = [packed(name, size=1_000_000, days=days) for name, days in (("a", 1), ("b", 4), ("c", 2), ("d", 3))]
    work = write(cache / "profiles" / "p.npz", 900_000, days=99)
    assert run("prune", "--keep-size", "3MB")[0] == 0
    assert [path.exists() for path in paths] == [True, False, True, False]
    assert run("prune", "--keep-size", "0")[0] == 0
    assert [path.exists() for path in paths] == [False] * 4
    assert work.exists()


def test_what_is_being_written_stays(run: Run, cache: Path, packed: Callable[..., Path]) -> None:
    one, partial = packed("one"), write(cache / "models" / "two.partial")
    with locked(one), locked(partial.with_suffix(".safetensors")):
        code, _, err = run("rm", "one", "two.partial")
        assert code == 0
        assert len(err) == 2
        assert all(line.endswith("is just being written by another warmfront: left as it is") for line in err)
        run("prune", "--older-than", "0", "--keep-size", "0")
        assert one.exists()
        assert partial.exists()
    with locked(one.with_suffix(".profile")):
        assert len(run("rm", "one")[2]) == 1
    assert run("rm", "one", "two.partial")[2] == []
    assert list((cache / "models").iterdir()) == []


def test_a_cache_that_cannot_be_written(run: Run, packed: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    packed("one")

    def refuse(path: Path, **_: object) -> None:
        raise OSError(30, os.strerror(30))

    monkeypatch.setattr(Path, "unlink", refuse)
    assert run("ls")[0] == 0
    code, _, err = run("rm", "one")
    assert (code, len(err)) == (1, 1)
    assert err[0].startswith("warmfront: cannot remove one (auto, ")
    assert "Read-only file system" in err[0]


def test_locks_of_the_living_stay(cache: Path) -> None:
    with locked(cache / "a"):
        files.sweep_locks()
        assert files.is_locked(cache / "a")
    assert list((cache / "locks").iterdir()) == []
