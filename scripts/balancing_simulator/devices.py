"""Machines as the simulator models them: what a job, a byte and a copy cost."""

import json
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, kw_only=True)
class Device:
    """One machine."""

    cpus: list[list[float]]  # of each CPU worker: ns per job, ns per byte
    gpu: list[float]  # the same of each GPU
    coordinator_ns: float  # its part of a token
    link_gbs: float  # GB/s of copies to the GPU
    stolen_ns: float  # of the CPU workers' time, per byte copied
    shared: bool = False  # the coordinator computes on the same cores: copies take its time too
    deciding_ns: float = 0.0  # of one decision, where it was measured


def machine(cpu_gbs: float, gpu_gbs: float, link_gbs: float, attention_bytes: float = 8.4e9) -> Device:
    """A device from published bandwidths, of which scattered rows get 70 % and streams 85 %.

    The coordinator streams the attention weights of a 13 B model (f16) on the GPU. A job costs a CPU worker 10 us
    (hand-over and barrier), a GPU worker 20 us (launches, the answer's way). A copied byte is read, written into pinned
    memory and read again by the GPU; half of that the CPU's compute leaves unused.
    """
    return Device(
        cpus=[[10_000.0, 1 / (0.7 * cpu_gbs)]],
        gpu=[20_000.0, 1 / (0.7 * gpu_gbs)],
        coordinator_ns=attention_bytes / (0.85 * gpu_gbs),
        link_gbs=link_gbs,
        stolen_ns=1.5 / cpu_gbs,
    )


DEVICES = {
    # Two channels of DDR5-4800 to 5600 give 60 GB/s; 1008 GB/s and PCIe 4.0 x16 (25 of 32 GB/s): data sheet.
    "rtx4090": machine(60, 1008, 25),
    # Two channels of DDR4-3200; 912 GB/s, PCIe 4.0 x16.
    "3080ti": machine(50, 912, 25),
    # Eight or more channels of DDR5; HBM3e, 4800 GB/s; PCIe 5.0 x16 (50 of 64 GB/s).
    "h200": machine(400, 4800, 50),
    # The emulated GPU of bench_balancing.py on two cores, as it measured it; copies share the cores with all else.
    "emulation": Device(
        cpus=[[179_000.0, 0.502]],
        gpu=[208_000.0, 0.126],
        coordinator_ns=52.5e6,
        link_gbs=1.04,
        stolen_ns=0.96,
        shared=True,
        deciding_ns=4.4e6,
    ),
}


def device_of(text: str) -> Device:
    """A known name, or the path of a JSON file with the fields of `Device`; ValueError if it is neither."""
    if text in DEVICES:
        return DEVICES[text]
    try:
        return Device(**json.loads(Path(text).read_text(encoding="utf-8")))
    except (OSError, TypeError) as error:
        raise ValueError(str(error)) from None
