"""What a GPU worker computes on: a CUDA device, or the host in place of one.

A device holds groups of neurons in numbered slots and adds up the feed-forward outputs of any set of slots. It knows
neither layers nor owners: which group lies in which slot is the caller's book-keeping. Implemented in `cuda.py` and
`host.py`; a new device implements `Device` and gets a name in `open.py`.
"""

import bisect
import math
from collections.abc import Iterator
from itertools import pairwise
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from warmfront.shared.errors import ResourceError, UsageError
from warmfront.shared.machine.memory import address
from warmfront.shared.model.architecture import FeedForward
from warmfront.shared.model.bundle import BundleLayout
from warmfront.shared.selector import Work

__all__ = [
    "STAGING_BYTES",
    "Bytes",
    "Device",
    "Floats",
    "Ints",
    "Ledger",
    "Longs",
    "Words",
    "ensure_fits",
    "inside",
    "runs",
    "slots_within",
]

# What groups pass through on their way into slots.
STAGING_BYTES = 8 << 20

Bytes = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.float32]
Longs = npt.NDArray[np.int64]
Words = npt.NDArray[np.uint32]
Ints = npt.NDArray[np.int32]
# Bytes of device memory by purpose: "slots", "activations" (of CUDA), "partials".
Ledger = dict[str, int]


class Device(Protocol):
    """`reserve` comes first and once; slot numbers are the caller's to get right, and arrays are contiguous.

    Two threads may use a device at once: one calls `execute`, the other `fill`, never with the same slot.
    """

    @property
    def name(self) -> str:
        """Such as "cuda:0 NVIDIA H200" or "host (emulated GPU)"."""

    def free_bytes(self) -> int:
        """Device memory that is free now."""

    def ledger(self, layout: BundleLayout, slots: int, max_tokens: int) -> Ledger:
        """What `reserve` would allocate for `slots` slots, in bytes by purpose."""

    def reserve(
        self, layout: BundleLayout, feed_forward: FeedForward, slots: int, max_tokens: int, work: Work = Work.MASK
    ) -> None:
        """Allocate what `ledger` says.

        `work`: without masks a device may lay groups out for what it will be asked.

        Raises ResourceError if it does not fit.
        """

    def allocated(self) -> Ledger:
        """What is allocated, in bytes by purpose; equal to the ledger after `reserve`, empty before."""

    def pin(self, mapping: Bytes) -> bool:
        """Lock a shared mapping in memory, so that vectors in it are copied directly where that is faster.

        Returns whether it is locked; everything works without it, too.
        """

    @property
    def batch(self) -> int:
        """How many groups `staging` holds, 1 or more."""

    def staging(self, count: int) -> Bytes:
        """Memory from which `fill` copies fastest, uint8 [count, group_bytes]: for the next call of `fill`."""

    def fill(self, slots: Ints, groups: Bytes) -> int:
        """Copy groups, uint8 [n, group_bytes], into `slots`, int32 [n], none of which is being executed.

        Neighbouring slots are filled by one copy. Returns, once all lie there, the ns that it took.
        """

    def execute(
        self,
        slots: Ints,
        x: Floats,
        inverse: Floats,
        sparse: bool,
        out: Longs,
        mask: Words | None = None,
        computed: Words | None = None,
    ) -> tuple[int, int]:
        """Set `out` [tokens, hidden] to the sum over the neurons of `slots` of their outputs for `x` [tokens, hidden].

        The sums are in units of each token: `inverse` [tokens] has 1 / unit (`shared/kernels/exact_sums.py`). At most
        one layer's groups of slots and max_tokens tokens. With `sparse`, neurons whose gate does not fire contribute
        nothing and their up rows are not read, nor down rows where up does not fire. `mask`, uint32 [len(slots)],
        leaves out the neurons whose bits are 0. `computed`, uint32 [len(slots)], for one token only, is set to the
        neurons computed: those that fire if sparse, else all of the mask, padding included. Returns (their number,
        summed over the tokens; nanoseconds from the first copy to the device to the last one back). For the same slots
        in the same order the result is the same to the bit.
        """

    def execute_many(self, slots: Ints, x: Floats, inverse: Floats, tokens: int, out: Longs) -> tuple[int, int]:
        """As `execute` of all neurons, as matrix products: for several tokens, in panels of 16.

        x, out: [panels, hidden, 16], as on the board. What of x belongs to no token is ignored, of `out` undefined.
        """

    def close(self) -> None:
        """Free the device memory; idempotent, also after an error."""


def ensure_fits(device: Device, plan: Ledger, slots: int) -> None:
    """Raise ResourceError if the ledger `plan` for `slots` slots exceeds what is free."""
    needed, free = sum(plan.values()), device.free_bytes()
    if needed > free:
        raise ResourceError(
            f"{device.name}: {slots} slots need {needed / 2**20:.1f} MiB, {free / 2**20:.1f} MiB are free: "
            "lower the GPU's memory budget"
        )


def slots_within(device: Device, layout: BundleLayout, budget: int, max_tokens: int, max_slots: int) -> int:
    """The most slots, up to `max_slots` >= 1, whose ledger stays within `budget` bytes.

    Raises UsageError if not even one does.
    """

    def needed(slots: int) -> int:
        return sum(device.ledger(layout, slots, max_tokens).values())

    if needed(1) > budget:
        raise UsageError(
            f"a VRAM budget of {budget / 1e6:.6g} MB holds no group of neurons "
            f"({math.ceil(needed(1) / 1e5) / 10:.1f} MB are needed at least): "
            "pass a larger --vram-budget, or --gpu none"
        )
    # A ledger grows with the slots, but not evenly: a layer's groups are as many as are ever computed at once.
    return bisect.bisect_right(range(2, max_slots + 1), budget, key=needed) + 1


def runs(slots: Ints) -> Iterator[tuple[int, int]]:
    """(low, high) of each stretch of `slots` that lie one after the other."""
    bounds = [0, *(np.flatnonzero(np.diff(slots) != 1) + 1).tolist(), len(slots)]
    return pairwise(bounds) if len(slots) else iter(())


def inside(array: npt.NDArray[Any], region: Bytes) -> bool:
    """Whether `array` lies contiguously in `region`."""
    offset = address(array) - address(region)
    return 0 <= offset <= region.nbytes - array.nbytes and array.flags.c_contiguous
