"""`warmfront topology`: what the machine has, what of it this process may use, and what would run where."""

from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

from warmfront.coordinator.hardware.bandwidth import Bandwidth
from warmfront.shared.machine.core_plan import plan_cores
from warmfront.shared.machine.numa import UNBOUND, bindable
from warmfront.shared.machine.topology import Node, Topology, read_caches, read_topology

__all__ = ["describe", "render"]

_ROUNDS = 3


def describe(measure: bool) -> dict[str, Any]:
    """The machine as an object; sizes in bytes. `measure`: also GB/s from the cpus of each node to the memory of each.

    Nothing is measured where memory cannot be bound to one of several nodes.
    """
    topology = read_topology()
    plan = plan_cores(topology)
    bound = bindable(plan.memory_nodes)
    return {
        "nodes": [_node(node, topology) for node in topology.nodes],
        "memory_nodes": [_node(node, topology) for node in topology.memory_nodes],
        "offline": list(topology.offline),
        "quota": topology.quota,
        "memory_limit": topology.memory_limit,
        "available_bytes": topology.available_bytes,
        "numa_balancing": topology.balancing,
        "huge_pages": topology.huge_pages,
        "caches": [asdict(cache) for cache in read_caches()],
        "gpus": [{"address": address, "node": node} for address, node in topology.gpus],
        "bandwidth": _bandwidth(topology) if measure and bound else [],
        "plan": {
            "workers": [{**worker._asdict(), "cpus": list(worker.cpus)} for worker in plan.workers],
            "coordinator": list(plan.coordinator),
            "unused": sorted({cpu for node in topology.nodes for core in node.cores for cpu in core} - {*plan.cpus}),
            "spins": plan.spins,
            "notes": [*plan.notes, *([] if bound else [UNBOUND])],
        },
    }


def _node(node: Node, topology: Topology) -> dict[str, Any]:
    return {
        "id": node.id,
        "cores": [list(core) for core in node.cores],
        "efficient": sum(core[0] in topology.efficient for core in node.cores),
        "total_bytes": node.total_bytes,
        "available_bytes": node.available_bytes,
        "distances": {str(other): distance for other, distance in node.distances.items()},
    }


def _bandwidth(topology: Topology) -> list[dict[str, Any]]:
    """GB/s, the best of three rounds, from the cores of each node to the memory of each."""
    memories = [node for node in (*topology.nodes, *topology.memory_nodes) if node.total_bytes]
    rows = []
    for node in topology.nodes:
        cpus = [core[0] for core in node.cores]
        for memory in memories:
            meter = Bandwidth(cpus, memory.id if len(memories) > 1 else None)
            speed = max(meter.measure() for _ in range(_ROUNDS))
            rows.append({"from": node.id, "to": memory.id, "gb_s": round(speed, 2)})
    return rows


def render(facts: dict[str, Any]) -> Iterator[str]:
    """The object of `describe` as lines for people."""
    for node in facts["nodes"]:
        cores, cpus = len(node["cores"]), sum(len(core) for core in node["cores"])
        kinds = f", {node['efficient']} of them efficient ones" if node["efficient"] else ""
        threads = f", {cpus} hyper-threads" if cpus > cores else ""
        yield f"node {node['id']}: {cores} core{'s' * (cores > 1)}{kinds}{threads}; {_memory(node)}"
        yield f"  cpus {_listed(cpu for core in node['cores'] for cpu in core)}"
    for node in facts["memory_nodes"]:
        yield f"node {node['id']}: no cpus for us; {_memory(node)}"
    several = len(facts["nodes"]) + len(facts["memory_nodes"]) > 1
    if several:
        for node in facts["nodes"]:
            yield f"  distances from node {node['id']}: " + ", ".join(f"{n}: {d}" for n, d in node["distances"].items())
    for row in facts["bandwidth"]:
        what = f" from node {row['from']} to the memory of node {row['to']}" if several else ""
        yield f"read bandwidth{what}: {row['gb_s']:.1f} GB/s"
    if facts["caches"]:
        yield "caches: " + ", ".join(f"L{c['level']} {c['count']} x {c['bytes'] >> 10} KB" for c in facts["caches"])
    for gpu in facts["gpus"]:
        yield f"GPU {gpu['address']}" + (f" on node {gpu['node']}" if gpu["node"] >= 0 else "")
    if facts["offline"]:
        yield f"offline cpus: {_listed(facts['offline'])}"
    if facts["quota"] is not None:
        yield f"the cgroup allows {facts['quota']:g} cpus' worth of time"
    if facts["memory_limit"] is not None:
        yield f"the cgroup leaves {facts['memory_limit'] / 1e9:.1f} GB of memory"
    balancing = "on" if facts["numa_balancing"] else "off"
    yield f"huge pages: {facts['huge_pages'] or 'none'}; kernel NUMA balancing: {balancing}"
    plan = facts["plan"]
    for index, worker in enumerate(plan["workers"]):
        place = f" on node {worker['node']}" if worker["node"] is not None else " over several nodes"
        yield f"plan: worker cpu{index}{place}, cpus {_listed(worker['cpus'])}"
    yield f"plan: coordinator's team on cpus {_listed(plan['coordinator'])}"
    if plan["unused"]:
        yield f"plan: cpus {_listed(plan['unused'])} stay unused"
    yield from (f"note: {note}" for note in plan["notes"])


def _memory(node: dict[str, Any]) -> str:
    if not node["total_bytes"]:
        return "no memory for us"
    return f"{node['available_bytes'] / 1e9:.1f} of {node['total_bytes'] / 1e9:.1f} GB free"


def _listed(cpus: Any) -> str:
    """The kernel's list format: 0-2,8."""
    parts: list[list[int]] = []
    for cpu in sorted(set(cpus)):
        if parts and cpu == parts[-1][1] + 1:
            parts[-1][1] = cpu
        else:
            parts.append([cpu, cpu])
    return ",".join(str(first) if first == last else f"{first}-{last}" for first, last in parts)
