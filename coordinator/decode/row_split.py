"""How the rows of a matrix are divided over the team's threads: evenly, until a thread falls behind the others.

A busy process on one core would make all threads wait for that one at every barrier. So each thread's time at its rows
is counted, and rows move to where they are done sooner. A row's result does not depend on who computes it: tokens are
the same bit for bit.
"""

import numpy as np
import numpy.typing as npt

from warmfront.shared.kernels.jit import kernel
from warmfront.shared.kernels.rows import share

__all__ = ["WHOLE", "RowSplit", "portion"]

WHOLE = 1 << 16
# Decoded tokens between two looks.
_PERIOD = 8
# Weight of the paces known so far beside those of the last period.
_KEPT = 0.5
# How far a thread's time may be off the mean: runs differ that much on an idle machine.
_BAND = 0.05
# Share of an equal part that a thread keeps at least: without rows its pace could not be measured any more.
_MIN_PART = 0.05


@kernel
def portion(cuts: npt.NDArray[np.int64], total: int, unit: int, rank: int) -> tuple[int, int]:
    """Thread `rank`'s range of `total` items, split at `cuts` [threads + 1] of WHOLE, in multiples of `unit`."""
    return share(total, unit, cuts[rank], cuts[rank + 1], WHOLE)


class RowSplit:
    """Where the rows are cut, and the times by which the cuts move."""

    def __init__(self, threads: int, moves: bool) -> None:
        """`moves`: whether the cuts ever do."""
        self._moves = moves and threads > 1
        # int64 [threads + 1], rising from 0 to WHOLE.
        self.cuts = WHOLE * np.arange(threads + 1) // threads
        # int64 [threads, 16], a cache line each: ns at its rows, counted by the threads.
        self.busy: npt.NDArray[np.int64] = np.zeros((threads, 16), np.int64)
        self._paces: npt.NDArray[np.float64] | None = None
        self._tokens = 0

    def token(self) -> None:
        """A token has been decoded: every few of them, move the cuts if some thread takes longer than the others.

        A thread's pace is its time per row. The new parts are as the inverse paces, so that all would have finished
        together; within the band nothing moves, for rows that move leave the memory near their thread.
        """
        self._tokens += 1
        if not self._moves or self._tokens % _PERIOD:
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
        speeds = np.maximum(1 / self._paces, _MIN_PART / len(widths) * (1 / self._paces).sum())
        if speeds.min() > (1 - _BAND) * speeds.max():
            speeds[:] = 1
        self.cuts[1:] = np.rint(WHOLE * np.cumsum(speeds / speeds.sum())).astype(np.int64)
