"""When a model is packed, and what is left when that fails.  pytest tests/coordinator/packing/test_ensure_packed.py"""

import contextlib
import errno
import json
import os
import re
import resource
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.coordinator.packing.packed import pack, tensors_of
from tests.shared.model.specs import uncomputed
from warmfront.coordinator.models.open import open_source
from warmfront.coordinator.packing.packed_file import write_packed
from warmfront.coordinator.packing.packer import PackingPlan, ensure_packed
from warmfront.shared.errors import ModelError, ResourceError, UsageError, WarmfrontError
from warmfront.shared.files import locked, published
from warmfront.shared.model.store import FORMAT, PackedModel

Make = Callable[..., Path]


def test_progress_grows_to_the_size_of_the_file(folder: Path) -> None:
    seen: list[tuple[int, int]] = []
    packed = ensure_packed(folder, "auto", lambda line: None, lambda done, total: seen.append((done, total)))
    assert seen == sorted(seen)
    assert len(seen) > 10
    assert {total for _, total in seen} == {packed.stat().st_size}
    assert seen[-1][0] == seen[-1][1]


def test_a_second_call_uses_the_first_ones_file(folder: Path, models: Path) -> None:
    first = pack(folder)
    before = first.stat()

    def fail(*_args: object) -> None:
        raise AssertionError("packed again")

    assert ensure_packed(folder, "auto", fail, fail) == first
    assert (first.stat().st_ino, first.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
    assert list(models.iterdir()) == [first]


@pytest.mark.parametrize("header", [b"warmfront-12", b"warmfront-XX"])
def test_a_file_of_another_version_is_packed_anew(folder: Path, header: bytes) -> None:
    """Whatever its header has beside the version."""
    said: list[str] = []
    packed = pack(folder)
    whole = packed.read_bytes()
    packed.write_bytes(whole.replace(FORMAT.encode(), header, 1).replace(b"architecture", b"constitution", 1))
    assert ensure_packed(folder, "auto", said.append, lambda done, total: None) == packed
    assert said == [f"the packed model {packed} is damaged (format {header.decode()}): packing it anew"]
    assert packed.read_bytes() == whole


def test_a_file_of_a_model_that_is_not_supported_is_packed_anew(folder: Path) -> None:
    """It was not made from this model, whose description is supported."""
    packed = pack(folder)
    whole, plan = packed.read_bytes(), PackingPlan(open_source(folder), "auto")
    spec = uncomputed(plan.source.spec)
    with published(packed) as fd:
        write_packed(fd, spec, plan.all_kinds(), plan.text(), plan.shapes, map(plan.data, plan.shapes))
    with pytest.raises(
        ModelError, match=f"^{folder.name} uses parallel residual with post-norm, which is not supported yet$"
    ):
        PackedModel(packed)
    assert pack(folder) == packed
    assert packed.read_bytes() == whole


def test_types_lie_beside_each_other(folder: Path, models: Path) -> None:
    assert {pack(folder, dtype) for dtype in ("auto", "f16", "q4")} == set(models.iterdir())
    assert len(list(models.iterdir())) == 3


@pytest.mark.parametrize("file", ["model.safetensors", "config.json", "tokenizer.json", "tokenizer_config.json"])
def test_another_content_is_packed_anew(folder: Path, tmp_path: Path, file: str) -> None:
    """Small files even at the same time and size; of weights, samples and the time are looked at."""
    copy = shutil.copytree(folder, tmp_path / "copy")
    first = pack(copy)
    changed = copy / file
    times = changed.stat()
    data = changed.read_bytes()
    if file == "model.safetensors":
        changed.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    else:
        changed.write_bytes(data.replace(b": ", b" :", 1))
        os.utime(changed, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert changed.stat().st_size == times.st_size
    assert json.loads((copy / "config.json").read_bytes())
    second = pack(copy)
    assert second != first
    if file == "model.safetensors":
        assert second.read_bytes() != first.read_bytes()


@pytest.mark.parametrize("change", ["touch", "README.md", "picture.png"])
def test_what_is_no_content_is_not_packed_anew(folder: Path, tmp_path: Path, models: Path, change: str) -> None:
    copy = shutil.copytree(folder, tmp_path / "copy")
    first = pack(copy)
    before = first.stat()
    if change == "touch":
        for file in copy.iterdir():
            os.utime(file)
    else:
        (copy / change).write_text("changed")
    assert pack(copy) == first
    assert first.stat().st_ino == before.st_ino
    assert list(models.iterdir()) == [first]


def test_a_model_that_changes_while_it_is_packed(folder: Path, tmp_path: Path, models: Path) -> None:
    copy = shutil.copytree(folder, tmp_path / "copy")

    def change(done: int, total: int) -> None:
        if done == total:
            os.utime(copy / "model.safetensors")

    with pytest.raises(ModelError, match=r"copy was changed while it was packed: start again$"):
        ensure_packed(copy, "auto", lambda line: None, change)
    assert list(models.iterdir()) == []


@pytest.mark.parametrize("name", ["two\nlines", "ünï" * 25, "..", "-x", "a b.c"])
def test_names_that_are_no_file_names(tiny_gguf: Make, tmp_path: Path, name: str) -> None:
    packed = pack(tiny_gguf().rename(tmp_path / f"{name}.gguf"))
    assert re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*-auto-[0-9a-f]{20}\.safetensors", packed.name)
    assert len(packed.name) < 120


def test_the_cache_is_private(folder: Path, models: Path) -> None:
    before = os.umask(0)
    try:
        pack(folder)
    finally:
        os.umask(before)
    folders = [models.parent, *(path for path in models.parent.iterdir() if path.is_dir())]
    assert len(folders) > 2
    assert {path.stat().st_mode & 0o777 for path in folders} == {0o700}


def test_when_it_was_last_used(folder: Path) -> None:
    packed = pack(folder)
    os.utime(packed, (1, 2))
    pack(folder)
    assert packed.stat().st_atime > 1e9
    assert packed.stat().st_mtime == 2


def test_a_moved_model_is_recognised(folder: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(folder, tmp_path / folder.name)
    assert pack(copy) == pack(folder)


def test_an_error_leaves_nothing(folder: Path, models: Path) -> None:
    """And packing works afterwards."""

    def fail(done: int, total: int) -> None:
        if done > total // 2:
            raise ValueError("half way")

    before = os.listdir("/proc/self/fd")
    with pytest.raises(ValueError, match="half way"):
        ensure_packed(folder, "auto", lambda line: None, fail)
    assert list(models.iterdir()) == []
    assert os.listdir("/proc/self/fd") == before
    assert set(tensors_of(pack(folder))[0]) > {"embed", "norm"}
    assert len(list(models.iterdir())) == 1


def refuse_nameless_files(monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.open

    def refusing(path: Any, flags: int, *args: Any, **options: Any) -> int:
        if flags & os.O_TMPFILE == os.O_TMPFILE:
            raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))
        return real(path, flags, *args, **options)

    monkeypatch.setattr(os, "open", refusing)


@pytest.mark.parametrize("nameless", [True, False])
def test_a_file_is_replaced_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, nameless: bool) -> None:
    """Whole, or not at all; a leftover of a run that was killed does not matter."""
    if not nameless:
        refuse_nameless_files(monkeypatch)
    target = tmp_path / "model.safetensors"
    for text in (b"first", b"second"):
        with target.open("rb") if target.exists() else contextlib.nullcontext() as old:
            if old is not None:
                target.with_suffix(".partial").write_bytes(b"left over")
            with published(target) as fd:
                os.write(fd, text)
            assert target.read_bytes() == text
            assert old is None or old.read() == b"first"
    with pytest.raises(ZeroDivisionError), published(target) as fd:
        os.write(fd, bytes(1 // 0))
    assert target.read_bytes() == b"second"
    assert list(tmp_path.glob("model*")) == [target]


def test_no_room(folder: Path, models: Path) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(ResourceError) as caught:
            pack(folder)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    what_to_do = "set XDG_CACHE_HOME to a folder with room"
    assert str(caught.value) == f"cannot write the packed model to {models}: File too large; {what_to_do}"
    assert list(models.iterdir()) == []


def test_room_is_seen_to_before_packing(folder: Path, models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.fstatvfs

    def nearly_full(fd: int) -> Any:
        return type("Disk", (), {"f_bavail": 100, "f_frsize": real(fd).f_frsize})

    monkeypatch.setattr(os, "fstatvfs", nearly_full)
    with pytest.raises(ResourceError) as caught:
        pack(folder)
    assert re.search(r"needs 0\.00 GB in \S+, 0\.00 GB are free there: make room \(`warmfront", str(caught.value))
    assert list(models.iterdir()) == []


def test_a_disk_that_fills_up_half_way(folder: Path, models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.pwrite

    def full(fd: int, data: Any, offset: int) -> int:
        if offset > 100_000:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(fd, data, offset)

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(ResourceError, match=r"cannot write the packed model to .*: No space left on device"):
        pack(folder)
    assert list(models.iterdir()) == []


def test_another_model_is_not_waited_for(folder: Path, tiny_gguf: Make) -> None:
    first = pack(folder)
    with locked(first):
        other = ensure_packed(tiny_gguf(), "auto", pytest.fail, lambda done, total: None)
        types = ensure_packed(folder, "q8", pytest.fail, lambda done, total: None)
        assert ensure_packed(folder, "auto", pytest.fail, lambda done, total: None) == first, "nothing is written"
    assert len({first, other, types}) == 3


def test_a_second_run_waits_for_the_first(folder: Path, models: Path) -> None:
    said: list[str] = []
    waiting = threading.Event()

    def say(line: str) -> None:
        said.append(line)
        waiting.set()

    target = pack(folder)
    target.unlink()
    with contextlib.ExitStack() as stack:
        first = stack.enter_context(contextlib.ExitStack())
        first.enter_context(locked(target))
        packing = threading.Thread(target=ensure_packed, args=(folder, "auto", say, lambda done, total: None))
        packing.start()
        stack.callback(packing.join)
        assert waiting.wait(10)
        packing.join(0.05)
        assert packing.is_alive()
        assert list(models.iterdir()) == []
        first.close()
    assert said == ["waiting for another warmfront that is packing a model"]
    assert len(list(models.iterdir())) == 1


@pytest.mark.parametrize("name", ["model.gguf", "copy/model.safetensors", "copy/README.md"])
def test_a_pipe_is_not_waited_for(folder: Path, tmp_path: Path, models: Path, name: str) -> None:
    """Nobody ever writes into it."""
    shutil.copytree(folder, tmp_path / "copy")
    pipe = tmp_path / name
    pipe.unlink(missing_ok=True)
    os.mkfifo(pipe)
    with pytest.raises(ModelError, match=f"^{re.escape(str(pipe))} is a pipe or a device; "):
        pack(pipe if pipe.suffix == ".gguf" else pipe.parent)
    assert not models.exists()


def test_a_device_is_not_read(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").symlink_to("/dev/zero")
    with pytest.raises(ModelError, match=r"model\.gguf is a pipe or a device; "):
        pack(tmp_path / "model.gguf")


def test_a_dangling_link_beside_the_model_is_ignored(folder: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(folder, tmp_path / "copy")
    (copy / "README.md").symlink_to(tmp_path / "nothing")
    assert pack(copy).exists()


@pytest.mark.parametrize("path", ["missing.gguf", "missing"])
def test_no_such_model(tmp_path: Path, path: str) -> None:
    with pytest.raises((ModelError, UsageError)) as caught:
        pack(tmp_path / path)
    assert isinstance(caught.value, WarmfrontError)
    assert str(tmp_path / path) in str(caught.value)
