"""Which cores and memory this process may use, NUMA node by NUMA node, and who runs where.

Covers: reading /sys and the affinity mask (node ids need not be 0..n-1; cpusets and `taskset` hide cpus and whole
nodes), and the core plan. Does not cover: cgroup CPU quotas, pages (`memory.py`), pinning (`process.py`).

A thread of ours saturates a physical core, so hyper-threads are grouped and one cpu of each group is used.
"""

import os
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from warmfront.shared.errors import UsageError

__all__ = ["CorePlan", "Node", "Topology", "WorkerCores", "parse_cpu_list", "plan_cores", "read_topology"]


@dataclass(frozen=True, slots=True)
class Node:
    """A NUMA node with at least one allowed cpu. `cores`: the allowed cpus of each physical core; memory in bytes."""

    id: int
    cores: tuple[tuple[int, ...], ...]
    total_bytes: int
    available_bytes: int


@dataclass(frozen=True, slots=True)
class Topology:
    """The nodes on which this process may compute, by rising id; nodes that only hold memory are left out."""

    nodes: tuple[Node, ...]


class WorkerCores(NamedTuple):
    """Where one worker runs: `node` is None if its threads span several nodes; `cpus` has one cpu per thread."""

    node: int | None
    cpus: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class CorePlan:
    """Cpus of each worker and of the coordinator's team, which shares them: attention and feed-forward alternate.

    `gpu`: where an emulated GPU runs; empty without one, or where every worker has but one cpu.
    """

    workers: tuple[WorkerCores, ...]
    gpu: tuple[int, ...] = ()

    @property
    def coordinator(self) -> tuple[int, ...]:
        """Every cpu of every worker, in worker order."""
        return (*(cpu for worker in self.workers for cpu in worker.cpus), *self.gpu)

    def with_emulated_gpu(self) -> "CorePlan":
        """The same threads, of which the last that a worker can spare is an emulated GPU's."""
        workers = list(self.workers)
        index = max(range(len(workers)), key=lambda i: (len(workers[i].cpus), i))
        node, cpus = workers[index]
        if len(cpus) < 2:
            return self
        workers[index] = WorkerCores(node, cpus[:-1])
        return CorePlan(tuple(workers), cpus[-1:])


def parse_cpu_list(text: str) -> tuple[int, ...]:
    """Read the kernel's list format: "0-2,8" is (0, 1, 2, 8). Raises ValueError if it is not one."""
    cpus: list[int] = []
    for part in filter(None, text.strip().split(",")):
        first, dash, last = part.partition("-")
        cpus += range(int(first), int(last if dash else first) + 1)
    return tuple(cpus)


def read_topology(root: Path = Path("/"), allowed: Collection[int] | None = None) -> Topology:
    """Read the machine below `root`; `allowed` cpus default to this process's affinity mask."""
    mask = os.sched_getaffinity(0) if allowed is None else set(allowed)
    system = root / "sys/devices/system"
    folders = list(system.glob("node/node[0-9]*"))
    nodes = []
    for folder in folders:
        cores = _cores(system, mask.intersection(parse_cpu_list((folder / "cpulist").read_text())))
        # A node's own file counts only pages that the kernel has initialised (7 of 24 GB seen, deferred_init=lazy).
        meminfo = folder / "meminfo" if len(folders) > 1 else root / "proc/meminfo"
        if cores:
            nodes.append(Node(int(folder.name.removeprefix("node")), cores, *_memory(meminfo)))
    if not nodes:  # a container that hides the nodes
        nodes = [Node(0, _cores(system, mask), *_memory(root / "proc/meminfo"))]
    return Topology(tuple(sorted(nodes, key=lambda node: node.id)))


def _cores(system: Path, cpus: set[int]) -> tuple[tuple[int, ...], ...]:
    cores = set()
    for cpu in cpus:
        siblings = system / f"cpu/cpu{cpu}/topology/thread_siblings_list"
        shared = parse_cpu_list(siblings.read_text()) if siblings.exists() else (cpu,)
        cores.add(tuple(sorted(cpus.intersection(shared))))
    return tuple(sorted(cores))


def _memory(meminfo: Path) -> tuple[int, int]:
    """(total, available) bytes. A node's file lacks MemAvailable: what is free or a droppable file page stands in."""
    sizes = {}
    for line in meminfo.read_text().splitlines():
        name, _, value = line.partition(":")
        sizes[name.split()[-1]] = int(value.split()[0]) * 1024
    file_pages = sizes["Active(file)"] + sizes["Inactive(file)"]
    return sizes["MemTotal"], sizes.get("MemAvailable", sizes["MemFree"] + file_pages)


def plan_cores(topology: Topology, workers: int | None = None, threads: int | None = None) -> CorePlan:
    """Give each worker its cores: `threads` in all, one per physical core, none shared between workers.

    By default one worker per node and a thread on every core. A worker stays on one node, unless it is the only one
    and its threads exceed the first node. Raises UsageError, naming the largest count that fits.
    """
    nodes = topology.nodes
    cores = sum(len(node.cores) for node in nodes)
    if threads is not None and threads < 1:
        raise UsageError(f"asked for {threads} threads: pass --threads 1 or more")
    if workers is not None and workers < 1:
        raise UsageError(f"asked for {workers} workers: pass --workers 1 or more")
    if threads is not None and threads > cores:
        raise UsageError(
            f"asked for {threads} threads, but this process may use {cores} cores: pass --threads {cores} or fewer"
        )
    most = threads or cores
    if workers is None:
        workers = min(len(nodes), most)
    if workers > most:
        raise UsageError(f"asked for {workers} workers of {most} threads in all: pass --workers {most} or fewer")

    places = _places(nodes, workers, most)
    room = [len(place.cpus) for place in places]
    if threads is None:
        threads = sum(room)
    elif threads > sum(room):
        raise UsageError(
            f"asked for {threads} threads of {workers} workers, but each stays on one NUMA node and together these "
            f"have {sum(room)} cores: pass --threads {sum(room)} or fewer, or --workers {len(nodes)}"
        )
    counts = _deal(threads, room)
    return CorePlan(tuple(WorkerCores(node, cpus[:count]) for (node, cpus), count in zip(places, counts, strict=True)))


def _places(nodes: Sequence[Node], workers: int, threads: int) -> list[WorkerCores]:
    """The cpus that each worker may be given, one per core."""
    if workers == 1 and threads > len(nodes[0].cores):
        return [WorkerCores(None, tuple(core[0] for node in nodes for core in node.cores))]
    used = nodes[:workers]
    places = []
    for node, parts in zip(used, _deal(workers, [len(node.cores) for node in used]), strict=True):
        cpus = [core[0] for core in node.cores]
        bounds = [len(cpus) * part // parts for part in range(parts + 1)]
        places += [WorkerCores(node.id, tuple(cpus[bounds[i] : bounds[i + 1]])) for i in range(parts)]
    return places


def _deal(count: int, room: Sequence[int]) -> list[int]:
    """Deal `count` in turns, skipping who is full: each gets one before any gets two."""
    dealt = [0] * len(room)
    while count:
        for i, limit in enumerate(room):
            if count and dealt[i] < limit:
                dealt[i] += 1
                count -= 1
    return dealt
