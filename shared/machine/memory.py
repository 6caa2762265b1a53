"""Memory of the hot path: anonymous for weights, memfd for what processes share.

A memfd has no name: nothing is left behind after SIGKILL, and a container's 64 MB /dev/shm does not limit it.
Weights ask for huge pages before first touch: 3 GB are then filled in 0.3 s instead of the 6 to 10 s of small pages
that are gathered afterwards, and random rows of 3 KB are read at 22 instead of 17 GB/s (docs/log.md). `collapse`
gathers what came in small pages all the same, once it holds its data.
"""

import contextlib
import ctypes
import mmap
import os
from typing import Any

import numpy as np
import numpy.typing as npt

from warmfront.shared.errors import ResourceError

__all__ = ["address", "anonymous", "collapse", "create_shared", "map_shared", "reserved", "zeros"]

Bytes = npt.NDArray[np.uint8]

_HUGE = 2 << 20
_MADV_COLLAPSE = 25
_MAP_NORESERVE = 0x4000
_libc = ctypes.CDLL(None, use_errno=True)


def address(array: npt.NDArray[Any]) -> int:
    """The address of the first byte of `array`."""
    return int(array.__array_interface__["data"][0])


def anonymous(size: int, *, huge: bool = False) -> Bytes:
    """`size` zero bytes of private memory, aligned to a huge page, backed only where touched.

    `huge`: ask for huge pages, where the kernel has them; for memory that will be filled anyway.
    """
    try:
        region = mmap.mmap(-1, size + _HUGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except (OSError, OverflowError) as error:
        raise ResourceError(f"cannot reserve {size / 1e9:.2f} GB of memory: {error}") from error
    if huge:
        with contextlib.suppress(OSError):  # a kernel without huge pages
            region.madvise(mmap.MADV_HUGEPAGE)
    whole = np.frombuffer(region, np.uint8)
    start = -address(whole) % _HUGE
    return whole[start : start + size]


def reserved(size: int) -> Bytes:
    """Addresses for `size` zero bytes of private memory that will never be touched all at once: nothing is set aside
    for them, and each touched page is a small one, which can be given back alone."""
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE
    try:
        region = mmap.mmap(-1, size, flags=flags)
    except (OSError, OverflowError) as error:
        raise ResourceError(f"cannot reserve {size / 1e9:.2f} GB of addresses: {error}") from error
    with contextlib.suppress(OSError):  # a kernel without huge pages
        region.madvise(mmap.MADV_NOHUGEPAGE)
    return np.frombuffer(region, np.uint8)


def zeros(shape: int | tuple[int, ...], dtype: Any) -> npt.NDArray[Any]:
    """As numpy's, but aligned to a page: the kernels' vectors then never straddle two cache lines.

    A straddling store costs a third of an axpy's speed (docs/log.md).
    """
    kind = np.dtype(dtype)
    size = int(np.prod(shape)) * kind.itemsize
    whole: npt.NDArray[Any] = anonymous(size)[:size].view(kind)
    return whole.reshape(shape)


def collapse(array: npt.NDArray[Any]) -> None:
    """Ask the kernel to merge the small pages of the filled `array` into huge ones; a refusal costs speed only."""
    first = -(-address(array) // _HUGE) * _HUGE
    last = (address(array) + array.nbytes) // _HUGE * _HUGE
    if first < last:
        _libc.madvise(ctypes.c_void_p(first), ctypes.c_size_t(last - first), _MADV_COLLAPSE)


def create_shared(name: str, size: int) -> int:
    """A file descriptor of a new memfd of `size` bytes, all allocated. Raises ResourceError if there is no room."""
    fd = os.memfd_create(name, os.MFD_CLOEXEC)
    try:
        os.posix_fallocate(fd, 0, size)
    except OSError as error:
        os.close(fd)
        raise ResourceError(f"no room for {size / 1e6:.1f} MB of shared memory: {error.strerror}") from error
    return fd


def map_shared(fd: int) -> Bytes:
    """Map the whole of a shared memory file; writes are seen by every process that maps it."""
    return np.frombuffer(mmap.mmap(fd, os.fstat(fd).st_size), np.uint8)
