"""`warmfront topology`'s lines for recorded machines.  pytest tests/coordinator/cli/test_topology.py"""

import json
from collections.abc import Collection
from pathlib import Path
from typing import Any

import pytest

from tests.shared.machines import MACHINES, write
from warmfront.coordinator.cli import topology
from warmfront.coordinator.cli.topology import describe, render
from warmfront.shared.machine.numa import UNBOUND
from warmfront.shared.machine.topology import read_caches, read_topology

FOUR_SOCKETS = """\
node 0: 2 cores, 4 hyper-threads; 4.3 of 8.6 GB free
  cpus 0-1,8-9
node 1: 2 cores, 4 hyper-threads; 4.3 of 8.6 GB free
  cpus 2-3,10-11
node 2: 2 cores, 4 hyper-threads; 4.3 of 8.6 GB free
  cpus 4-5,12-13
node 3: 2 cores, 4 hyper-threads; 4.3 of 8.6 GB free
  cpus 6-7,14-15
  distances from node 0: 0: 10, 1: 21, 2: 21, 3: 31
  distances from node 1: 0: 21, 1: 10, 2: 31, 3: 21
  distances from node 2: 0: 21, 1: 31, 2: 10, 3: 21
  distances from node 3: 0: 31, 1: 21, 2: 21, 3: 10
huge pages: none; kernel NUMA balancing: off
plan: worker cpu0 on node 0, cpus 0-1
plan: worker cpu1 on node 1, cpus 2-3
plan: worker cpu2 on node 2, cpus 4-5
plan: worker cpu3 on node 3, cpus 6-7
plan: coordinator's team on cpus 0-7
plan: cpus 8-15 stay unused"""
CONTAINER = """\
node 0: 4 cores, 8 hyper-threads; 4.3 of 8.6 GB free
  cpus 0-7
the cgroup allows 0.5 cpus' worth of time
huge pages: none; kernel NUMA balancing: off
plan: worker cpu0 on node 0, cpus 0
plan: coordinator's team on cpus 0
plan: cpus 1-7 stay unused
note: the cgroup allows 0.5 of a core's time: even one thread will often be held up"""
CPUSET = """\
node 0: 2 cores, 3 hyper-threads; no memory for us
  cpus 2-3,10
node 1: 1 core; 68.7 of 137.4 GB free
  cpus 4
  distances from node 0: 0: 10, 1: 21
  distances from node 1: 0: 21, 1: 10
huge pages: none; kernel NUMA balancing: off
plan: worker cpu0 on node 0, cpus 2-3
plan: worker cpu1 on node 1, cpus 4
plan: coordinator's team on cpus 2-4
plan: cpus 10 stay unused
note: node 0 has no memory for us: its workers take node 1's"""
DESKTOP = """\
node 0: 4 cores, 8 hyper-threads; 17.2 of 34.4 GB free
  cpus 0-7
caches: L1 4 x 32 KB, L2 4 x 1024 KB, L3 1 x 32768 KB
GPU 0000:01:00.0
huge pages: madvise; kernel NUMA balancing: off
plan: worker cpu0 on node 0, cpus 0-3
plan: coordinator's team on cpus 0-3
plan: cpus 4-7 stay unused"""
HYBRID = """\
node 0: 6 cores, 4 of them efficient ones, 8 hyper-threads; 4.3 of 8.6 GB free
  cpus 0-7
huge pages: none; kernel NUMA balancing: off
plan: worker cpu0 on node 0, cpus 0,2
plan: coordinator's team on cpus 0,2
plan: cpus 1,3-7 stay unused"""


def facts_of(name: str, root: Path, monkeypatch: pytest.MonkeyPatch, *, bound: bool = True) -> dict[str, Any]:
    """What `describe` says on a recorded machine where memory can be `bound` to nodes."""

    def bindable(nodes: Collection[int]) -> bool:
        return bound or not nodes

    write(MACHINES[name], root)
    monkeypatch.setattr(topology, "read_topology", lambda: read_topology(root, MACHINES[name].cpus))
    monkeypatch.setattr(topology, "read_caches", lambda: read_caches(root, MACHINES[name].cpus))
    monkeypatch.setattr(topology, "bindable", bindable)
    return describe(measure=False)


@pytest.mark.parametrize(
    ("name", "lines"),
    [
        ("four sockets", FOUR_SOCKETS),
        ("half a core", CONTAINER),
        ("cpuset", CPUSET),
        ("desktop", DESKTOP),
        ("intel hybrid", HYBRID),
    ],
)
def test_lines(name: str, lines: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "\n".join(render(facts_of(name, tmp_path, monkeypatch))) == lines


@pytest.mark.parametrize("name", MACHINES)
def test_every_machine_can_be_told_as_json(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    facts = facts_of(name, tmp_path, monkeypatch)
    assert json.loads(json.dumps(facts)) == facts
    assert list(render(facts))


def test_lines_of_limits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = [*render(facts_of("quota", tmp_path, monkeypatch))]
    assert "the cgroup allows 2.5 cpus' worth of time" in lines
    assert "the cgroup leaves 1.9 GB of memory" in lines


def test_lines_of_other_things(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "offline cpus: 2-3,5-7" in [*render(facts_of("offline", tmp_path / "a", monkeypatch))]
    assert "node 2: no cpus for us; 34.4 of 68.7 GB free" in [*render(facts_of("cxl", tmp_path / "b", monkeypatch))]
    assert "GPU 0000:81:00.0 on node 1" in [*render(facts_of("two sockets", tmp_path / "c", monkeypatch))]


def test_unbound_memory_is_noted_where_there_are_nodes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    facts = facts_of("four sockets", tmp_path / "a", monkeypatch, bound=False)
    assert facts["plan"]["notes"] == [UNBOUND]
    assert facts_of("desktop", tmp_path / "b", monkeypatch, bound=False)["plan"]["notes"] == []


def test_bandwidth_of_every_pair(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Fake:
        def __init__(self, cpus: list[int], node: int | None) -> None:
            self._value = 10.0 * len(cpus) + (node or 0)

        def measure(self) -> float:
            return self._value

    facts_of("cxl", tmp_path, monkeypatch)
    monkeypatch.setattr(topology, "Bandwidth", Fake)
    facts = describe(measure=True)
    assert [(row["from"], row["to"], row["gb_s"]) for row in facts["bandwidth"]] == [
        (node, memory, 20.0 + memory) for node in (0, 1) for memory in (0, 1, 2)
    ]
    assert "read bandwidth from node 1 to the memory of node 2: 22.0 GB/s" in [*render(facts)]
    monkeypatch.setattr(topology, "bindable", lambda _nodes: False)
    assert describe(measure=True)["bandwidth"] == []
