"""Memory lies on the node that it was bound to.  scripts/numa_vm.sh pytest -m numa tests/numa/test_pages.py"""

import threading
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from warmfront.shared.errors import ResourceError
from warmfront.shared.machine.memory import anonymous
from warmfront.shared.machine.numa import bind, free_on, pages_by_node
from warmfront.shared.machine.process import pin
from warmfront.shared.machine.topology import Topology

MB = 1 << 20

pytestmark = pytest.mark.numa


def touch(memory: npt.NDArray[Any], topology: Topology, node: int) -> None:
    """Write all of `memory` from a cpu of `node`."""

    def write() -> None:
        pin([next(each for each in topology.nodes if each.id == node).cores[0][0]])
        memory[:] = 1

    thread = threading.Thread(target=write)
    thread.start()
    thread.join()


@pytest.mark.parametrize(("bound", "toucher"), [(0, 1), (1, 0), (1, 1)])
@pytest.mark.parametrize("huge", [False, True])
def test_bound_memory_lies_on_its_node_whoever_touches_it(
    two_nodes: Topology, bound: int, toucher: int, huge: bool
) -> None:
    memory = anonymous(32 * MB, huge=huge)
    assert bind(memory, bound)
    assert pages_by_node(memory) == {}, "untouched memory lies nowhere"
    touch(memory, two_nodes, toucher)
    assert pages_by_node(memory) == {bound: 4096}


@pytest.mark.parametrize("toucher", [0, 1])
def test_unbound_memory_lies_where_it_was_touched(two_nodes: Topology, toucher: int) -> None:
    """Proof that the test above would notice a `bind` that does nothing."""
    memory = anonymous(8 * MB)
    touch(memory, two_nodes, toucher)
    assert pages_by_node(memory) == {toucher: 2048}


def test_pages_that_are_there_stay(two_nodes: Topology) -> None:
    memory = anonymous(8 * MB)
    touch(memory[: 4 * MB], two_nodes, 0)
    assert bind(memory, 1)
    touch(memory, two_nodes, 0)
    assert pages_by_node(memory) == {0: 1024, 1: 1024}


def test_a_node_that_is_not_there(two_nodes: Topology) -> None:
    with pytest.raises(ResourceError, match=r"^cannot bind memory to NUMA node 63: .*; see `warmfront topology`$"):
        bind(anonymous(MB), 63)
    assert free_on(63) == 0


def test_free_memory_of_a_node(two_nodes: Topology) -> None:
    before = free_on(1)
    memory = anonymous(64 * MB)
    bind(memory, 1)
    touch(memory, two_nodes, 0)
    assert 48 * MB < before - free_on(1) < 96 * MB
    assert np.all(memory)
