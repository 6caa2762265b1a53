"""Machines as the kernel shows them in /sys and /proc, written below a folder from short descriptions.

write(DESKTOP, tmp_path)
topology = read_topology(tmp_path, DESKTOP.cpus)
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from warmfront.shared.machine.topology import Node, Topology, parse_cpu_list

__all__ = ["MACHINES", "Machine", "made", "write"]

GB = 1 << 30
V2, V1 = "sys/fs/cgroup", "sys/fs/cgroup/{}/docker/4a5b"
STATUS = "Name:\tpython3\nCpus_allowed_list:\t{}\nMems_allowed_list:\t{}\nvoluntary_ctxt_switches:\t7\n"
NODE_MEMORY = """Node {id} MemTotal:       {total} kB
Node {id} MemFree:        {free} kB
Node {id} MemUsed:        1000 kB
Node {id} Active(anon):    178592 kB
Node {id} Active(file):    {file} kB
Node {id} Inactive(file):  {file} kB
Node {id} HugePages_Total:     0
"""
MACHINE_MEMORY = """MemTotal:        {total} kB
MemFree:         1000000 kB
MemAvailable:    {free} kB
Active(file):     300000 kB
Inactive(file):   100000 kB
HugePages_Total:       0
"""


@dataclass(frozen=True)
class Machine:
    """`nodes`: cpulist by node id; `cores`: the cpulist of each online core; `mask`: the affinity, all if None.

    `memory`: GB of each node, half of it free (all have 8 if None); `distances`: a row for each node by rising id;
    `caches`: (level, type, size, cpulists that share one); `files`: further files by path.
    """

    nodes: Mapping[int, str]
    cores: Sequence[str]
    mask: str | None = None
    memory: Mapping[int, int] | None = None
    distances: Sequence[str] = ()
    caches: Sequence[tuple[int, str, str, Sequence[str]]] = ()
    files: Mapping[str, str] = field(default_factory=dict)

    @property
    def cpus(self) -> set[int]:
        """What sched_getaffinity gives."""
        return {cpu for text in ([self.mask] if self.mask else self.cores) for cpu in parse_cpu_list(text)}


def write(machine: Machine, root: Path) -> None:
    """Write the files of `machine` below `root`."""
    files = {}
    memory = machine.memory or dict.fromkeys(machine.nodes, 8)
    rows = machine.distances or ["10"] * len(machine.nodes)
    for (id_, cpulist), row in zip(sorted(machine.nodes.items()), rows, strict=True):
        folder = f"sys/devices/system/node/node{id_}"
        total = memory[id_] << 20
        files[f"{folder}/cpulist"] = cpulist
        files[f"{folder}/distance"] = row
        files[f"{folder}/meminfo"] = NODE_MEMORY.format(id=id_, total=total, free=total // 4, file=total // 8)
    total = sum(memory.values()) << 20 or 8 << 20
    files["proc/meminfo"] = MACHINE_MEMORY.format(total=total, free=total // 2)
    for siblings in machine.cores:
        for cpu in parse_cpu_list(siblings):
            files[f"sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list"] = siblings
    for index, (level, kind, size, groups) in enumerate(machine.caches):
        for group in groups:
            for cpu in parse_cpu_list(group):
                folder = f"sys/devices/system/cpu/cpu{cpu}/cache/index{index}"
                files |= {f"{folder}/level": str(level), f"{folder}/type": kind, f"{folder}/size": size}
                files[f"{folder}/shared_cpu_list"] = group
    for path, text in {**files, **machine.files}.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text(text + "\n")


def made(*cores: int, hyper: bool = True) -> Topology:
    """A made-up machine: cores per node; node i has cpus from 100 * i on, two per core if `hyper`."""
    return Topology(
        tuple(
            Node(id_, tuple((100 * id_ + i, 100 * id_ + 50 + i)[: 1 + hyper] for i in range(count)), GB, GB // 2)
            for id_, count in enumerate(cores)
        )
    )


def _pairs(cores: int, first: int = 0) -> list[str]:
    """Cpu i and its hyper-thread i + cores, as servers of Intel's and AMD's number them."""
    return [f"{i},{i + cores}" for i in range(first, first + cores)]


def _capacities(values: Sequence[int]) -> dict[str, str]:
    return {f"sys/devices/system/cpu/cpu{i}/cpu_capacity": str(value) for i, value in enumerate(values)}


def _docker(cpu_max: str, **files: str) -> dict[str, str]:
    """A container's cgroup of version 2: its own group is at the top."""
    return {"proc/self/cgroup": "0::/", f"{V2}/cpu.max": cpu_max} | {f"{V2}/memory.{n}": t for n, t in files.items()}


DESKTOP = Machine(
    {0: "0-7"},
    _pairs(4),
    memory={0: 32},
    caches=[
        (1, "Data", "32K", _pairs(4)),
        (1, "Instruction", "32K", _pairs(4)),
        (2, "Unified", "1024K", _pairs(4)),
        (3, "Unified", "32M", ["0-7"]),
    ],
    files={
        "sys/devices/system/cpu/online": "0-7",
        "sys/devices/system/cpu/offline": "",
        "sys/kernel/mm/transparent_hugepage/enabled": "always [madvise] never",
        "proc/sys/kernel/numa_balancing": "0",
        "proc/self/cgroup": "0::/user.slice/user-1000.slice/session-2.scope",
        "proc/self/status": STATUS.format("0-7", "0"),
        f"{V2}/user.slice/user-1000.slice/memory.max": "max",
        f"{V2}/user.slice/cpu.max": "max 100000",
        "sys/bus/pci/devices/0000:00:02.0/vendor": "0x8086",
        "sys/bus/pci/devices/0000:00:02.0/class": "0x030000",
        "sys/bus/pci/devices/0000:01:00.0/vendor": "0x10de",
        "sys/bus/pci/devices/0000:01:00.0/class": "0x030000",
        "sys/bus/pci/devices/0000:01:00.0/numa_node": "-1",
        "sys/bus/pci/devices/0000:01:00.1/vendor": "0x10de",
        "sys/bus/pci/devices/0000:01:00.1/class": "0x040300",
    },
)
TWO_SOCKETS = Machine(
    {0: "0-3,8-11", 1: "4-7,12-15"},
    _pairs(8),
    memory={0: 64, 1: 128},
    distances=["10 21", "21 10"],
    caches=[(3, "Unified", "16384K", ["0-3,8-11", "4-7,12-15"])],
    files={
        "proc/sys/kernel/numa_balancing": "1",
        "sys/kernel/mm/transparent_hugepage/enabled": "[always] madvise never",
        "sys/bus/pci/devices/0000:81:00.0/vendor": "0x10de",
        "sys/bus/pci/devices/0000:81:00.0/class": "0x030200",
        "sys/bus/pci/devices/0000:81:00.0/numa_node": "1",
    },
)
MACHINES = {
    "desktop": DESKTOP,
    "intel hybrid": Machine(  # two P cores with hyper-threads, four E cores; favoured cores clock a little higher
        {0: "0-7"},
        ["0-1", "2-3", "4", "5", "6", "7"],
        files={
            "sys/devices/cpu_core/cpus": "0-3",
            "sys/devices/cpu_atom/cpus": "4-7",
            **_capacities([1009, 1009, 1024, 1024, 702, 702, 702, 702]),
        },
    ),
    "big.LITTLE": Machine(  # little, big, prime
        {0: "0-7"}, [str(i) for i in range(8)], files=_capacities([325, 325, 325, 325, 871, 871, 871, 1024])
    ),
    "two sockets": TWO_SOCKETS,
    "four sockets": Machine(
        {i: f"{2 * i}-{2 * i + 1},{8 + 2 * i}-{9 + 2 * i}" for i in range(4)},
        _pairs(8),
        distances=["10 21 21 31", "21 10 31 21", "21 31 10 21", "31 21 21 10"],
    ),
    "sub-NUMA clusters": Machine(  # two sockets of four nodes
        {i: f"{2 * i}-{2 * i + 1}" for i in range(8)},
        [str(i) for i in range(16)],
        distances=[" ".join(str(10 if i == j else 12 if i // 4 == j // 4 else 21) for j in range(8)) for i in range(8)],
    ),
    "cxl": Machine(
        {0: "0-1", 1: "2-3", 2: ""},
        [str(i) for i in range(4)],
        memory={0: 16, 1: 16, 2: 64},
        distances=["10 21 14", "21 10 24", "14 24 10"],
    ),
    "node without memory": Machine(  # as on the first Threadrippers: nodes 1 and 3 have no memory
        {0: "0-1", 1: "2-3", 2: "4-5", 3: "6-7"},
        [str(i) for i in range(8)],
        memory={0: 16, 1: 0, 2: 16, 3: 0},
        distances=["10 16 32 32", "16 10 32 32", "32 32 10 16", "32 32 16 10"],
    ),
    "gaps": Machine(  # as on POWER
        {0: "0-1", 8: "2-3", 250: ""},
        ["0-1", "2-3"],
        memory={0: 8, 8: 8, 250: 4},
        distances=["10 40 80", "40 10 80", "80 80 10"],
    ),
    "offline": Machine(
        {0: "0-1,4"},
        ["0,4", "1"],
        files={
            "sys/devices/system/cpu/online": "0-1,4",
            "sys/devices/system/cpu/offline": "2-3,5-127",
            "sys/devices/system/cpu/present": "0-7",
        },
    ),
    "cpuset": Machine(  # a container with --cpuset-cpus 2-4,10 --cpuset-mems 1 on the two sockets
        TWO_SOCKETS.nodes,
        TWO_SOCKETS.cores,
        mask="2-4,10",
        memory=TWO_SOCKETS.memory,
        distances=TWO_SOCKETS.distances,
        files=_docker("max 100000", max="max", current="1000") | {"proc/self/status": STATUS.format("2-4,10", "1")},
    ),
    "quota": Machine(
        {0: "0-7"},
        _pairs(4),
        files=_docker(
            "250000 100000",
            max=str(4 * GB),
            current=str(3 * GB),
            stat=f"anon 7\nfile {2 * GB}\ninactive_file {GB // 2}\nactive_file {GB // 4}\nworkingset_refault_file 9",
        ),
    ),
    "half a core": Machine({0: "0-7"}, _pairs(4), files=_docker("50000 100000")),
    "cgroup v1": Machine(
        {0: "0-7"},
        _pairs(4),
        files={
            "proc/self/cgroup": "9:memory:/docker/4a5b\n4:cpuacct,cpu:/docker/4a5b\n1:name=systemd:/x\n0::/x",
            f"{V1.format('cpu')}/cpu.cfs_quota_us": "300000",
            f"{V1.format('cpu')}/cpu.cfs_period_us": "100000",
            f"{V2}/cpu/cpu.cfs_quota_us": "-1",
            f"{V2}/cpu/cpu.cfs_period_us": "100000",
            f"{V1.format('memory')}/memory.limit_in_bytes": str(2 * GB),
            f"{V1.format('memory')}/memory.usage_in_bytes": str(GB),
            f"{V1.format('memory')}/memory.stat": f"active_file 5\ntotal_inactive_file {GB // 4}\ntotal_active_file 0",
            f"{V2}/memory/memory.limit_in_bytes": "9223372036854771712",
        },
    ),
    "no sys": Machine({}, [], mask="1,3"),
    "no mems": Machine(  # the whole machine but for the memory of node 1
        TWO_SOCKETS.nodes,
        TWO_SOCKETS.cores,
        memory=TWO_SOCKETS.memory,
        distances=TWO_SOCKETS.distances,
        files={"proc/self/status": STATUS.format("0-15", "0")},
    ),
}
