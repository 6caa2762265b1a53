"""How far ahead weights are fetched by software: a table that kernels are given, not a constant compiled into them.

On one machine these hints double the speed of a loop, on another they halve it, by weight type and by how the weights
lie (docs/log.md). So what is best is measured on the machine that runs (`coordinator/hardware/fetching.py`); it changes
no bit of a result. A distance is in bytes, from what is computed to what is fetched meanwhile; 0: nothing is.

A kernel that reads in a new way: a name here, its candidates and how it races in `coordinator/hardware/`, and
`distances[ITS_ACCESS, kind]` where it is called.
"""

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from warmfront.shared.model.formats import FLOATS, Kind

__all__ = [
    "ACCESSES",
    "ANNOUNCED",
    "BUNDLES",
    "CACHED_TILES",
    "GATE_ROWS",
    "LOWBIT_ROWS",
    "MATRIX_ROWS",
    "SCATTERED",
    "Distances",
    "Fetch",
    "Use",
    "as_distances",
    "no_fetching",
    "usual_distances",
]

# int64 [ACCESSES, kinds]: how many bytes ahead is fetched; 0: not at all (in tiles what is read next anyway).
Distances = npt.NDArray[np.int64]

ACCESSES = ("matrix", "cached", "lowbit", "gates", "bundles", "scattered", "announced")
(
    # Rows of a matrix one behind the other, in tiles where the CPU multiplies bytes.
    MATRIX_ROWS,
    # Tiles of cached keys, and then of the values of the same positions.
    CACHED_TILES,
    # Rows of a low-bit copy of the gates; its bits take the place of the kind.
    LOWBIT_ROWS,
    # The gates of groups in order, apart from the rest of them and in tiles as matrices: any distance stands for the
    # next tile.
    GATE_ROWS,
    # All neurons in order, in tiles as matrices, by the kind of their gates, as the next two.
    BUNDLES,
    # Some neurons, in ascending order.
    SCATTERED,
    # Of the same: a line of each KB is fetched so many neurons (not bytes) before the rest is.
    ANNOUNCED,
) = range(len(ACCESSES))

# Where nothing was measured. Of the two machines known, floats lose little without (a tenth) and half with it; whole
# numbers, whose arithmetic keeps fewer lines in flight by itself, lose a fifth with it and half without (docs/log.md).
_USUAL = 2048


class Fetch(NamedTuple):
    """One way of fetching."""

    # In bytes.
    ahead: int = 0
    # SCATTERED only: its ANNOUNCED.
    announced: int = 0


class Use(NamedTuple):
    """Weights of one kind that lie in one way."""

    # An index into ACCESSES.
    access: int
    # A number of `Kind`; of LOWBIT_ROWS the bits.
    kind: int

    def __str__(self) -> str:
        kind = f"{self.kind} bits" if self.access == LOWBIT_ROWS else Kind(self.kind).name.lower()
        return f"{ACCESSES[self.access]} {kind}"


def no_fetching() -> Distances:
    """A table in which nothing is fetched by software."""
    return np.zeros((len(ACCESSES), len(Kind)), np.int64)


def usual_distances() -> Distances:
    """What a machine gets where nothing was measured."""
    table = no_fetching()
    table[:ANNOUNCED] = _USUAL
    for access in range(len(ACCESSES)):
        if access != LOWBIT_ROWS:
            table[access, list(FLOATS)] = 0
    return table


def as_distances(data: bytes) -> Distances:
    """The table with these bytes; without any, `usual_distances`."""
    return np.frombuffer(data, np.int64).reshape(len(ACCESSES), len(Kind)) if data else usual_distances()
