"""How the rows of a matrix are divided over the team's threads: evenly, until a thread falls behind the others.

A busy process on one core would make all threads wait for that one at every barrier. So each thread's time at its rows
is counted, and rows move to where they are done sooner. A row's result does not depend on who computes it: tokens are
the same bit for bit.
"""

import numpy as np
import numpy.typing as npt

from warmfront.shared.kernels.jit import kernel

__all__ = ["WHOLE", "RowSplit", "portion"]

WHOLE = 1 << 16
# Decoded tokens between two looks; share of the paces that a new look leaves; how far off the mean time a thread's may
# be (runs differ that much on an idle machine); what a thread keeps at least, to be measured by.
_EVERY = 8
_KEPT = 0.5
_BAND = 0.05
_LEAST = 0.05


@kernel
def portion(cuts: npt.NDArray[np.int64], total: int, unit: int, member: int) -> tuple[int, int]:
    """Thread `member`'s range of `total` items, split at `cuts` [members + 1] of WHOLE, in multiples of `unit`."""
    units = (total + unit - 1) // unit
    return min((units * cuts[member] >> 16) * unit, total), min((units * cuts[member + 1] >> 16) * unit, total)


class RowSplit:
    """`cuts`: int64 [members + 1], rising from 0 to WHOLE; `busy`: int64 [members, 16], ns, counted by the threads."""

    def __init__(self, members: int, moves: bool) -> None:
        """`moves`: whether the cuts ever do."""
        self._moves = moves and members > 1
        self.cuts = WHOLE * np.arange(members + 1) // members
        self.busy: npt.NDArray[np.int64] = np.zeros((members, 16), np.int64)
        self._paces: npt.NDArray[np.float64] | None = None
        self._tokens = 0

    def token(self) -> None:
        """A token has been decoded: at every eighth, move the cuts if some thread takes longer than the others."""
        self._tokens += 1
        if not self._moves or self._tokens % _EVERY:
            return
        busy, widths = self.busy[:, 0].astype(np.float64), np.diff(self.cuts)
        self.busy[:] = 0
        if not busy.all():
            return
        paces = busy / widths
        paces /= paces.mean()
        self._paces = paces if self._paces is None else _KEPT * self._paces + (1 - _KEPT) * paces
        spent = self._paces * widths
        if np.abs(spent / spent.mean() - 1).max() < _BAND:
            return
        speeds = np.maximum(1 / self._paces, _LEAST / len(widths) * (1 / self._paces).sum())
        if speeds.min() > (1 - _BAND) * speeds.max():
            speeds[:] = 1
        self.cuts[1:] = np.rint(WHOLE * np.cumsum(speeds / speeds.sum())).astype(np.int64)
