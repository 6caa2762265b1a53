"""Machines as the simulator models them: what a job, a byte and a copy cost."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple


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


# GB/s that a PCIe slot of 16 lanes copies at, about 80 % of what its generation transfers (15.8, 31.5, 63).
PCIE_GBS = {3: 12.5, 4: 25.0, 5: 50.0}


def machine(cpu_gbs: float, gpu_gbs: float, pcie: int, attention_bytes: float = 8.4e9) -> Device:
    """A device from published bandwidths, of which scattered rows get 70 % and streams 85 %.

    The coordinator streams the attention weights on the GPU, by default those of a 13 B model (f16). A job costs a CPU
    worker 10 us (hand-over and barrier), a GPU worker 20 us (launches, the answer's way). A copied byte is read,
    written into pinned memory and read again by the GPU; half of that the CPU's compute leaves unused.
    """
    return Device(
        cpus=[[10_000.0, 1 / (0.7 * cpu_gbs)]],
        gpu=[20_000.0, 1 / (0.7 * gpu_gbs)],
        coordinator_ns=attention_bytes / (0.85 * gpu_gbs),
        link_gbs=PCIE_GBS[pcie],
        stolen_ns=1.5 / cpu_gbs,
    )


class Card(NamedTuple):
    """A GPU in the machine that it is usually found in."""

    memory_gb: float
    gpu_gbs: float  # data sheet
    cpu_gbs: float  # of the machine's memory
    pcie: int  # generation, 16 lanes

    def machine(self, attention_bytes: float = 8.4e9, pcie: int | None = None) -> Device:
        """With that card, and attention weights of so many bytes."""
        return machine(self.cpu_gbs, self.gpu_gbs, pcie or self.pcie, attention_bytes)


CARDS = {
    # Two channels of DDR4-3200: 50 GB/s; of DDR5-4800 to 5600: 60.
    "rtx3060": Card(12, 360, 50, 4),
    "rtx3080ti": Card(12, 912, 50, 4),
    "rtx4090": Card(24, 1008, 60, 4),
    # Eight or more channels of DDR5; HBM3 3350 GB/s, HBM3e 4800 GB/s.
    "h100": Card(80, 3350, 300, 5),
    "h200": Card(141, 4800, 400, 5),
}
DEVICES = {
    **{name: card.machine() for name, card in CARDS.items()},
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
