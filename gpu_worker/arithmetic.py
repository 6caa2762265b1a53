"""What the emulated device computes: one call of compiled code for each `execute`, one for each layer and token.

A call costs 5 us beside the neurons; lists, sums and inputs made in Python cost 17 to 27 (two cores, AVX-512).
"""

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from warmfront.shared.kernels.atomics import address_of
from warmfront.shared.kernels.ffn import Bundles, dense_groups, list_masked, listed_neurons
from warmfront.shared.kernels.jit import kernel
from warmfront.shared.kernels.rows import quantise

__all__ = ["Room", "add_masked", "add_whole"]

Floats = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int32]
Words = npt.NDArray[np.uint32]


class Room(NamedTuple):
    """The slots, and addresses of what computing them needs: see `HostDevice.ledger`."""

    bundles: Bundles
    quantised_at: int
    scratch_at: int


@kernel
def add_masked(
    room: Room, slots: Ints, listed: Ints, x: Floats, sparse: bool, out: Floats, mask: Words, fired: Words
) -> int:
    """One token after the other: the neurons of `mask`, those of closed gates left out if `sparse`.

    Returns the number computed; `fired` tells which they were.
    """
    b, groups = room.bundles, len(slots)
    fired[:groups] = 0
    count, computed = list_masked(mask, groups, listed), 0
    for token in range(len(x)):
        x_at, out_at = address_of(x[token]), address_of(out[token])
        out[token, :] = 0
        q_at = quantise(x_at, room.quantised_at, b.hidden)
        computed += listed_neurons(b, slots, listed, 0, count, sparse, x_at, q_at, out_at, room.scratch_at, fired)
    return computed


@kernel
def add_whole(room: Room, slots: Ints, x: Floats, out: Floats, firing: Any) -> None:
    """All neurons for several tokens in panels, as matrix products; `firing`: empty."""
    out[:] = 0
    x_at, out_at, count = address_of(x), address_of(out), len(slots)
    dense_groups(room.bundles, slots, 0, count, x_at, len(x), out_at, room.scratch_at, slots, firing)
