"""Binding memory and where pages lie; a kernel that refuses.  pytest tests/shared/machine/test_numa.py"""

import ctypes
import errno
import platform
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from warmfront.shared.errors import ResourceError
from warmfront.shared.machine import numa
from warmfront.shared.machine.memory import anonymous
from warmfront.shared.machine.numa import bind, bindable, free_on, pages_by_node
from warmfront.shared.machine.topology import read_topology

PAGE = 4096
NODE = read_topology().nodes[0].id
# A call that no kernel has.
ABSENT = 9999


def refuse(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    """Have every system call of numa.py fail with error `number`."""

    def syscall(*_: Any) -> int:
        ctypes.set_errno(number)
        return -1

    monkeypatch.setattr(numa, "_libc", SimpleNamespace(syscall=syscall))


needs_mbind = pytest.mark.skipif(not bindable([NODE]), reason="a container without mbind")


@needs_mbind
def test_touched_pages_lie_on_their_node() -> None:
    block = anonymous(64 * PAGE)
    assert pages_by_node(block) == {}, "nothing was touched yet"
    assert bind(block, NODE)
    block[: 16 * PAGE] = 1
    assert pages_by_node(block) == {NODE: 16}
    block[:] = 1
    assert pages_by_node(block) == {NODE: 64}
    assert pages_by_node(block, 8) == {NODE: 8}, "a sample"


@needs_mbind
def test_binding_keeps_what_is_there() -> None:
    block = anonymous(4 * PAGE)
    block[:] = 7
    assert bind(block[100:-100], NODE)
    assert bind(block[:0], NODE)
    assert (block == 7).all()


@needs_mbind
@pytest.mark.parametrize("node", [63, 64, 1000, 100_000])
def test_no_such_node(node: int) -> None:
    with pytest.raises(ResourceError, match=f"cannot bind memory to NUMA node {node}: .*; see `warmfront topology`"):
        bind(anonymous(PAGE), node)
    with pytest.raises(ResourceError):
        bindable([NODE, node])


@pytest.mark.parametrize("number", [errno.EPERM, errno.ENOSYS, errno.EACCES])
def test_where_it_is_forbidden(number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    refuse(monkeypatch, number)
    assert not bind(anonymous(PAGE), NODE)
    assert not bindable([NODE])
    assert bindable([]), "nothing to bind"
    assert pages_by_node(np.ones(PAGE, np.uint8)) == {}


def test_a_kernel_without_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(numa, "_NUMBERS", {platform.machine(): (ABSENT, ABSENT)})
    assert not bind(anonymous(PAGE), NODE)
    assert pages_by_node(np.ones(PAGE, np.uint8)) == {}


def test_an_unknown_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "machine", lambda: "riscv64")
    assert not bind(anonymous(PAGE), NODE)
    assert pages_by_node(np.ones(PAGE, np.uint8)) == {}


@pytest.mark.parametrize("make", [lambda: np.zeros(0, np.uint8), lambda: anonymous(PAGE)[:0]])
def test_empty_arrays(make: Callable[[], Any]) -> None:
    assert pages_by_node(make()) == {}


def test_free_memory() -> None:
    assert 0 < free_on(NODE) <= read_topology().nodes[0].total_bytes
    assert free_on(999) == 0
