"""How fast each CPU worker reads its memory: neurons are dealt out by that until there are load reports."""

import contextlib
import hashlib
import json
import math

from warmfront.shared.files import locked, make_folder, write_whole
from warmfront.shared.machine.core_plan import CorePlan
from warmfront.shared.machine.numa import bindable
from warmfront.shared.machine.process import hold_interrupts
from warmfront.shared.paths import cache_root

__all__ = ["worker_speeds"]

_ROUNDS = 3


def worker_speeds(cores: CorePlan) -> list[float]:
    """How fast each worker reads its memory, relative to the others.

    By its number of threads; where the workers take the memory of several nodes, as measured, once for a plan of cores.
    Where memory cannot be bound, its node is not known and nothing is measured.
    """
    threads = [float(len(worker.cpus)) for worker in cores.workers]
    if len(cores.memory_nodes) < 2 or not bindable(cores.memory_nodes):
        return threads
    key = hashlib.sha256(repr(cores.workers).encode()).hexdigest()[:20]
    path = cache_root() / "bandwidth" / f"{key}.json"
    with contextlib.suppress(OSError, ValueError, TypeError):
        kept = [float(value) for value in json.loads(path.read_bytes())]
        if len(kept) == len(threads) and all(0 < value < math.inf for value in kept):
            return kept
    with hold_interrupts():
        from warmfront.coordinator.hardware.bandwidth import Bandwidth

    meters = (Bandwidth(worker.cpus, worker.memory) for worker in cores.workers)
    speeds = [max(meter.measure() for _ in range(_ROUNDS)) for meter in meters]
    with contextlib.suppress(OSError):
        make_folder(path.parent)
        with locked(path):
            write_whole(path, json.dumps(speeds).encode())
    return speeds
