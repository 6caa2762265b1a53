"""The core plan: which cpus run the workers' threads and the coordinator's, and which node's memory they take.

A pure function of the machine (`topology.py`) and of what the user asked for. One thread per physical core;
hyper-threads and the slower cores of a hybrid processor stay unused unless asked for; no more threads than cores, or
than the cgroup's quota gives time for, unless forced.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import chain, cycle, islice, zip_longest
from typing import NamedTuple

from warmfront.shared.errors import UsageError
from warmfront.shared.machine.topology import Node, Topology

__all__ = ["CorePlan", "WorkerCores", "plan_cores"]

# Rounds that a thread spins at a barrier, where every thread has its own core and the others come soon: about 2 us on
# the machine they were chosen on, other processors' rounds are shorter or longer, so `warmfront tune` races several.
# Where threads share cores it is 0: a thread that spins keeps those it waits for from running.
_SPINS = 100


class WorkerCores(NamedTuple):
    """Where one worker runs."""

    node: int | None  # None if its threads span several nodes
    cpus: tuple[int, ...]  # one per thread
    memory: int | None = None  # the node whose memory it takes; None if there is only one, or its threads span several


@dataclass(frozen=True, slots=True)
class CorePlan:
    """Cpus of each worker, and of the coordinator's threads on the same ones: attention and feed-forward alternate."""

    workers: tuple[WorkerCores, ...]
    gpu: tuple[int, ...] = ()  # of an emulated GPU; empty without one, or where every worker has only one cpu
    team: tuple[int, ...] = ()  # of the coordinator's threads, where they are fewer than all cpus
    spins: int = _SPINS  # rounds of spinning at a barrier
    notes: tuple[str, ...] = ()  # for the user

    @property
    def cpus(self) -> tuple[int, ...]:
        """Every cpu of every worker, in worker order, then an emulated GPU's."""
        return (*chain.from_iterable(worker.cpus for worker in self.workers), *self.gpu)

    @property
    def coordinator(self) -> tuple[int, ...]:
        """The cpus of the coordinator's threads."""
        return self.team or self.cpus

    @property
    def memory_nodes(self) -> tuple[int, ...]:
        """The nodes to which the workers' memory is bound."""
        return tuple(sorted({worker.memory for worker in self.workers if worker.memory is not None}))

    def memory_of(self, cpu: int) -> int | None:
        """The node whose memory the worker on `cpu` takes; None if it does not matter."""
        return next((worker.memory for worker in self.workers if cpu in worker.cpus), None)

    def with_emulated_gpu(self) -> "CorePlan":
        """The same plan with the last cpu of the largest worker given to an emulated GPU, if it has more than one."""
        workers = list(self.workers)
        index = max(range(len(workers)), key=lambda i: (len(workers[i].cpus), i))
        worker = workers[index]
        if len(worker.cpus) < 2:
            return self
        workers[index] = worker._replace(cpus=worker.cpus[:-1])
        return replace(self, workers=tuple(workers), gpu=worker.cpus[-1:])


def plan_cores(
    topology: Topology,
    *,
    workers: int | None = None,
    threads: int | None = None,
    coordinator_threads: int | None = None,
    spins: int | None = None,
    force: bool = False,
) -> CorePlan:
    """Give each worker its cores: `threads` in all, one per physical core, none shared between workers.

    By default one worker per node and a thread on every core. A worker stays on one node, unless it is the only one
    and its threads exceed the first node. The coordinator's threads are dealt to the nodes in turns. `force`: more
    threads than cores are meant, and share them. Raises UsageError, naming the largest count that fits.
    """
    for count, name, option in (
        (threads, "threads", "--threads"),
        (workers, "workers", "--workers"),
        (coordinator_threads, "threads of the coordinator", "--coordinator-threads"),
    ):
        if count is not None and count < 1:
            raise UsageError(f"asked for {count} {name}: pass {option} 1 or more")
    limit, default = _limits(topology)
    total = threads or (max(default, workers or 0) if force else default)
    nodes = _nodes(topology, total)
    if threads is not None and not force:
        _check_threads(topology, nodes, threads, limit, workers)
    workers = workers or min(len(nodes), total)
    if workers > total:
        raise UsageError(
            f"asked for {workers} workers of {_count(total, 'thread')} in all: pass --workers {total} or fewer"
        )

    places = _places(nodes, workers, total, force)
    room = [len(place.cpus) for place in places]
    counts = _deal(min(total, sum(room)), room)
    several = len(topology.nodes) + len(topology.memory_nodes) > 1
    planned = [
        WorkerCores(node, cpus[:count], _memory(topology, node) if several else None)
        for (node, cpus, _), count in zip(places, counts, strict=True)
    ]
    cpus = [cpu for worker in planned for cpu in worker.cpus]
    if coordinator_threads is not None and coordinator_threads > len(cpus):
        raise UsageError(
            f"asked for {coordinator_threads} threads of the coordinator, but the workers have "
            f"{_count(len(cpus), 'cpu')}: pass --coordinator-threads {len(cpus)} or fewer"
        )
    used_cores = {core for node in topology.nodes for core in node.cores if not {*core}.isdisjoint(cpus)}
    crowded = len(cpus) > min(len(used_cores), limit)
    if spins is None:
        spins = 0 if crowded else _SPINS
    team = _team(topology, cpus, coordinator_threads)
    return CorePlan(tuple(planned), (), team, spins, _notes(topology, planned, crowded))


def _limits(topology: Topology) -> tuple[int, int]:
    """Threads that may be asked for; threads by default, without a hybrid processor's slow cores."""
    cores = [core for node in topology.nodes for core in node.cores]
    fast = sum(core[0] not in topology.efficient for core in cores)
    limit = len(cores) if topology.quota is None else max(1, min(len(cores), int(topology.quota)))
    return limit, min(limit, fast)


def _nodes(topology: Topology, threads: int) -> tuple[Node, ...]:
    """The nodes to use: those with fast cores, unless more threads are wanted than these have."""
    fast = tuple(node for node in topology.nodes if node.cores[0][0] not in topology.efficient)
    slow = tuple(node for node in topology.nodes if node not in fast)
    return fast if threads <= sum(len(node.cores) for node in fast) else fast + slow


def _check_threads(topology: Topology, nodes: Sequence[Node], threads: int, limit: int, workers: int | None) -> None:
    """Refuse more threads than there are cores, time for them, or cores on the workers' nodes."""
    cores = sum(len(node.cores) for node in topology.nodes)
    fits = limit
    if workers is not None and 1 < workers < len(nodes):
        fits = min(limit, sum(len(node.cores) for node in nodes[:workers]))
    if threads > limit:
        time = f"{topology.quota or 0:g} cpus' worth of time (the cgroup's quota)"
        what = time if limit < cores else _count(cores, "core")
        raise UsageError(
            f"asked for {threads} threads, but this process may use {what}: pass --threads {fits} or fewer"
        )
    if threads > fits:
        raise UsageError(
            f"asked for {threads} threads of {workers} workers, but each stays on one NUMA node and together these "
            f"have {fits} cores: pass --threads {fits} or fewer, or --workers {len(nodes)}"
        )


def _count(count: int, what: str) -> str:
    return f"{count} {what}" if count == 1 else f"{count} {what}s"


def _memory(topology: Topology, node: int | None) -> int | None:
    memory = topology.memory_of(node) if node is not None else None
    return memory.id if memory is not None else None


def _team(topology: Topology, cpus: Sequence[int], count: int | None) -> tuple[int, ...]:
    """`count` of the workers' cpus, one of every node in turns so that all nodes' memory is read; None = all."""
    if count is None:
        return ()
    nodes = ({cpu for core in node.cores for cpu in core} for node in topology.nodes)
    turns = zip_longest(*([cpu for cpu in cpus if cpu in node] for node in nodes))
    return tuple([cpu for cpu in chain.from_iterable(turns) if cpu is not None][:count])


def _notes(topology: Topology, workers: Sequence[WorkerCores], crowded: bool) -> tuple[str, ...]:
    notes = []
    if topology.quota is not None and topology.quota < 1:
        notes.append(f"the cgroup allows {topology.quota:g} of a core's time: even one thread will often be held up")
    if crowded:
        notes.append("more threads than can run at once: slower than one on each core")
    if topology.balancing and len(topology.nodes) > 1:
        notes.append(
            "the kernel moves pages between NUMA nodes by itself, which slows warmfront down: "
            "echo 0 > /proc/sys/kernel/numa_balancing"
        )
    for worker in workers:
        if worker.memory is not None and worker.memory != worker.node:
            notes.append(f"node {worker.node} has no memory for us: its workers take node {worker.memory}'s")
    return tuple(dict.fromkeys(notes))


def _places(nodes: Sequence[Node], workers: int, threads: int, force: bool) -> list[WorkerCores]:
    """The cpus that each worker may be given, one per core; forced, as many as it takes."""
    if workers == 1 and threads > len(nodes[0].cores) and len(nodes) > 1:
        together = tuple(core for node in nodes for core in node.cores)
        return [WorkerCores(None, tuple(_choose_cpus(together, max(threads if force else 0, len(together)))))]
    used = nodes[:workers]
    room = [len(node.cores) for node in used]
    if force and threads > sum(room):
        cpu_counts = [sum(map(len, node.cores)) for node in used]
        rounds = -(-threads // sum(cpu_counts))
        room = _deal(threads, [rounds * count for count in cpu_counts])
    places = []
    for node, count, parts in zip(used, room, _deal(workers, room), strict=True):
        cpus = _choose_cpus(node.cores, count)
        bounds = [len(cpus) * part // parts for part in range(parts + 1)]
        places += [WorkerCores(node.id, tuple(cpus[bounds[i] : bounds[i + 1]])) for i in range(parts)]
    return places


def _choose_cpus(cores: Sequence[tuple[int, ...]], count: int) -> list[int]:
    """`count` cpus: one of each core first, then their hyper-threads too, and then all again."""
    return list(islice(cycle(cpu for rank in zip_longest(*cores) for cpu in rank if cpu is not None), count))


def _deal(count: int, room: Sequence[int]) -> list[int]:
    """Deal `count` in turns, skipping those that are full: each gets one before any gets two."""
    dealt = [0] * len(room)
    while count:
        for i, limit in enumerate(room):
            if count and dealt[i] < limit:
                dealt[i] += 1
                count -= 1
    return dealt
