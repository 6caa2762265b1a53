"""What is read of each recorded machine, and of this one.  pytest tests/shared/machine/test_topology.py"""

import os
from pathlib import Path

import pytest

from tests.shared.machines import GB, MACHINES, STATUS, V2, Machine, write
from warmfront.shared.machine.topology import (
    Cache,
    Topology,
    parse_cpu_list,
    read_caches,
    read_processor,
    read_topology,
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


def topology_of(machine: Machine, root: Path) -> Topology:
    write(machine, root)
    return read_topology(root, machine.cpus)


@pytest.fixture
def topology(request: pytest.FixtureRequest, tmp_path: Path) -> Topology:
    """The machine that the test's mark names."""
    return topology_of(MACHINES[request.param], tmp_path)


def of(name: str) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("topology", [name], indirect=True)


SINGLES = tuple((i,) for i in range(16))
CORES = {
    "desktop": {0: ((0, 4), (1, 5), (2, 6), (3, 7))},
    "intel hybrid": {0: ((0, 1), (2, 3), (4,), (5,), (6,), (7,))},
    "big.LITTLE": {0: ((4,), (5,), (6,), (7,), (0,), (1,), (2,), (3,))},
    "two sockets": {0: ((0, 8), (1, 9), (2, 10), (3, 11)), 1: ((4, 12), (5, 13), (6, 14), (7, 15))},
    "four sockets": {i: ((2 * i, 8 + 2 * i), (2 * i + 1, 9 + 2 * i)) for i in range(4)},
    "sub-NUMA clusters": {i: SINGLES[2 * i : 2 * i + 2] for i in range(8)},
    "cxl": {0: ((0,), (1,)), 1: ((2,), (3,))},
    "node without memory": {i: SINGLES[2 * i : 2 * i + 2] for i in range(4)},
    "gaps": {0: ((0, 1),), 8: ((2, 3),)},
    "offline": {0: ((0, 4), (1,))},
    "cpuset": {0: ((2, 10), (3,)), 1: ((4,),)},
    "quota": {0: ((0, 4), (1, 5), (2, 6), (3, 7))},
    "half a core": {0: ((0, 4), (1, 5), (2, 6), (3, 7))},
    "cgroup v1": {0: ((0, 4), (1, 5), (2, 6), (3, 7))},
    "no sys": {0: ((1,), (3,))},
    "no mems": {0: ((0, 8), (1, 9), (2, 10), (3, 11)), 1: ((4, 12), (5, 13), (6, 14), (7, 15))},
}
# GB of the nodes' memory where it is not 8 each.
MEMORY = {
    "desktop": {0: 32},
    "two sockets": {0: 64, 1: 128},
    "cxl": {0: 16, 1: 16, 2: 64},
    "node without memory": {0: 16, 1: 0, 2: 16, 3: 0},
    "gaps": {0: 8, 8: 8, 250: 4},
    "cpuset": {0: 0, 1: 128},
    "no mems": {0: 64, 1: 0},
}


@pytest.mark.parametrize("name", MACHINES)
def test_cores_and_memory(name: str, tmp_path: Path) -> None:
    topology = topology_of(MACHINES[name], tmp_path)
    assert {node.id: node.cores for node in topology.nodes} == CORES[name]
    assert [node.id for node in topology.nodes] == sorted(CORES[name])
    every = [*topology.nodes, *topology.memory_nodes]
    memory = MEMORY.get(name) or dict.fromkeys(CORES[name], 8)
    assert {node.id: node.total_bytes / GB for node in every} == memory
    assert {node.id: node.available_bytes / GB for node in every} == {id_: size / 2 for id_, size in memory.items()}


@of("desktop")
def test_desktop(topology: Topology) -> None:
    assert topology.gpus == (("0000:01:00.0", -1),), "neither Intel's nor the card's sound"
    assert (topology.huge_pages, topology.balancing) == ("madvise", False)
    assert (topology.quota, topology.memory_limit, topology.offline) == (None, None, ())
    assert topology.efficient == frozenset()
    assert topology.available_bytes == 16 * GB


@pytest.mark.parametrize(
    ("name", "caches"),
    [
        ("desktop", [Cache(1, 32 << 10, 4), Cache(2, 1 << 20, 4), Cache(3, 32 << 20, 1)]),
        ("two sockets", [Cache(3, 16 << 20, 2)]),
        ("no sys", []),
    ],
)
def test_caches(name: str, caches: list[Cache], tmp_path: Path) -> None:
    write(MACHINES[name], tmp_path)
    assert read_caches(tmp_path, MACHINES[name].cpus) == tuple(caches)
    assert read_caches(tmp_path, {0}) == tuple(Cache(each.level, each.bytes, 1) for each in caches)


@of("intel hybrid")
def test_efficient_cores(topology: Topology) -> None:
    assert topology.efficient == {4, 5, 6, 7}


@of("big.LITTLE")
def test_little_cores(topology: Topology) -> None:
    assert topology.efficient == {0, 1, 2, 3}, "the big ones beside a prime core are fast too"


def test_only_slow_cores_allowed(tmp_path: Path) -> None:
    write(MACHINES["intel hybrid"], tmp_path)
    assert read_topology(tmp_path, range(4, 8)).efficient == frozenset(), "there are no faster ones for us"


@of("two sockets")
def test_two_sockets(topology: Topology) -> None:
    assert [node.distances for node in topology.nodes] == [{0: 10, 1: 21}, {0: 21, 1: 10}]
    assert topology.gpus == (("0000:81:00.0", 1),)
    assert (topology.huge_pages, topology.balancing) == ("always", True)
    assert [topology.memory_of(id_) for id_ in (0, 1)] == [*topology.nodes]


@of("sub-NUMA clusters")
def test_distances_between_clusters(topology: Topology) -> None:
    assert topology.nodes[5].distances == {0: 21, 1: 21, 2: 21, 3: 21, 4: 12, 5: 10, 6: 12, 7: 12}


@of("cxl")
def test_a_node_of_memory_only(topology: Topology) -> None:
    assert [node.id for node in topology.memory_nodes] == [2]
    assert topology.available_bytes == 48 * GB
    assert topology.nodes[0].distances == {0: 10, 1: 21, 2: 14}


@of("node without memory")
def test_the_nearest_memory(topology: Topology) -> None:
    nearest = [topology.memory_of(node.id) for node in topology.nodes]
    assert [node and node.id for node in nearest] == [0, 0, 2, 2]


@of("gaps")
def test_ids_with_gaps(topology: Topology) -> None:
    assert topology.nodes[1].distances == {0: 40, 8: 10, 250: 80}


@of("offline")
def test_offline_cpus(topology: Topology) -> None:
    assert topology.offline == (2, 3, 5, 6, 7), "not those that a virtual machine may be given one day"


@of("cpuset")
def test_cpuset(topology: Topology) -> None:
    memory = topology.memory_of(0)
    assert memory is not None
    assert memory.id == 1
    assert topology.available_bytes == 64 * GB


def test_a_whole_node_masked_out_still_has_memory(tmp_path: Path) -> None:
    write(MACHINES["two sockets"], tmp_path)
    topology = read_topology(tmp_path, {4, 5, 13})
    assert [node.cores for node in topology.nodes] == [((4,), (5, 13))]
    assert [node.id for node in topology.memory_nodes] == [0]


@of("quota")
def test_quota(topology: Topology) -> None:
    assert topology.quota == 2.5
    assert topology.memory_limit == topology.available_bytes == GB + GB // 2 + GB // 4


@of("half a core")
def test_half_a_core(topology: Topology) -> None:
    assert topology.quota == 0.5


@of("cgroup v1")
def test_cgroup_v1(topology: Topology) -> None:
    assert topology.quota == 3
    assert topology.memory_limit == GB + GB // 4


@pytest.mark.parametrize("used", [0, GB // 2])
def test_file_pages_never_raise_the_limit(used: int, tmp_path: Path) -> None:
    files = {"proc/self/cgroup": "0::/a/b", f"{V2}/a/memory.max": str(GB), f"{V2}/a/memory.current": str(used)}
    files[f"{V2}/a/memory.stat"] = f"inactive_file {used}\nactive_file {used}"
    assert topology_of(Machine({0: "0"}, ["0"], files=files), tmp_path).memory_limit == GB


def test_the_tightest_of_nested_groups(tmp_path: Path) -> None:
    files = {"proc/self/cgroup": "0::/a/b", f"{V2}/a/cpu.max": "150000 100000", f"{V2}/a/b/cpu.max": "400000 100000"}
    assert topology_of(Machine({0: "0-3"}, ["0-3"], files=files), tmp_path).quota == 1.5


@pytest.mark.parametrize("line", ["0::/../../other", "", "0::/gone (deleted)"])
def test_odd_groups_limit_nothing(line: str, tmp_path: Path) -> None:
    topology = topology_of(Machine({0: "0"}, ["0"], files={"proc/self/cgroup": line}), tmp_path)
    assert (topology.quota, topology.memory_limit) == (None, None)


@of("no sys")
def test_nothing_but_proc(topology: Topology) -> None:
    assert topology == Topology(topology.nodes)


def test_no_files_at_all(tmp_path: Path) -> None:
    (node,) = read_topology(tmp_path, {0, 2}).nodes
    assert (node.id, node.cores, node.total_bytes) == (0, ((0,), (2,)), 0)


def test_a_status_without_nodes(tmp_path: Path) -> None:
    machine = Machine({0: "0", 1: "1"}, ["0", "1"], distances=["10 20", "20 10"])
    write(Machine(**{**vars(machine), "files": {"proc/self/status": STATUS.format("0-1", "")}}), tmp_path)
    assert [node.total_bytes for node in read_topology(tmp_path, {0, 1}).nodes] == [8 * GB, 8 * GB]


def test_this_machine() -> None:
    topology = read_topology()
    cpus = [cpu for node in topology.nodes for core in node.cores for cpu in core]
    assert set(cpus) == os.sched_getaffinity(0)
    assert len(cpus) == len(set(cpus))
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert sum(node.total_bytes for node in topology.nodes) == pytest.approx(total, rel=0.01)
    assert all(0 < node.available_bytes <= node.total_bytes for node in topology.nodes)


@pytest.mark.parametrize(
    ("cpuinfo", "highest", "name"),
    [
        ("model\t: 143\nmodel name\t: Xeon\nbogomips\t: 5199.99\n\nmodel name\t: other", "", "Xeon 143, 2600 MHz"),
        ("model name : Xeon\nbogomips : 5199.99", "3512000\n", "Xeon, 3500 MHz"),
        ("CPU implementer : 0x41\nCPU part : 0xd0c", "", "0x41 0xd0c"),
        ("", "", ""),
    ],
)
def test_processor(cpuinfo: str, highest: str, name: str, tmp_path: Path) -> None:
    files = {"proc/cpuinfo": cpuinfo, "sys/devices/system/cpu/cpu0/cpufreq/cpuinfo_max_freq": highest}
    for path, text in files.items():
        (tmp_path / path).parent.mkdir(parents=True)
        (tmp_path / path).write_text(text)
    assert read_processor(tmp_path) == name
