"""What is written down of a prompt's neurons (`Noted`) while they are computed, for those runs that want it.

The kernel that writes is called by its address, so that only runs that want it compile it.
"""

from typing import NamedTuple

import numpy as np
from numba import carray

from warmfront.shared.kernels.atomics import floats_at, shorts_at, words_at
from warmfront.shared.kernels.by_address.kernels import call_at, entry_of
from warmfront.shared.kernels.jit import inlined, kernel
from warmfront.shared.model.bundle import GROUP
from warmfront.shared.model.noted import Noted
from warmfront.shared.model.panels import LANES

__all__ = ["NO_NOTES", "Notes", "note_group", "noting"]


class Notes(NamedTuple):
    """Where a layer's neurons are noted, and by what."""

    # Address of the kernel, 0: nothing is noted.
    by: int
    # Address of the layer's table, and the length of its rows.
    at: int
    width: int


NO_NOTES = Notes(0, 0, 0)


@kernel
def _note_firing(factors_at: int, panels: int, group: int, at: int, width: int) -> int:
    """Which factors are not 0: uint16 [groups, 32, width]."""
    factors = carray(floats_at(factors_at), (panels, GROUP, LANES))
    bits = carray(shorts_at(at + 2 * group * GROUP * width), (GROUP, width))
    for panel in range(panels):
        for neuron in range(GROUP):
            word = 0
            for lane in range(LANES):
                if factors[panel, neuron, lane] != 0:
                    word |= 1 << lane
            bits[neuron, panel] = word
    return 0


@kernel
def _note_magnitudes(factors_at: int, panels: int, group: int, at: int, width: int) -> int:
    """Their magnitudes, rounded to bfloat16, ties to even: uint16 [tokens, width]. A group is a line of the cache."""
    factors = carray(words_at(factors_at), (panels, GROUP, LANES))
    for panel in range(panels):
        for lane in range(LANES):
            row = carray(shorts_at(at + 2 * ((panel * LANES + lane) * width + group * GROUP)), (GROUP,))
            for neuron in range(GROUP):
                bits = factors[panel, neuron, lane] & np.uint32(0x7FFFFFFF)
                row[neuron] = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    return 0


_KERNELS = {Noted.FIRING: _note_firing, Noted.MAGNITUDES: _note_magnitudes}


def noting(what: int) -> int:
    """The address of the kernel that notes one of `Noted`, which is compiled now; 0 for nothing."""
    return 0 if what == Noted.NOTHING else entry_of(_KERNELS[Noted(what)], 0, 0, 0, 0, 0)


@inlined
def note_group(notes: Notes, factors_at: int, panels: int, group: int) -> None:
    """Note the factors [panels, 32, 16] of a group; those of lanes behind the last token may be anything."""
    call_at(notes.by, factors_at, panels, np.int64(group), notes.at, notes.width)
