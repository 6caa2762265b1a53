"""What a GPU worker computes on: a CUDA device, or the host in its stead.

A device holds groups of neurons in numbered slots and adds up the feed-forward outputs of any set of slots. It knows
neither layers nor owners: which group lies in which slot is the caller's book-keeping. Implemented in `cuda.py` and
`host.py`; a new device implements `Device` and gets a name in `open_device`.
"""

from typing import Protocol

import numpy as np
import numpy.typing as npt

from warmfront.shared.bundle import BundleLayout
from warmfront.shared.errors import ResourceError

__all__ = ["Bytes", "Device", "Floats", "Ints", "Ledger", "Words", "ensure_fits", "open_device", "slots_within"]

Bytes = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.float32]
Words = npt.NDArray[np.uint32]
Ints = npt.NDArray[np.int32]
# Bytes of device memory by purpose: "slots", "activations", "partials".
Ledger = dict[str, int]


class Device(Protocol):
    """Calls come one at a time, `reserve` first and once; slot numbers are the caller's to get right."""

    @property
    def name(self) -> str:
        """Such as "cuda:0 NVIDIA H200" or "host (emulated GPU)"."""

    def free_bytes(self) -> int:
        """Device memory that is free now."""

    def ledger(self, layout: BundleLayout, slots: int, max_tokens: int) -> Ledger:
        """What `reserve` would allocate for `slots` slots, in bytes by purpose."""

    def reserve(self, layout: BundleLayout, activation: int, slots: int, max_tokens: int) -> None:
        """Allocate what `ledger` says; `activation` is an index into model.ACTIVATIONS.

        Raises ResourceError if it does not fit.
        """

    def allocated(self) -> Ledger:
        """What is allocated, in bytes by purpose; equal to the ledger after `reserve`, empty before."""

    def store(self, slot: int, group: Bytes) -> None:
        """Copy a group, uint8 [group_bytes], into a slot."""

    def store_many(self, first_slot: int, groups: Bytes) -> None:
        """Copy groups, uint8 [n, group_bytes], into slots first_slot, first_slot + 1, ..."""

    def execute(
        self, slots: npt.NDArray[np.int32], x: Floats, sparse: bool, out: Floats, mask: Words | None = None
    ) -> tuple[int, int]:
        """Set `out` [tokens, hidden] to the sum over the neurons of `slots` of their outputs for `x` [tokens, hidden].

        At most one layer's groups of slots and max_tokens tokens. With `sparse`, neurons whose gate is not positive
        contribute nothing and their up rows are not read. `mask`, uint32 [len(slots)], leaves out the neurons whose
        bits are 0. Returns (neurons computed, summed over the tokens: those whose gate passed if sparse, else all of
        the mask, padding included; nanoseconds from the first copy to the device to the last one back). For the same
        slots in the same order the result is the same to the bit.
        """

    def close(self) -> None:
        """Free the device memory; idempotent."""


def ensure_fits(device: Device, plan: Ledger, slots: int) -> None:
    """Raise ResourceError if the ledger `plan` for `slots` slots exceeds what is free."""
    needed, free = sum(plan.values()), device.free_bytes()
    if needed > free:
        raise ResourceError(
            f"{device.name}: {slots} slots need {needed / 2**20:.1f} MiB, {free / 2**20:.1f} MiB are free: "
            "lower the GPU's memory budget"
        )


def slots_within(device: Device, layout: BundleLayout, budget: int, max_tokens: int, most: int) -> int:
    """The most slots, up to `most`, whose ledger stays within `budget` bytes."""
    fixed = sum(device.ledger(layout, 0, max_tokens).values())
    slots = min(most, (budget - fixed) // layout.group_bytes)
    if slots < 1:
        raise ResourceError(
            f"a VRAM budget of {budget / 1e6:.1f} MB holds no group of neurons "
            f"({(fixed + layout.group_bytes) / 1e6:.1f} MB are needed at least): pass a larger --vram-budget, or --gpu none"
        )
    return slots


def open_device(name: str) -> Device:
    """The device called "host" or "cuda:N"; raises ResourceError if it is not there."""
    kind, _, index = name.partition(":")
    if name == "host":
        from warmfront.gpu_worker.host import HostDevice

        return HostDevice()
    if kind == "cuda" and index.isdecimal():
        from warmfront.gpu_worker.cuda import CudaDevice

        return CudaDevice(int(index))
    raise ResourceError(f"no device is called {name!r}: use cuda:N or host")
