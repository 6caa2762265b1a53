"""Files that appear complete or not at all, and locks that leave nothing behind.  pytest tests/shared/test_files.py"""

import contextlib
import os
import signal
import stat
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from warmfront.shared.files import is_locked, locked, make_folder, published, write_whole


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    return tmp_path / "home" / "warmfront"


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is asked of the system, in order: what is synced, and when it gets its name."""
    seen: list[str] = []

    def noting(name: str, what: Callable[..., str]) -> None:
        real = getattr(os, name)

        def noted(*args: Any, **options: Any) -> Any:
            seen.append(f"{name} {what(*args)}")
            return real(*args, **options)

        monkeypatch.setattr(os, name, noted)

    noting("fsync", lambda fd: "folder" if stat.S_ISDIR(os.fstat(fd).st_mode) else "file")
    noting("link", lambda _source, target: Path(target).name)
    noting("rename", lambda _source, target: Path(target).name)
    return seen


def test_content_is_on_the_disk_before_the_name_and_the_name_before_the_end(tmp_path: Path, calls: list[str]) -> None:
    write_whole(tmp_path / "a.json", b"one")
    assert calls == ["fsync file", "link a.json", "fsync folder"]
    calls.clear()
    write_whole(tmp_path / "a.json", b"two")
    assert calls == ["fsync file", "link a.json", "link a.partial", "rename a.json", "fsync folder"]
    assert (tmp_path / "a.json").read_bytes() == b"two"


@pytest.mark.parametrize("old", [None, b"old"])
def test_a_disk_that_fills_up_half_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, old: bytes | None) -> None:
    target, real = tmp_path / "a.bin", os.pwrite
    if old is not None:
        target.write_bytes(old)

    def short(fd: int, data: memoryview, offset: int) -> int:
        if offset:
            raise OSError(28, os.strerror(28))
        return real(fd, data[:3], offset)

    monkeypatch.setattr(os, "pwrite", short)
    with pytest.raises(OSError, match="No space left"):
        write_whole(target, b"123456")
    assert {path.name: path.read_bytes() for path in tmp_path.glob("a*")} == ({} if old is None else {"a.bin": old})


def test_a_disk_that_cannot_sync(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What could be lost in a power cut gets no name."""

    def fail(_fd: int) -> None:
        raise OSError(5, os.strerror(5))

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="Input/output"), published(tmp_path / "a.bin") as fd:
        os.write(fd, b"1")
    assert list(tmp_path.glob("a*")) == []


def test_folders_of_the_cache_are_private(cache: Path) -> None:
    before = os.umask(0)
    try:
        make_folder(cache / "models")
    finally:
        os.umask(before)
    assert [stat.S_IMODE(path.stat().st_mode) for path in (cache, cache / "models")] == [0o700, 0o700]


def test_one_at_a_time_and_only_for_the_same(cache: Path) -> None:
    a, b, inside, said = cache / "a", cache / "b", 0, []

    def enter() -> None:
        nonlocal inside
        with locked(a, said.append):
            inside += 1

    threads = [threading.Thread(target=enter) for _ in range(5)]
    with locked(a), locked(b):
        assert is_locked(a)
        assert is_locked(b)
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(0.02)
        assert inside == 0
    for thread in threads:
        thread.join(10)
    assert inside == 5
    assert said == ["waiting for another warmfront that is packing a model"] * 5
    assert not is_locked(a)
    assert list((cache / "locks").iterdir()) == []


def test_who_has_waited_keeps_others_out(cache: Path) -> None:
    """The holder before removes the lock's file, so that the next one needs a new one."""
    waiting, inside, leave = threading.Event(), threading.Event(), threading.Event()

    def enter() -> None:
        with locked(cache / "a", lambda _line: waiting.set()):
            inside.set()
            leave.wait(10)

    second = threading.Thread(target=enter)
    with locked(cache / "a"):
        second.start()
        assert waiting.wait(10)
    assert inside.wait(10)
    kept_out = is_locked(cache / "a")
    leave.set()
    second.join(10)
    assert kept_out
    assert list((cache / "locks").iterdir()) == []


def test_a_killed_process_lets_go(cache: Path) -> None:
    code = (
        "import sys, time\nfrom pathlib import Path\nfrom warmfront.shared.files import locked\n"
        "with locked(Path(sys.argv[1])):\n    print('in', flush=True)\n    time.sleep(60)\n"
    )
    with subprocess.Popen([sys.executable, "-c", code, str(cache / "a")], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"in\n"
        assert is_locked(cache / "a")
        process.send_signal(signal.SIGKILL)
    assert not is_locked(cache / "a")
    with locked(cache / "a", pytest.fail):
        pass
    assert list((cache / "locks").iterdir()) == []


def test_a_lock_holds_whatever_way_leads_to_the_cache(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (cache.parent.parent / "link").symlink_to(cache.parent)
    with locked(cache / "models" / "a"):
        monkeypatch.setenv("XDG_CACHE_HOME", str(cache.parent.parent / "link"))
        assert is_locked(cache.parent.parent / "link" / "warmfront" / "models" / "a")


def test_what_fails_lets_go(cache: Path) -> None:
    with contextlib.suppress(ZeroDivisionError), locked(cache / "a"):
        raise ZeroDivisionError
    assert not is_locked(cache / "a")
