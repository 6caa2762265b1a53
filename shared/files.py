"""How files are written: as a whole or not at all, synced to the disk, by one process at a time.

A file is written without a name (O_TMPFILE), synced, and linked into its folder when complete, so that a killed run or
a power cut leaves nothing of it. Where it replaces an older file, or the file system has no nameless files, or the next
run is to go on with what a killed one has written, it is called NAME.partial until then.
"""

import contextlib
import errno
import fcntl
import hashlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path

from warmfront.shared.errors import UsageError
from warmfront.shared.paths import cache_root

__all__ = [
    "check_writable",
    "is_locked",
    "locked",
    "make_folder",
    "published",
    "sweep_locks",
    "write_all",
    "write_whole",
]


def _quiet(_line: str) -> None:
    pass


def check_writable(path: Path) -> None:
    """Raise UsageError if no file can be put in the place of `path`: devices and pipes are not replaced."""
    folder = path.parent
    # /dev/stdout may lead to a file, and yet be no place for one.
    if not path.name or (path.exists() and not path.is_file()) or folder.resolve() == Path("/dev"):
        raise UsageError(f"cannot write {path}: it is no file; name another one")
    if not folder.is_dir():
        raise UsageError(f"cannot write {path}: there is no folder {folder}; make it, or name another file")
    if not os.access(folder, os.W_OK):
        raise UsageError(f"cannot write {path}: {folder} may not be written to; name another file")


def make_folder(folder: Path) -> None:
    """Make a folder of the cache if it is missing; for this user alone, since what is in the cache is trusted."""
    for each in (cache_root(), folder):
        each.mkdir(mode=0o700, parents=True, exist_ok=True)


@contextlib.contextmanager
def locked(path: Path, say: Callable[[str], None] = _quiet) -> Iterator[None]:
    """Let only one process at a time into such a block for `path`, a file of the cache.

    `say` gets a line if it has to wait. A killed process releases its lock. Raises OSError where the cache cannot be
    written.
    """
    lock = _lock_of(path)
    make_folder(lock.parent)
    fd = _take(lock, say)
    try:
        yield
    finally:
        lock.unlink(missing_ok=True)
        os.close(fd)


def is_locked(path: Path) -> bool:
    """Whether a process is in a block `locked` for `path` now."""
    try:
        fd = os.open(_lock_of(path), os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(fd)
    return False


def sweep_locks() -> None:
    """Remove the lock files that killed processes have left behind."""
    for lock in _lock_of(cache_root()).parent.glob("*"):
        with contextlib.suppress(OSError):
            fd = os.open(lock, os.O_RDWR | os.O_CLOEXEC)
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                lock.unlink()
            except BlockingIOError:
                pass
            finally:
                os.close(fd)


def _lock_of(path: Path) -> Path:
    name = os.path.relpath(path, cache_root())  # the same whatever path leads to the cache
    return cache_root() / "locks" / hashlib.sha256(os.fsencode(name)).hexdigest()[:20]


def _take(lock: Path, say: Callable[[str], None]) -> int:
    """A descriptor that holds the lock.

    The process that held it before has removed the file: a lock on that holds back nobody, so it is taken again.
    """
    while True:
        fd = os.open(lock, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
        try:
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                say("waiting for another warmfront that is packing a model")
                say = _quiet
                fcntl.flock(fd, fcntl.LOCK_EX)
            if os.fstat(fd).st_nlink:
                return fd
        except BaseException:
            os.close(fd)
            raise
        os.close(fd)


@contextlib.contextmanager
def published(target: Path, *, continued: bool = False) -> Iterator[int]:
    """A file descriptor whose file appears as `target` when the block ends without an exception, and only then.

    It replaces an existing `target`; processes that have the old one open keep it. Publish files that several processes
    write within `locked`. Raises OSError, and then leaves nothing.

    `continued`: the file has what a run that was killed or interrupted has written of it; the caller finds out how much
    of that is right.
    """
    partial = target.with_suffix(".partial")
    fd, named = _opened(partial, continued)
    try:
        yield fd
        os.fsync(fd)  # before it has a name: after a power cut, a file that has its name is complete
        if not named:
            try:
                _link(fd, target)
            except FileExistsError:  # only a rename replaces a file, and only a file with a name can be renamed
                partial.unlink(missing_ok=True)
                _link(fd, partial)
                named = True
        if named:
            partial.rename(target)
    except BaseException as error:
        if named and not (continued and isinstance(error, KeyboardInterrupt)):
            partial.unlink(missing_ok=True)
        raise
    finally:
        os.close(fd)
    _sync_folder(target.parent)


def _opened(partial: Path, continued: bool) -> tuple[int, bool]:
    """A descriptor of a file for `published`, and whether that has the name `partial`."""
    flags = os.O_RDWR | os.O_CLOEXEC
    if continued:
        return os.open(partial, os.O_CREAT | flags, 0o644), True
    try:
        return os.open(partial.parent, os.O_TMPFILE | flags, 0o644), False
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.EISDIR, errno.EINVAL):
            raise
    return os.open(partial, os.O_CREAT | os.O_TRUNC | flags, 0o644), True


def _link(fd: int, name: Path) -> None:
    """Give a nameless file a name. src_dir_fd only makes Python call linkat(), which follows the link in /proc."""
    os.link(f"/proc/self/fd/{fd}", name, src_dir_fd=fd, follow_symlinks=True)


def _sync_folder(folder: Path) -> None:
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def write_whole(path: Path, data: bytes) -> None:
    """Publish `data` as `path`. Raises OSError, and then leaves nothing."""
    with published(path) as fd:
        write_all(fd, data, 0)


def write_all(fd: int, data: bytes | memoryview, offset: int) -> None:
    """Write all of `data` at `offset`. Raises OSError."""
    view = memoryview(data)
    while view:
        count = os.pwrite(fd, view[: 1 << 30], offset)
        view, offset = view[count:], offset + count
