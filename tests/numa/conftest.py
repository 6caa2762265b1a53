"""A small model for the tests on machines with NUMA nodes, and the kind of machine that each test is for."""

from pathlib import Path

import pytest

from tests.numa.model import write_model
from warmfront.shared.machine.topology import Topology, read_topology

RUN = "run scripts/numa_vm.sh --nodes {} pytest -m numa tests/numa"


@pytest.fixture(scope="session")
def two_nodes() -> Topology:
    """This machine, if its nodes 0 and 1 have cpus and memory."""
    machine = read_topology()
    if [node.id for node in machine.nodes if node.total_bytes][:2] != [0, 1]:
        pytest.skip(f"this machine has no two NUMA nodes: {RUN.format(2)}")
    return machine


@pytest.fixture(scope="session")
def memory_only() -> Topology:
    """This machine, if one of its nodes only holds memory."""
    machine = read_topology()
    if not machine.memory_nodes:
        pytest.skip(f"this machine has no node of memory alone: {RUN.format('memory-only')}")
    return machine


@pytest.fixture(scope="session")
def without_memory() -> Topology:
    """This machine, if one of its nodes has cpus and no memory."""
    machine = read_topology()
    if all(node.total_bytes for node in machine.nodes):
        pytest.skip(f"this machine has no node without memory: {RUN.format(4)}")
    return machine


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small model's file."""
    return write_model(tmp_path_factory.mktemp("numa") / "model.gguf")
