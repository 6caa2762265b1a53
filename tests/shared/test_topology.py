"""Nodes, cores and the core plan, on small recorded trees.  pytest tests/shared/test_topology.py"""

import os
import random
from pathlib import Path

import pytest

from warmfront.shared.core_plan import CorePlan, WorkerCores, plan_cores
from warmfront.shared.errors import UsageError
from warmfront.shared.topology import Node, Topology, parse_cpu_list, read_topology

NODE_MEMORY = """Node {id} MemTotal:       7170260 kB
Node {id} MemFree:        6000000 kB
Node {id} Active(anon):    178592 kB
Node {id} Active(file):    300000 kB
Node {id} Inactive(file):  100000 kB
Node {id} HugePages_Total:     0
"""
MACHINE_MEMORY = """MemTotal:        8000000 kB
MemFree:         1000000 kB
MemAvailable:    5000000 kB
Active(file):     300000 kB
Inactive(file):   100000 kB
HugePages_Total:       0
"""


def write_machine(root: Path, nodes: dict[int, str], cores: list[str]) -> None:
    """`nodes`: cpulist by node id; `cores`: the cpulist of each physical core."""
    system = root / "sys/devices/system"
    for id_, cpulist in nodes.items():
        folder = system / f"node/node{id_}"
        folder.mkdir(parents=True)
        (folder / "cpulist").write_text(cpulist + "\n")
        (folder / "meminfo").write_text(NODE_MEMORY.format(id=id_))
    for siblings in cores:
        for cpu in parse_cpu_list(siblings):
            folder = system / f"cpu/cpu{cpu}/topology"
            folder.mkdir(parents=True)
            (folder / "thread_siblings_list").write_text(siblings + "\n")
    (root / "proc").mkdir()
    (root / "proc/meminfo").write_text(MACHINE_MEMORY)


def cores_by_node(topology: Topology) -> dict[int, tuple[tuple[int, ...], ...]]:
    return {node.id: node.cores for node in topology.nodes}


def machine(*cores: int) -> Topology:
    """A made-up machine: cores per node; node i has cpus from 100 * i on, two per core."""
    return Topology(
        tuple(
            Node(id_, tuple((100 * id_ + i, 100 * id_ + 50 + i) for i in range(count)), 1 << 30, 1 << 29)
            for id_, count in enumerate(cores)
        )
    )


@pytest.mark.parametrize(
    ("text", "cpus"),
    [("0-3,8\n", (0, 1, 2, 3, 8)), ("", ()), ("\n", ()), ("5", (5,)), ("0,2-3,10-11", (0, 2, 3, 10, 11))],
)
def test_parse_cpu_list(text: str, cpus: tuple[int, ...]) -> None:
    assert parse_cpu_list(text) == cpus


@pytest.mark.parametrize("text", ["a", "1-", "-1", "0;1"])
def test_parse_cpu_list_refuses(text: str) -> None:
    with pytest.raises(ValueError, match="invalid literal"):
        parse_cpu_list(text)


def test_one_socket_with_hyper_threads(tmp_path: Path) -> None:
    write_machine(tmp_path, {0: "0-7"}, ["0,4", "1,5", "2,6", "3,7"])
    topology = read_topology(tmp_path, range(8))
    assert cores_by_node(topology) == {0: ((0, 4), (1, 5), (2, 6), (3, 7))}
    assert topology.nodes[0].total_bytes == 8000000 * 1024
    assert topology.nodes[0].available_bytes == 5000000 * 1024


def test_two_sockets(tmp_path: Path) -> None:
    write_machine(tmp_path, {0: "0-1,4-5", 1: "2-3,6-7"}, ["0,4", "1,5", "2,6", "3,7"])
    topology = read_topology(tmp_path, range(8))
    assert cores_by_node(topology) == {0: ((0, 4), (1, 5)), 1: ((2, 6), (3, 7))}
    assert {node.total_bytes for node in topology.nodes} == {7170260 * 1024}
    assert {node.available_bytes for node in topology.nodes} == {6400000 * 1024}


def test_node_ids_with_a_gap(tmp_path: Path) -> None:
    write_machine(tmp_path, {8: "2-3", 0: "0-1", 10: "4"}, ["0-1", "2-3", "4"])
    topology = read_topology(tmp_path, range(5))
    assert cores_by_node(topology) == {0: ((0, 1),), 8: ((2, 3),), 10: ((4,),)}
    assert [node.id for node in topology.nodes] == [0, 8, 10]


def test_node_of_memory_only_is_left_out(tmp_path: Path) -> None:
    write_machine(tmp_path, {0: "0-1", 1: ""}, ["0", "1"])
    assert cores_by_node(read_topology(tmp_path, range(2))) == {0: ((0,), (1,))}


def test_container_without_nodes(tmp_path: Path) -> None:
    write_machine(tmp_path, {}, ["0,2", "1,3"])
    topology = read_topology(tmp_path, {0, 1, 3})
    assert cores_by_node(topology) == {0: ((0,), (1, 3))}
    assert topology.nodes[0].total_bytes == 8000000 * 1024
    assert topology.nodes[0].available_bytes == 5000000 * 1024


def test_container_without_any_cpu_topology(tmp_path: Path) -> None:
    write_machine(tmp_path, {}, [])
    assert cores_by_node(read_topology(tmp_path, {3, 1})) == {0: ((1,), (3,))}


def test_mask_removes_a_node_and_a_sibling(tmp_path: Path) -> None:
    write_machine(tmp_path, {0: "0-1,4-5", 1: "2-3,6-7"}, ["0,4", "1,5", "2,6", "3,7"])
    assert cores_by_node(read_topology(tmp_path, {2, 6, 7})) == {1: ((2, 6), (7,))}


def test_this_machine() -> None:
    topology = read_topology()
    cpus = [cpu for node in topology.nodes for core in node.cores for cpu in core]
    assert set(cpus) == os.sched_getaffinity(0)
    assert len(cpus) == len(set(cpus))
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert sum(node.total_bytes for node in topology.nodes) == pytest.approx(total, rel=0.01)
    assert all(0 < node.available_bytes <= node.total_bytes for node in topology.nodes)


def test_default_plan_has_a_worker_per_node_and_a_thread_per_core() -> None:
    plan = plan_cores(machine(2, 3))
    assert plan == CorePlan((WorkerCores(0, (0, 1)), WorkerCores(1, (100, 101, 102))))
    assert plan.coordinator == (0, 1, 100, 101, 102)


@pytest.mark.parametrize(
    ("cores", "workers", "threads", "expected"),
    [
        ((4, 4), None, 5, [(0, 3), (1, 2)]),
        ((1, 4), None, 4, [(0, 1), (1, 3)]),
        ((4, 4), None, 1, [(0, 1)]),
        ((4, 4), 1, 4, [(0, 4)]),
        ((4, 4), 1, 5, [(None, 5)]),
        ((4, 4), 1, None, [(None, 8)]),
        ((4,), 1, None, [(0, 4)]),
        ((4, 4, 4), 2, None, [(0, 4), (1, 4)]),
        ((4, 4), 4, None, [(0, 2), (0, 2), (1, 2), (1, 2)]),
        ((5,), 2, None, [(0, 2), (0, 3)]),
        ((4, 4), 3, 6, [(0, 2), (0, 2), (1, 2)]),
        ((1, 3), 4, 4, [(0, 1), (1, 1), (1, 1), (1, 1)]),
    ],
)
def test_plan(
    cores: tuple[int, ...], workers: int | None, threads: int | None, expected: list[tuple[int | None, int]]
) -> None:
    plan = plan_cores(machine(*cores), workers, threads)
    assert [(worker.node, len(worker.cpus)) for worker in plan.workers] == expected


@pytest.mark.parametrize(
    ("workers", "left", "gpu"),
    [
        ([(0, (0, 1))], [(0, (0,))], (1,)),
        ([(0, (0, 1, 2)), (1, (100, 101))], [(0, (0, 1)), (1, (100, 101))], (2,)),
        ([(0, (0, 1)), (1, (100, 101))], [(0, (0, 1)), (1, (100,))], (101,)),
        ([(None, (0, 1, 100))], [(None, (0, 1))], (100,)),
        ([(0, (0,)), (1, (100,))], [(0, (0,)), (1, (100,))], ()),
        ([(0, (3,))], [(0, (3,))], ()),
    ],
)
def test_an_emulated_gpu_takes_a_thread_that_can_be_spared(
    workers: list[tuple[int | None, tuple[int, ...]]],
    left: list[tuple[int | None, tuple[int, ...]]],
    gpu: tuple[int, ...],
) -> None:
    plan = CorePlan(tuple(WorkerCores(*each) for each in workers))
    with_gpu = plan.with_emulated_gpu()
    assert with_gpu == CorePlan(tuple(WorkerCores(*each) for each in left), gpu)
    assert sorted(with_gpu.coordinator) == sorted(plan.coordinator), "the team has every cpu all the same"
    assert plan.gpu == ()


@pytest.mark.parametrize(
    ("cores", "workers", "threads", "message"),
    [
        (
            (2,),
            None,
            8,
            "asked for 8 threads, but this process may use 2 cores: pass --threads 2 or fewer",
        ),
        ((2,), None, 0, "asked for 0 threads: pass --threads 1 or more"),
        ((2,), -1, None, "asked for -1 workers: pass --workers 1 or more"),
        ((2,), 3, None, "asked for 3 workers of 2 threads in all: pass --workers 2 or fewer"),
        ((2, 2), 3, 2, "asked for 3 workers of 2 threads in all: pass --workers 2 or fewer"),
        (
            (2, 2, 2),
            2,
            5,
            "asked for 5 threads of 2 workers, but each stays on one NUMA node and together these have 4 cores: "
            "pass --threads 4 or fewer, or --workers 3",
        ),
    ],
)
def test_plan_refuses(cores: tuple[int, ...], workers: int | None, threads: int | None, message: str) -> None:
    with pytest.raises(UsageError) as caught:
        plan_cores(machine(*cores), workers, threads)
    assert str(caught.value) == message


def test_any_plan_uses_each_core_once_and_stays_on_its_node() -> None:
    rng = random.Random(1)
    made = 0
    for _ in range(3000):
        topology = machine(*(rng.randint(1, 6) for _ in range(rng.randint(1, 4))))
        cores = {core[0]: node.id for node in topology.nodes for core in node.cores}
        workers, threads = rng.choice([None, rng.randint(1, 8)]), rng.choice([None, rng.randint(1, 24)])
        try:
            plan = plan_cores(topology, workers, threads)
        except UsageError:
            assert (threads or 0) > len(cores) or (workers or 0) > (threads or len(cores)) or workers in (2, 3)
            continue
        made += 1
        cpus = plan.coordinator
        assert len(set(cpus)) == len(cpus)
        assert set(cpus) <= set(cores)
        assert workers is None or len(plan.workers) == workers
        assert threads is None or len(cpus) == threads
        for worker in plan.workers:
            nodes = {cores[cpu] for cpu in worker.cpus}
            assert nodes == {worker.node} if worker.node is not None else len(nodes) > 1 == len(plan.workers)
    assert made > 1000
