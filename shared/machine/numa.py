"""Which NUMA node pages lie on: bind them to a node before they are touched, and ask the kernel where they are.

    bind(weights, 1)            from now on their pages come from node 1, whoever touches them first
    pages_by_node(weights)      {1: 4096}, of a sample of the pages that were touched

Linux's `mbind` and `move_pages`, by number: libnuma need not be installed. A policy holds for pages that do not exist
yet; those that do stay (the kernel would move only pages that nobody else has mapped, and skip the rest silently).
Binding more than a node has free ends in the OOM killer, not in an error: check first.
"""

import ctypes
import errno
import os
import platform
from collections import Counter
from collections.abc import Iterable
from typing import Any

import numpy as np
import numpy.typing as npt

from warmfront.shared.errors import ResourceError
from warmfront.shared.machine.memory import address, zeros
from warmfront.shared.machine.topology import read_topology

__all__ = ["UNBOUND", "bind", "bindable", "ensure_free", "free_on", "pages_by_node"]

# What to tell the user where nothing is `bindable`.
UNBOUND = "memory cannot be bound to NUMA nodes here (a container?): first touch decides"

# mbind, move_pages
_NUMBERS = {"x86_64": (237, 279), "aarch64": (235, 239)}
_MPOL_BIND = 2
_PAGE = os.sysconf("SC_PAGE_SIZE")
_BITS = 64
_libc = ctypes.CDLL(None, use_errno=True)


def bind(array: npt.NDArray[Any], node: int) -> bool:
    """Have the pages of `array` that are touched from now on lie on `node`, including pages shared with other arrays.

    Returns False where this is not allowed, as in some containers: then first touch decides. Raises ResourceError if
    there is no such node.
    """
    numbers = _NUMBERS.get(platform.machine())
    if numbers is None:
        return False
    mask = np.zeros(node // _BITS + 1, np.uint64)
    mask[node // _BITS] = 1 << node % _BITS
    first, last = address(array) // _PAGE * _PAGE, -(-(address(array) + array.nbytes) // _PAGE) * _PAGE
    result = _libc.syscall(
        ctypes.c_long(numbers[0]),
        ctypes.c_void_p(first),
        ctypes.c_ulong(last - first),
        ctypes.c_int(_MPOL_BIND),
        ctypes.c_void_p(address(mask)),
        # The kernel reads one bit less than it is told.
        ctypes.c_ulong(len(mask) * _BITS + 1),
        ctypes.c_uint(0),
    )
    if result == 0:
        return True
    number = ctypes.get_errno()
    if number in (errno.EPERM, errno.ENOSYS, errno.EACCES):
        return False
    raise ResourceError(f"cannot bind memory to NUMA node {node}: {os.strerror(number)}; see `warmfront topology`")


def bindable(nodes: Iterable[int]) -> bool:
    """Whether memory may be bound to these nodes. Raises ResourceError if there is no such node."""
    return all(bind(zeros(1, np.uint8), node) for node in nodes)


def pages_by_node(array: npt.NDArray[Any], max_pages: int = 4096) -> dict[int, int]:
    """How many pages lie on each node, of up to `max_pages` spread evenly over `array`; untouched ones do not count.

    Empty where the kernel does not say.
    """
    numbers = _NUMBERS.get(platform.machine())
    if numbers is None or array.nbytes == 0:
        return {}
    first, last = address(array) // _PAGE, (address(array) + array.nbytes - 1) // _PAGE
    pages = np.unique(np.linspace(first, last, min(max_pages, last - first + 1)).astype(np.uint64)) * np.uint64(_PAGE)
    status = np.full(len(pages), -1, np.int32)
    result = _libc.syscall(
        ctypes.c_long(numbers[1]),
        ctypes.c_int(0),
        ctypes.c_ulong(len(pages)),
        ctypes.c_void_p(address(pages)),
        ctypes.c_void_p(None),
        ctypes.c_void_p(address(status)),
        ctypes.c_int(0),
    )
    if result != 0:
        return {}
    return dict(sorted(Counter(status[status >= 0].tolist()).items()))


def ensure_free(node: int, need: int) -> None:
    """Raise ResourceError if `node` has less than `need` bytes free: the kernel would not refuse, but kill later."""
    free = free_on(node)
    if need > free:
        raise ResourceError(
            f"NUMA node {node} is to hold {need / 1e9:.1f} GB, but has {free / 1e9:.1f} GB free: "
            "use a smaller --dtype or model, free memory there, or pass --no-pin to take it from any node"
        )


def free_on(node: int) -> int:
    """Bytes of a node's memory that this process may still take; 0 if there is no such node."""
    topology = read_topology()
    free = [each.available_bytes for each in (*topology.nodes, *topology.memory_nodes) if each.id == node]
    return min([*free, topology.available_bytes]) if free else 0
