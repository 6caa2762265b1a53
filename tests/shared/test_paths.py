"""Where the cache is, on machines with and without a home.  pytest tests/shared/test_paths.py"""

import os
import pwd
import stat
from collections.abc import Callable
from pathlib import Path

import pytest

from warmfront.shared.errors import ResourceError
from warmfront.shared.paths import cache_root


@pytest.fixture(autouse=True)
def nothing_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No home, no entry in the list of users, and a temporary folder for this test."""

    def unknown(_uid: int) -> None:
        raise KeyError

    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.setattr(pwd, "getpwuid", unknown)
    (tmp_path / "temporary").mkdir()
    monkeypatch.setenv("TMPDIR", str(tmp_path / "temporary"))


def test_what_the_user_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_root() == tmp_path / ".cache/warmfront"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "mine"))
    assert cache_root() == tmp_path / "mine/warmfront"
    assert not (tmp_path / ".cache").exists()
    assert not (tmp_path / "mine").exists()


@pytest.mark.parametrize("wish", ["", "relative", "./here", "~/.cache"])
def test_a_relative_wish_counts_for_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wish: str) -> None:
    """As the XDG base directory specification demands."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", wish)
    assert cache_root() == tmp_path / ".cache/warmfront"


def test_the_home_of_the_list_of_users(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    entry = pwd.struct_passwd(("me", "x", os.getuid(), os.getgid(), "", str(tmp_path), ""))
    monkeypatch.setattr(pwd, "getpwuid", lambda _uid: entry)
    assert cache_root() == tmp_path / ".cache/warmfront"


@pytest.mark.parametrize("home", [None, "", "relative", "~", "/dev/null", "/proc/nothing", "/nonexistent"])
def test_without_a_home_it_is_private_and_always_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, home: str | None
) -> None:
    may = os.access  # root may write everywhere
    monkeypatch.setattr(os, "access", lambda path, mode: str(path) != "/" and str(path) != "/proc" and may(path, mode))
    if home is not None:
        monkeypatch.setenv("HOME", home)
    previous = os.umask(0)
    try:
        root = cache_root()
    finally:
        os.umask(previous)
    assert root == tmp_path / "temporary" / f"warmfront-{os.geteuid()}"
    assert stat.S_IMODE(root.stat().st_mode) == 0o700
    assert cache_root() == root


def test_a_home_that_holds_a_cache_is_used_though_it_may_not_be_written_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(os, "access", lambda _path, mode: not mode & os.W_OK)
    assert cache_root().parent == tmp_path / "temporary"
    (tmp_path / ".cache/warmfront").mkdir(parents=True)
    assert cache_root() == tmp_path / ".cache/warmfront"


@pytest.mark.parametrize(
    "prepare",
    [
        lambda folder: (folder.mkdir(), folder.chmod(0o777)),
        lambda folder: (folder.mkdir(0o700), os.chown(folder, 54321, 54321)),
        lambda folder: folder.touch(),
        lambda folder: folder.symlink_to("/tmp"),
        lambda folder: folder.symlink_to("nowhere"),
    ],
    ids=["open", "foreign", "file", "link", "dangling"],
)
def test_what_others_made_there_is_refused(tmp_path: Path, prepare: Callable[[Path], object]) -> None:
    if os.geteuid():
        pytest.skip("needs root to give a folder away")
    prepare(tmp_path / "temporary" / f"warmfront-{os.geteuid()}")
    with pytest.raises(ResourceError, match=r"not a private folder.*set XDG_CACHE_HOME"):
        cache_root()


def test_nowhere_to_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path / "missing"))
    with pytest.raises(ResourceError, match=r"missing.* cannot be made: No such file or directory; set XDG_CACHE_HOME"):
        cache_root()
