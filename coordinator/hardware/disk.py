"""What the disk gives to reads such as those of a cache of neurons: the upper bound of a model that is read from it."""

import mmap
import os
import random
import threading
import time

from warmfront.shared.errors import ResourceError

__all__ = ["disk_bandwidth"]

# As many as a worker's threads that read; for so long.
_READERS, _SECONDS = 8, 0.5
_ALIGNMENT = 4096


def disk_bandwidth(path: str | os.PathLike[str], size: int) -> float:
    """Bytes a second of reads of `size` bytes, rounded up to pages, at random places of a file, past the page cache.

    Where the file system has no direct reads, the page cache is measured. Raises ResourceError for a file that
    cannot be read.
    """
    size = max(1, -(-size // _ALIGNMENT)) * _ALIGNMENT
    try:
        try:
            file = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_DIRECT)
        except OSError:
            file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            return _read(file, size)
        finally:
            os.close(file)
    except OSError as error:
        raise ResourceError(f"cannot read {path}: {error.strerror}") from error


def _read(file: int, size: int) -> float:
    places = max(1, (os.fstat(file).st_size - size) // _ALIGNMENT)
    read, errors = [0] * _READERS, []
    started = time.monotonic()

    def act(reader: int) -> None:
        choose = random.Random(reader)
        with mmap.mmap(-1, size) as buffer:
            try:
                while time.monotonic() - started < _SECONDS:
                    read[reader] += os.preadv(file, [buffer], choose.randrange(places) * _ALIGNMENT)
            except OSError as error:
                errors.append(error)

    threads = [threading.Thread(target=act, args=(reader,)) for reader in range(_READERS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    return sum(read) / (time.monotonic() - started)
