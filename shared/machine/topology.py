"""What this process may use of the machine: NUMA nodes, cores, memory, CPU time.

Covers: /sys and /proc, the affinity mask, cpusets and cgroup quotas (node ids need not be 0..n-1; any of the files may
be missing, as in containers). Does not cover: who runs where (`core_plan.py`), pages (`numa.py`), pinning
(`process.py`), how fast the memory is (`coordinator/hardware/bandwidth.py`).

A compute thread saturates a physical core, so hyper-threads are grouped by core and one cpu of each is used.
"""

import contextlib
import os
import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

__all__ = ["Cache", "Node", "Topology", "parse_cpu_list", "read_caches", "read_processor", "read_topology"]


# Pages of files, as the kernel's accounts of a cgroup name them.
_FILE_PAGES = ("inactive_file", "active_file")


@dataclass(frozen=True, slots=True)
class Node:
    """A NUMA node."""

    id: int
    cores: tuple[tuple[int, ...], ...]  # the allowed cpus of each physical core, the fastest kind first
    total_bytes: int  # of memory; 0 where this process may not use it (cpuset.mems)
    available_bytes: int
    distances: Mapping[int, int] = field(default_factory=dict)  # from each node's cpus to its memory, 10 = its own


@dataclass(frozen=True, slots=True)
class Cache:
    """The data caches of one level and size."""

    level: int
    bytes: int  # of each
    count: int


@dataclass(frozen=True, slots=True)
class Topology:
    """What this process may use of the machine."""

    nodes: tuple[Node, ...]  # those on which it may compute, by rising id
    memory_nodes: tuple[Node, ...] = ()  # those that only hold memory
    efficient: frozenset[int] = frozenset()  # cpus of the slower kind of a hybrid processor
    offline: tuple[int, ...] = ()  # cpus that are switched off
    quota: float | None = None  # cpus' worth of time that the cgroup allows, None = no limit
    memory_limit: int | None = None  # bytes that the cgroup still allows, None = no limit
    balancing: bool = False  # the kernel moves pages between nodes by itself
    huge_pages: str = ""  # the kernel's setting of transparent huge pages, empty if it has none
    gpus: tuple[tuple[str, int], ...] = ()  # PCI address and node (-1: unknown) of each

    @property
    def available_bytes(self) -> int:
        """Memory that this process may still take, on all nodes together."""
        free = sum(node.available_bytes for node in (*self.nodes, *self.memory_nodes))
        return free if self.memory_limit is None else min(free, self.memory_limit)

    def memory_of(self, node_id: int) -> Node | None:
        """The node whose memory a worker on `node_id` takes: its own if it has any, else the nearest that has."""
        with_memory = [node for node in (*self.nodes, *self.memory_nodes) if node.total_bytes]
        own = next(node for node in self.nodes if node.id == node_id)
        if own.total_bytes:
            return own
        # A node with cpus comes before one that only holds memory: that is mostly of a slower kind.
        rank = {id(node): (own.distances.get(node.id, 255), not node.cores, node.id) for node in with_memory}
        return min(with_memory, key=lambda node: rank[id(node)], default=None)


def parse_cpu_list(text: str) -> tuple[int, ...]:
    """Read the kernel's list format: "0-2,8" is (0, 1, 2, 8). Raises ValueError for other text."""
    cpus: list[int] = []
    for part in filter(None, text.strip().split(",")):
        first, dash, last = part.partition("-")
        cpus += range(int(first), int(last if dash else first) + 1)
    return tuple(cpus)


def read_topology(root: Path = Path("/"), allowed: Collection[int] | None = None) -> Topology:
    """Read the machine below `root`; `allowed` cpus default to this process's affinity mask."""
    mask = os.sched_getaffinity(0) if allowed is None else set(allowed)
    system = root / "sys/devices/system"
    mems = _allowed_memory(root)
    folders = list(system.glob("node/node[0-9]*"))
    # Cores of a hybrid processor: by kind where the kernel says so, else by capacity (ARM).
    efficient = _efficient(root, mask)
    nodes = []
    for folder in folders:
        number = int(folder.name.removeprefix("node"))
        cores = _cores(system, mask.intersection(_cpus(folder / "cpulist")), efficient)
        # A node's own file counts only pages that the kernel has initialised (7 of 24 GB seen, deferred_init=lazy).
        meminfo = folder / "meminfo" if len(folders) > 1 else root / "proc/meminfo"
        total, available = _memory(meminfo) if mems is None or number in mems else (0, 0)
        nodes.append(Node(number, cores, total, available, _distances(folder, folders)))
    if not any(node.cores for node in nodes):  # a container that hides the nodes
        nodes = [Node(0, _cores(system, mask, efficient), *_memory(root / "proc/meminfo"))]
    nodes.sort(key=lambda node: node.id)
    return Topology(
        nodes=tuple(node for node in nodes if node.cores),
        memory_nodes=tuple(node for node in nodes if not node.cores and node.total_bytes),
        efficient=efficient,
        offline=_offline(system),
        quota=_quota(root),
        memory_limit=_memory_limit(root),
        balancing=_text(root / "proc/sys/kernel/numa_balancing") not in ("", "0"),
        huge_pages=_chosen(_text(root / "sys/kernel/mm/transparent_hugepage/enabled")),
        gpus=tuple(_gpus(root)),
    )


def _text(path: Path) -> str:
    """The stripped text of one of the kernel's files; empty if it is missing or may not be read."""
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return ""


def _cpus(path: Path) -> tuple[int, ...]:
    return parse_cpu_list(_text(path))


def _chosen(text: str) -> str:
    """The bracketed word of "always [madvise] never"."""
    match = re.search(r"\[(\w+)\]", text)
    return match[1] if match else ""


def _cores(system: Path, cpus: set[int], efficient: Collection[int]) -> tuple[tuple[int, ...], ...]:
    cores = set()
    for cpu in cpus:
        shared = _cpus(system / f"cpu/cpu{cpu}/topology/thread_siblings_list") or (cpu,)
        cores.add(tuple(sorted(cpus.intersection(shared))))
    return tuple(sorted(cores, key=lambda core: (core[0] in efficient, core)))


def _offline(system: Path) -> tuple[int, ...]:
    """The cpus that are switched off. Not those that a virtual machine may be given one day, which are not present."""
    offline, present = _cpus(system / "cpu/offline"), _cpus(system / "cpu/present")
    return tuple(cpu for cpu in offline if cpu in present or not present)


def _efficient(root: Path, mask: set[int]) -> frozenset[int]:
    atoms = _cpus(root / "sys/devices/cpu_atom/cpus")
    if not atoms:
        capacities = {cpu: _text(root / f"sys/devices/system/cpu/cpu{cpu}/cpu_capacity") for cpu in mask}
        known = {cpu: int(text) for cpu, text in capacities.items() if text}
        # Equal cores differ by some percent where a few may clock higher, big ones from a "prime" core by 15 %.
        atoms = tuple(cpu for cpu, capacity in known.items() if 3 * capacity < 2 * max(known.values()))
    small = mask.intersection(atoms)
    return frozenset(small if small != mask else ())


def _distances(folder: Path, folders: Collection[Path]) -> dict[int, int]:
    # The file lists all online nodes in the order of their ids.
    ids = sorted(int(each.name.removeprefix("node")) for each in folders)
    return dict(zip(ids, map(int, _text(folder / "distance").split()), strict=False))


def _memory(meminfo: Path) -> tuple[int, int]:
    """(total, available) bytes. A node's file lacks MemAvailable: free memory and droppable file pages stand in."""
    sizes = {}
    for line in _text(meminfo).splitlines():
        name, _, value = line.partition(":")
        sizes[name.split()[-1]] = int(value.split()[0]) * 1024
    file_pages = sizes.get("Active(file)", 0) + sizes.get("Inactive(file)", 0)
    return sizes.get("MemTotal", 0), sizes.get("MemAvailable", sizes.get("MemFree", 0) + file_pages)


def _allowed_memory(root: Path) -> frozenset[int] | None:
    """The nodes whose memory the cpuset allows; None if the kernel does not say."""
    match = re.search(r"^Mems_allowed_list:[ \t]*(\S+)", _text(root / "proc/self/status"), re.MULTILINE)
    return frozenset(parse_cpu_list(match[1])) if match else None


def _groups(root: Path, controller: str) -> Iterator[Path]:
    """Folders of this process's cgroup and its parents: of version 2, or of version 1's `controller`."""
    for line in _text(root / "proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        # Mounted by its own name, or linked to it: "cpuacct,cpu" here may be "cpu,cpuacct" there.
        top = root / "sys/fs/cgroup" / (controllers and controller)
        # In a container the path is of the host, and the container's own group is at the top.
        for folder in (top / path.lstrip("/"), *(top / path.lstrip("/")).parents):
            if folder.is_relative_to(top):
                yield folder


def _quota(root: Path) -> float | None:
    limits = []
    for folder in _groups(root, "cpu"):
        quota, _, period = _text(folder / "cpu.max").partition(" ")
        if not quota:
            quota, period = _text(folder / "cpu.cfs_quota_us"), _text(folder / "cpu.cfs_period_us")
        with contextlib.suppress(ValueError, ZeroDivisionError):  # "max", or no such file
            if int(quota) > 0:
                limits.append(int(quota) / int(period))
    return min(limits, default=None)


def _memory_limit(root: Path) -> int | None:
    """Bytes that the tightest cgroup still allows; file pages that can be dropped count as free."""
    left = []
    for folder in _groups(root, "memory"):
        limit = _text(folder / "memory.max") or _text(folder / "memory.limit_in_bytes")
        used = _text(folder / "memory.current") or _text(folder / "memory.usage_in_bytes")
        stat: dict[str, str] = dict(re.findall(r"^(\w+) (\d+)$", _text(folder / "memory.stat"), re.MULTILINE))
        # Version 1 includes the groups below in its total_* figures only; `used` always includes them.
        droppable = sum(int(stat.get(f"total_{kind}") or stat.get(kind) or 0) for kind in _FILE_PAGES)
        if limit.isdigit() and int(limit) < 1 << 60:  # version 1 writes "no limit" as a huge number
            left.append(max(0, min(int(limit), int(limit) - int(used or 0) + droppable)))
    return min(left, default=None)


def read_caches(root: Path = Path("/"), allowed: Collection[int] | None = None) -> tuple[Cache, ...]:
    """Data caches of the allowed cpus, by level. Not part of the topology: their files outnumber all others."""
    found: dict[tuple[int, int], set[tuple[int, ...]]] = {}
    for cpu in os.sched_getaffinity(0) if allowed is None else allowed:
        for folder in (root / f"sys/devices/system/cpu/cpu{cpu}/cache").glob("index[0-9]*"):
            size = re.fullmatch(r"(\d+)([KMG]?)", _text(folder / "size"))
            if size and _text(folder / "type") != "Instruction":
                level = int(_text(folder / "level") or 0)
                cpus = _cpus(folder / "shared_cpu_list") or (cpu,)
                found.setdefault((level, int(size[1]) << {"": 0, "K": 10, "M": 20, "G": 30}[size[2]]), set()).add(cpus)
    return tuple(Cache(level, size, len(several)) for (level, size), several in sorted(found.items()))


def read_processor(root: Path = Path("/")) -> str:
    """What tells a processor from a faster one: its model as the kernel names it, and its nominal clock if known."""
    fields: dict[str, str] = {}
    for line in _text(root / "proc/cpuinfo").splitlines():
        name, _, value = line.partition(":")
        fields.setdefault(name.strip().lower(), value.strip())
    # A virtual machine's name may be that of a whole family; ARM has numbers only.
    numbers = ("cpu family", "model", "stepping", "cpu implementer", "cpu variant", "cpu part", "cpu revision")
    model = [fields[name] for name in ("model name", *numbers) if name in fields]
    highest = _text(root / "sys/devices/system/cpu/cpu0/cpufreq/cpuinfo_max_freq")
    # BogoMIPS of x86 are twice the clock of its counter; measured anew at each boot, hence rounded.
    mhz = int(highest) / 1000 if highest.isdigit() else float(fields.get("bogomips", 0)) / 2
    return " ".join(model) + (f", {round(mhz, -2):.0f} MHz" if mhz else "")


def _gpus(root: Path) -> Iterator[tuple[str, int]]:
    """NVIDIA's display and 3D controllers."""
    for folder in sorted((root / "sys/bus/pci/devices").glob("*")):
        if _text(folder / "vendor") == "0x10de" and _text(folder / "class").startswith("0x03"):
            yield folder.name, int(_text(folder / "numa_node") or -1)
