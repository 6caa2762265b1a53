"""The core plan: which cpus run the workers' threads and the coordinator's, and whose memory they take.

A pure function of the machine (`topology.py`) and of wishes. One thread per physical core, hyper-threads and the slower
cores of a hybrid processor unused unless asked for; no more threads than cores, or than the cgroup's quota gives time
for, unless forced.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain, cycle, islice, zip_longest
from typing import NamedTuple

from warmfront.shared.errors import UsageError
from warmfront.shared.topology import Node, Topology

__all__ = ["CorePlan", "WorkerCores", "plan_cores"]

# Rounds that a thread spins at a barrier, about 2 us, where every thread has a core of its own: the others come soon.
# A thread that shares its core keeps those it waits for from coming.
_SPINS = 100


class WorkerCores(NamedTuple):
    """Where one worker runs: `node` is None if its threads span several nodes; `cpus` has one cpu per thread.

    `memory`: the node whose memory it takes, None if the machine has but one or its threads span several.
    """

    node: int | None
    cpus: tuple[int, ...]
    memory: int | None = None


@dataclass(frozen=True, slots=True)
class CorePlan:
    """Cpus of each worker and of the coordinator's team, which shares them: attention and feed-forward alternate.

    `gpu`: where an emulated GPU runs; empty without one, or where every worker has but one cpu. `team`: threads of the
    coordinator's, None = one on every cpu. `spins`: rounds of spinning at a barrier. `notes`: for the user.
    """

    workers: tuple[WorkerCores, ...]
    gpu: tuple[int, ...] = ()
    team: int | None = None
    spins: int = _SPINS
    notes: tuple[str, ...] = ()

    @property
    def cpus(self) -> tuple[int, ...]:
        """Every cpu of every worker, in worker order, then an emulated GPU's."""
        return (*chain.from_iterable(worker.cpus for worker in self.workers), *self.gpu)

    @property
    def coordinator(self) -> tuple[int, ...]:
        """The team's cpus: all, or as many as wished of every worker in turns, so that all nodes' memory is read."""
        if self.team is None:
            return self.cpus
        turns = zip_longest(*(worker.cpus for worker in self.workers), self.gpu)
        return tuple([cpu for cpu in chain.from_iterable(turns) if cpu is not None][: self.team])

    def memory_of(self, cpu: int) -> int | None:
        """The node whose memory the worker on `cpu` takes; None if it does not matter."""
        return next((worker.memory for worker in self.workers if cpu in worker.cpus), None)

    def with_emulated_gpu(self) -> "CorePlan":
        """The same threads, of which the last that a worker can spare is an emulated GPU's."""
        workers = list(self.workers)
        index = max(range(len(workers)), key=lambda i: (len(workers[i].cpus), i))
        worker = workers[index]
        if len(worker.cpus) < 2:
            return self
        workers[index] = worker._replace(cpus=worker.cpus[:-1])
        return CorePlan(tuple(workers), worker.cpus[-1:], self.team, self.spins, self.notes)


def plan_cores(
    topology: Topology,
    workers: int | None = None,
    threads: int | None = None,
    team: int | None = None,
    spins: int | None = None,
    force: bool = False,
) -> CorePlan:
    """Give each worker its cores: `threads` in all, one per physical core, none shared between workers.

    By default one worker per node and a thread on every core. A worker stays on one node, unless it is the only one
    and its threads exceed the first node. `team`: threads of the coordinator; `force`: more threads than cores are
    wanted, and share them. Raises UsageError, naming the largest count that fits.
    """
    for count, name, option in (
        (threads, "threads", "--threads"),
        (workers, "workers", "--workers"),
        (team, "threads of the coordinator", "--coordinator-threads"),
    ):
        if count is not None and count < 1:
            raise UsageError(f"asked for {count} {name}: pass {option} 1 or more")
    cores, limit, usual = _counts(topology)
    if threads is not None and threads > limit and not force:
        what = f"{cores} cores" if limit == cores else f"{limit} cpus' worth of time (the cgroup's quota)"
        raise UsageError(
            f"asked for {threads} threads, but this process may use {what}: pass --threads {limit} or fewer"
        )
    most = threads or (max(usual, workers or 0) if force else usual)
    nodes = _nodes(topology, most)
    workers = workers or min(len(nodes), most)
    if workers > most:
        raise UsageError(f"asked for {workers} workers of {most} threads in all: pass --workers {most} or fewer")

    places = _places(nodes, workers, most, force)
    room = [len(place.cpus) for place in places]
    if threads is not None and threads > sum(room):
        raise UsageError(
            f"asked for {threads} threads of {workers} workers, but each stays on one NUMA node and together these "
            f"have {sum(room)} cores: pass --threads {sum(room)} or fewer, or --workers {len(nodes)}"
        )
    counts = _deal(min(most, sum(room)), room)
    several = len(topology.nodes) + len(topology.memory_nodes) > 1
    planned = [
        WorkerCores(node, cpus[:count], _memory(topology, node) if several else None)
        for (node, cpus, _), count in zip(places, counts, strict=True)
    ]
    every = [cpu for worker in planned for cpu in worker.cpus]
    if team is not None and team > len(every):
        raise UsageError(
            f"asked for {team} threads of the coordinator, but the workers have {len(every)} cpus: "
            f"pass --coordinator-threads {len(every)} or fewer"
        )
    crowded = len(every) > limit
    if spins is None:
        spins = 0 if crowded else _SPINS
    return CorePlan(tuple(planned), (), team, spins, tuple(_notes(topology, planned, crowded)))


def _counts(topology: Topology) -> tuple[int, int, int]:
    """Physical cores; threads that may be asked for; threads by default, without a hybrid processor's slow cores."""
    cores = [core for node in topology.nodes for core in node.cores]
    fast = sum(core[0] not in topology.efficient for core in cores)
    limit = len(cores) if topology.quota is None else max(1, min(len(cores), int(topology.quota)))
    return len(cores), limit, min(limit, fast)


def _nodes(topology: Topology, threads: int) -> tuple[Node, ...]:
    """The nodes to use: those with fast cores, unless more threads are wanted than these have."""
    fast = tuple(node for node in topology.nodes if node.cores[0][0] not in topology.efficient)
    return fast if threads <= sum(len(node.cores) for node in fast) else topology.nodes


def _memory(topology: Topology, node: int | None) -> int | None:
    memory = topology.memory_of(node) if node is not None else None
    return memory.id if memory is not None else None


def _notes(topology: Topology, workers: Sequence[WorkerCores], crowded: bool) -> list[str]:
    notes = []
    if topology.quota is not None and topology.quota < 1:
        notes.append(f"the cgroup allows {topology.quota:g} of a core's time: one thread, which will often be held up")
    if crowded:
        notes.append("more threads than cores: slower than a thread per core")
    if topology.balancing and len(topology.nodes) > 1:
        notes.append(
            "the kernel moves pages between NUMA nodes by itself, which slows warmfront down: "
            "echo 0 > /proc/sys/kernel/numa_balancing"
        )
    for worker in workers:
        if worker.memory is not None and worker.memory != worker.node:
            notes.append(f"node {worker.node} has no memory for us: its worker takes node {worker.memory}'s")
    return notes


def _places(nodes: Sequence[Node], workers: int, threads: int, force: bool) -> list[WorkerCores]:
    """The cpus that each worker may be given, one per core; forced, as many as it takes."""
    if workers == 1 and threads > len(nodes[0].cores) and len(nodes) > 1:
        together = tuple(core for node in nodes for core in node.cores)
        return [WorkerCores(None, tuple(_seats(together, threads if force else 0)))]
    used = nodes[:workers]
    seats = [_seats(node.cores, -(-threads // len(used)) if force else 0) for node in used]
    places = []
    for node, cpus, parts in zip(used, seats, _deal(workers, [len(each) for each in seats]), strict=True):
        bounds = [len(cpus) * part // parts for part in range(parts + 1)]
        places += [WorkerCores(node.id, tuple(cpus[bounds[i] : bounds[i + 1]])) for i in range(parts)]
    return places


def _seats(cores: Sequence[tuple[int, ...]], count: int) -> list[int]:
    """A cpu of each core; if that is less than `count`, their hyper-threads too, and then all again."""
    every = [cpu for rank in zip_longest(*cores) for cpu in rank if cpu is not None]
    return list(islice(cycle(every), max(count, len(cores))))


def _deal(count: int, room: Sequence[int]) -> list[int]:
    """Deal `count` in turns, skipping who is full: each gets one before any gets two."""
    dealt = [0] * len(room)
    while count:
        for i, limit in enumerate(room):
            if count and dealt[i] < limit:
                dealt[i] += 1
                count -= 1
    return dealt
