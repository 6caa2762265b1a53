"""Who runs where: on recorded machines, on made-up ones, and on random ones.

Run: pytest tests/shared/machine/test_core_plan.py
"""

import random
import re
from pathlib import Path

import pytest

from tests.shared.machines import GB, MACHINES, made, write
from warmfront.shared.errors import UsageError
from warmfront.shared.machine.core_plan import CorePlan, WorkerCores, plan_cores
from warmfront.shared.machine.topology import Node, Topology, read_topology

BALANCING = (
    "the kernel moves pages between NUMA nodes by itself, which slows warmfront down: "
    "echo 0 > /proc/sys/kernel/numa_balancing"
)
CROWDED = "more threads than can run at once: slower than one on each core"


def lacks(node: int, other: int) -> str:
    return f"node {node} has no memory for us: its workers take node {other}'s"


# (node, cpus, node of the memory) of each worker, and the notes.
PLANS: dict[str, tuple[list[tuple[int, tuple[int, ...], int | None]], tuple[str, ...]]] = {
    "desktop": ([(0, (0, 1, 2, 3), None)], ()),
    "intel hybrid": ([(0, (0, 2), None)], ()),
    "big.LITTLE": ([(0, (4, 5, 6, 7), None)], ()),
    "two sockets": ([(0, (0, 1, 2, 3), 0), (1, (4, 5, 6, 7), 1)], (BALANCING,)),
    "four sockets": ([(i, (2 * i, 2 * i + 1), i) for i in range(4)], ()),
    "sub-NUMA clusters": ([(i, (2 * i, 2 * i + 1), i) for i in range(8)], ()),
    "cxl": ([(0, (0, 1), 0), (1, (2, 3), 1)], ()),
    "node without memory": (
        [(0, (0, 1), 0), (1, (2, 3), 0), (2, (4, 5), 2), (3, (6, 7), 2)],
        (lacks(1, 0), lacks(3, 2)),
    ),
    "gaps": ([(0, (0,), 0), (8, (2,), 8)], ()),
    "offline": ([(0, (0, 1), None)], ()),
    "cpuset": ([(0, (2, 3), 1), (1, (4,), 1)], (lacks(0, 1),)),
    "quota": ([(0, (0, 1), None)], ()),
    "half a core": (
        [(0, (0,), None)],
        ("the cgroup allows 0.5 of a core's time: even one thread will often be held up",),
    ),
    "cgroup v1": ([(0, (0, 1, 2), None)], ()),
    "no sys": ([(0, (1, 3), None)], ()),
    "no mems": ([(0, (0, 1, 2, 3), 0), (1, (4, 5, 6, 7), 0)], (lacks(1, 0),)),
}


def machine(name: str, root: Path) -> Topology:
    write(MACHINES[name], root)
    return read_topology(root, MACHINES[name].cpus)


@pytest.mark.parametrize("name", MACHINES)
def test_default_plan(name: str, tmp_path: Path) -> None:
    workers, notes = PLANS[name]
    plan = plan_cores(machine(name, tmp_path))
    assert plan == CorePlan(tuple(WorkerCores(*worker) for worker in workers), (), (), 100, notes)
    assert plan.coordinator == plan.cpus == tuple(cpu for _, cpus, _ in workers for cpu in cpus)
    assert plan.memory_nodes == tuple(sorted({memory for *_, memory in workers if memory is not None}))


@pytest.mark.parametrize(
    ("name", "workers", "threads", "cpus"),
    [
        ("intel hybrid", None, 5, [(0, 2, 4, 5, 6)]),
        ("intel hybrid", 2, 6, [(0, 2, 4), (5, 6, 7)]),
        ("big.LITTLE", None, 6, [(4, 5, 6, 7, 0, 1)]),
        ("four sockets", None, 5, [(0, 1), (2,), (4,), (6,)]),
        ("four sockets", 1, 3, [(0, 1, 2)]),
        ("sub-NUMA clusters", 2, 4, [(0, 1), (2, 3)]),
        ("cpuset", 3, None, [(2,), (3,), (4,)]),
        ("quota", 2, 2, [(0,), (2,)]),
    ],
)
def test_wishes(
    name: str, workers: int | None, threads: int | None, cpus: list[tuple[int, ...]], tmp_path: Path
) -> None:
    plan = plan_cores(machine(name, tmp_path), workers=workers, threads=threads)
    assert [worker.cpus for worker in plan.workers] == cpus
    assert plan.spins == 100


@pytest.mark.parametrize(
    ("cores", "workers", "threads", "expected"),
    [
        ((2, 3), None, None, [(0, 2), (1, 3)]),
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
def test_counts(
    cores: tuple[int, ...], workers: int | None, threads: int | None, expected: list[tuple[int | None, int]]
) -> None:
    plan = plan_cores(made(*cores), workers=workers, threads=threads)
    assert [(worker.node, len(worker.cpus)) for worker in plan.workers] == expected


@pytest.mark.parametrize(
    ("topology", "workers", "threads", "cpus", "crowded"),
    [
        (made(2), None, 2, [(0, 1)], False),
        (made(2), None, 3, [(0, 1, 50)], True),
        (made(2), None, 5, [(0, 1, 50, 51, 0)], True),
        (made(2, hyper=False), None, 3, [(0, 1, 0)], True),
        (made(2, hyper=False), 3, None, [(0,), (1,), (0,)], True),
        (made(2), 2, 4, [(0, 1), (50, 51)], True),
        (made(4), 2, 5, [(0, 1), (2, 3, 50)], True),
        (made(1, 3), None, 4, [(0,), (100, 101, 102)], False),  # what fits is not shared
        (made(1, 3), None, 6, [(0, 50), (100, 101, 102, 150)], True),
        (made(1, 3, hyper=False), None, 5, [(0, 0), (100, 101, 102)], True),
        (made(2, 2), 1, 5, [(0, 1, 100, 101, 50)], True),
        (made(2, 2, 2), 2, 5, [(0, 1, 50), (100, 101)], True),
        (made(2, 2), 2, 3, [(0, 1), (100,)], False),
    ],
)
def test_forced(
    topology: Topology, workers: int | None, threads: int | None, cpus: list[tuple[int, ...]], crowded: bool
) -> None:
    """Hyper-threads come first, then cores are shared; neither without need."""
    plan = plan_cores(topology, workers=workers, threads=threads, force=True)
    assert [worker.cpus for worker in plan.workers] == cpus
    assert plan.spins == (0 if crowded else 100)
    assert plan.notes == ((CROWDED,) if crowded else ())
    assert plan_cores(topology, workers=workers, threads=threads, spins=7, force=True).spins == 7


def test_forced_past_the_quota(tmp_path: Path) -> None:
    plan = plan_cores(machine("quota", tmp_path), threads=4, force=True)
    assert (plan.cpus, plan.spins, plan.notes) == ((0, 1, 2, 3), 0, (CROWDED,))


@pytest.mark.parametrize(
    ("cores", "workers", "team", "expected"),
    [
        ((3,), None, 2, (0, 1)),
        ((2, 2), None, 2, (0, 100)),
        ((3, 1), None, 3, (0, 100, 1)),
        ((4, 4), 4, 2, (0, 100)),
        ((4, 4), 4, 3, (0, 100, 1)),
        ((2, 2), 1, 3, (0, 100, 1)),
        ((1, 1, 1), None, 3, (0, 100, 200)),
    ],
)
def test_the_coordinator_takes_cpus_of_all_nodes_in_turns(
    cores: tuple[int, ...], workers: int | None, team: int, expected: tuple[int, ...]
) -> None:
    plan = plan_cores(made(*cores), workers=workers, coordinator_threads=team)
    assert plan.coordinator == expected
    assert plan.with_emulated_gpu().coordinator == expected


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


def test_memory_of_a_cpu() -> None:
    plan = plan_cores(made(2, 2))
    assert [plan.memory_of(cpu) for cpu in (1, 100, 7)] == [0, 1, None]
    assert plan_cores(made(2, 2), workers=1).memory_nodes == (), "one worker over both: first touch decides"


@pytest.mark.parametrize(
    ("cores", "wishes", "message"),
    [
        ((2,), {"threads": 8}, "asked for 8 threads, but this process may use 2 cores: pass --threads 2 or fewer"),
        ((1,), {"threads": 2}, "asked for 2 threads, but this process may use 1 core: pass --threads 1 or fewer"),
        ((2,), {"threads": 0}, "asked for 0 threads: pass --threads 1 or more"),
        ((2,), {"threads": -3, "force": True}, "asked for -3 threads: pass --threads 1 or more"),
        ((2,), {"workers": -1}, "asked for -1 workers: pass --workers 1 or more"),
        (
            (2,),
            {"coordinator_threads": 0},
            "asked for 0 threads of the coordinator: pass --coordinator-threads 1 or more",
        ),
        ((2,), {"workers": 3}, "asked for 3 workers of 2 threads in all: pass --workers 2 or fewer"),
        ((1,), {"workers": 2}, "asked for 2 workers of 1 thread in all: pass --workers 1 or fewer"),
        ((2, 2), {"workers": 3, "threads": 2}, "asked for 3 workers of 2 threads in all: pass --workers 2 or fewer"),
        (
            (2, 2),
            {"workers": 3, "threads": 2, "force": True},
            "asked for 3 workers of 2 threads in all: pass --workers 2 or fewer",
        ),
        (
            (2, 2, 2),
            {"workers": 2, "threads": 5},
            "asked for 5 threads of 2 workers, but each stays on one NUMA node and together these have 4 cores: "
            "pass --threads 4 or fewer, or --workers 3",
        ),
        (
            (2, 2, 2),
            {"workers": 2, "threads": 7},
            "asked for 7 threads, but this process may use 6 cores: pass --threads 4 or fewer",
        ),
        (
            (2, 1),
            {"coordinator_threads": 4},
            "asked for 4 threads of the coordinator, but the workers have 3 cpus: "
            "pass --coordinator-threads 3 or fewer",
        ),
    ],
)
def test_refuses(cores: tuple[int, ...], wishes: dict[str, int], message: str) -> None:
    with pytest.raises(UsageError) as caught:
        plan_cores(made(*cores), **wishes)
    assert str(caught.value) == message


def test_the_quota_refuses(tmp_path: Path) -> None:
    with pytest.raises(UsageError) as caught:
        plan_cores(machine("quota", tmp_path), threads=3)
    assert str(caught.value) == (
        "asked for 3 threads, but this process may use 2.5 cpus' worth of time (the cgroup's quota): "
        "pass --threads 2 or fewer"
    )


def random_machine(rng: random.Random) -> Topology:
    """Nodes with gaps in their ids, some without memory, some with memory only; hyper-threads; slow cores; a quota."""
    nodes, cpu = [], 0
    ids = sorted(rng.sample(range(40), rng.randint(1, 6)))
    for id_ in ids:
        cores = []
        for _ in range(rng.choice([0, 1, 2, 3, 5]) if nodes else rng.randint(1, 5)):
            width = rng.choice([1, 2, 2])
            cores.append(tuple(range(cpu, cpu + width)))
            cpu += width + rng.randint(0, 2)
        size = rng.choice([0, GB, GB])
        nodes.append(Node(id_, tuple(cores), size, size // 2, {other: rng.choice([12, 21, 32]) for other in ids}))
    cores = [core for node in nodes for core in node.cores]
    slow = {cpu for core in rng.sample(cores, rng.randint(0, len(cores) - 1)) for cpu in core}
    efficient = frozenset(slow if rng.random() < 0.3 else ())
    ranked = [
        Node(n.id, tuple(sorted(n.cores, key=lambda c: c[0] in efficient)), n.total_bytes, 0, n.distances)
        for n in nodes
    ]
    return Topology(
        nodes=tuple(node for node in ranked if node.cores),
        memory_nodes=tuple(node for node in ranked if not node.cores and node.total_bytes),
        efficient=efficient,
        quota=rng.choice([None, None, rng.uniform(0.2, len(cores) + 2)]),
    )


def random_wishes(rng: random.Random) -> dict[str, int | bool | None]:
    return {
        "workers": rng.choice([None, rng.randint(1, 9)]),
        "threads": rng.choice([None, rng.randint(1, 24)]),
        "coordinator_threads": rng.choice([None, None, rng.randint(1, 8)]),
        "force": rng.random() < 0.3,
    }


OPTIONS = {"--threads": "threads", "--workers": "workers", "--coordinator-threads": "coordinator_threads"}


def attempt(topology: Topology, wishes: dict[str, int | bool | None]) -> CorePlan | tuple[str, int]:
    """The plan, or what the refusal says to pass."""
    try:
        return plan_cores(topology, **wishes)  # type: ignore[arg-type]
    except UsageError as error:
        ((option, count),) = re.findall(r"pass (--[\w-]+) (\d+) or fewer", str(error))
        return OPTIONS[option], int(count)


def test_any_plan_is_sound() -> None:
    rng, made_at_once = random.Random(1), 0
    for _ in range(6000):
        topology, wishes = random_machine(rng), random_wishes(rng)
        refused = set()
        while not isinstance(plan := attempt(topology, wishes), CorePlan):
            wish, count = plan
            assert wish not in refused, f"{wishes}: this count was said to work, for {topology}"
            refused.add(wish)
            assert 0 < count < (wishes[wish] or 0)
            wishes[wish] = count
        made_at_once += not refused
        check(plan, topology, wishes)
    assert made_at_once > 2000


def check(plan: CorePlan, topology: Topology, wishes: dict[str, int | bool | None]) -> None:
    nodes = {cpu: node.id for node in topology.nodes for core in node.cores for cpu in core}
    cores = {cpu: core for node in topology.nodes for core in node.cores for cpu in core}
    every = plan.cpus
    assert set(every) <= set(nodes), "no cpu outside the mask"
    assert all(worker.cpus for worker in plan.workers)
    assert wishes["workers"] in (None, len(plan.workers))
    assert wishes["threads"] in (None, len(every))
    shared = len({cores[cpu] for cpu in every}) < len(every)
    late = topology.quota is not None and len(every) > max(1, int(topology.quota))
    assert wishes["force"] or not (shared or late)
    assert (plan.spins == 0) == (CROWDED in plan.notes) == (shared or late)
    for worker in plan.workers:
        at = {nodes[cpu] for cpu in worker.cpus}
        assert at == {worker.node} if worker.node is not None else len(plan.workers) == 1 <= len(at)
        if worker.memory is not None:
            assert any(n.id == worker.memory and n.total_bytes for n in (*topology.nodes, *topology.memory_nodes))
    team = plan.coordinator
    assert wishes["coordinator_threads"] in (None, len(team))
    assert set(team) <= set(every)
    if not shared:
        assert len(set(team)) == len(team)
    reached = {nodes[cpu] for cpu in team}
    assert len(reached) == min(len(team), len({nodes[cpu] for cpu in every})), "all nodes in turns"
