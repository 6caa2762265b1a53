"""How fast each CPU worker reads its memory: by that its neurons are dealt out before any load is reported."""

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
    """How fast each worker reads its memory, in any unit: by its threads, or as measured where their nodes differ.

    Measured once for a plan of cores, and kept. Where memory cannot be bound there is nothing to measure.
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
