"""Machines with a node that lacks cpus or memory.

scripts/numa_vm.sh --nodes memory-only pytest tests/numa/test_plans.py, and with --nodes 4
"""

import pytest

from warmfront.shared.machine.core_plan import WorkerCores, plan_cores
from warmfront.shared.machine.topology import Topology

pytestmark = pytest.mark.numa


def test_a_node_of_memory_alone_gets_no_worker(memory_only: Topology) -> None:
    assert [node.id for node in memory_only.nodes] == [0, 1]
    assert [node.id for node in memory_only.memory_nodes] == [2]
    assert memory_only.memory_nodes[0].distances == {0: 17, 1: 28, 2: 10}
    assert plan_cores(memory_only).workers == (WorkerCores(0, (0, 1), 0), WorkerCores(1, (2, 3), 1))


def test_a_node_without_memory_takes_that_of_the_nearest(without_memory: Topology) -> None:
    plan = plan_cores(without_memory)
    assert [node.total_bytes > 0 for node in without_memory.nodes] == [True, False, True, True]
    assert plan.workers == tuple(WorkerCores(node, (node,), memory) for node, memory in enumerate((0, 2, 2, 3)))
    assert plan.notes == ("node 1 has no memory for us: its workers take node 2's",)
