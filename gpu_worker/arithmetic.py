"""What the emulated device computes: one call of compiled code for each `execute`, one for each layer and token.

A call costs 5 us beside the neurons; lists, sums and inputs made in Python cost 17 to 27 (two cores, AVX-512).
"""

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from numba import carray

from warmfront.shared.atomics import address_of, floats_at
from warmfront.shared.bundle import GROUP
from warmfront.shared.ffn import Bundles, dense_groups, list_masked, listed_neurons
from warmfront.shared.gemm import LANES, panels_of
from warmfront.shared.jit import kernel
from warmfront.shared.kernels import quantise

__all__ = ["Room", "add_masked", "add_whole"]

Floats = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int32]
Words = npt.NDArray[np.uint32]


class Room(NamedTuple):
    """The slots, and addresses of what computing them needs: see `HostDevice.ledger`."""

    bundles: Bundles
    x_at: int
    sums_at: int
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
def _to_panels(x: Floats, panels_at: int) -> None:
    """[tokens, hidden] as [panels, hidden, LANES], with zeros for the tokens that the last panel lacks."""
    tokens, hidden = x.shape
    panels = carray(floats_at(panels_at), (panels_of(tokens), hidden, LANES))
    for token in range(len(panels) * LANES):
        for k in range(hidden):
            panels[token // LANES, k, token % LANES] = x[token, k] if token < tokens else np.float32(0)


@kernel
def _from_panels(panels_at: int, out: Floats) -> None:
    tokens, hidden = out.shape
    panels = carray(floats_at(panels_at), (panels_of(tokens), hidden, LANES))
    for token in range(tokens):
        for k in range(hidden):
            out[token, k] = panels[token // LANES, k, token % LANES]


@kernel
def add_whole(room: Room, slots: Ints, x: Floats, out: Floats, firing: Any) -> int:
    """All neurons for several tokens, as matrix products; `firing`: empty. Returns the number computed."""
    panels, hidden = panels_of(len(x)), room.bundles.hidden
    _to_panels(x, room.x_at)
    carray(floats_at(room.sums_at), (panels * hidden * LANES,))[:] = 0
    dense_groups(room.bundles, slots, 0, len(slots), room.x_at, panels, room.sums_at, room.scratch_at, slots, firing)
    _from_panels(room.sums_at, out)
    return len(slots) * GROUP * len(x)
