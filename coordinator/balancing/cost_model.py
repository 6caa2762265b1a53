"""What a worker's jobs cost: t = a + b * bytes, fitted to its load reports.

Every report gives a point per layer: bytes read and time taken per job. The fit is a least-squares line through the
points of all reports, each report weighing half of the next, so that a worker that slows down is known after three or
four. Layers that stand out from the others (the scheduler took the core) are left out, by how far they are from the
line relative to the report's median. Layers that all read the same say nothing about how a cost divides into a and b:
a is held by a weak prior at its first value, which decides where the bytes differ by less than about 5 %, and the more
the times scatter the more: a is not taken to be more than a tenth of the time off without good evidence.
"""

from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = ["WorkerCosts"]

Floats = npt.NDArray[np.float64]

_KEPT = 0.5  # share of the sums that a new report leaves
_PRIOR = 0.0025  # least weight of the first `a`: a squared coefficient of variation of the bytes of 5 %
_PRIOR_SPREAD = 0.1  # of the mean time: by how much `a` may well differ from the first one
_OUTLIER = 4.0  # in robust deviations, of which one is at least
_SPREAD = 0.03  # of the expected time
_ROUNDS = 3


class WorkerCosts:
    """A worker's costs as known by now: `job_ns` per job and `byte_ns` per byte, first as hinted."""

    def __init__(self, job_ns: float, byte_ns: float) -> None:
        self.job_ns = job_ns
        self.byte_ns = byte_ns
        self._prior_ns = job_ns
        self._sums = np.zeros(6)  # weights, x, y, x * x, x * y, y * y

    def update(self, jobs: float, busy_ns: npt.ArrayLike, read_bytes: npt.ArrayLike) -> None:
        """Take a load report's differences: `jobs` of every layer, [layers] time and bytes of all of them together.

        Layers of which the worker read nothing do not count; with none left, nothing changes.
        """
        busy, read = np.asarray(busy_ns, np.float64), np.asarray(read_bytes, np.float64)
        used = (read > 0) & (busy > 0)
        if jobs <= 0 or not used.any():
            return
        x, y = read[used] / jobs, busy[used] / jobs
        for _ in range(_ROUNDS):
            sums = _KEPT * self._sums + _moments(x, y, self._weights(x, y))
            self.job_ns, self.byte_ns = _line(sums, self._prior_ns)
        self._sums = sums

    def _weights(self, x: Floats, y: Floats) -> Floats:
        """[points]: 1 near the line, or the line times what all points are off it; 0 far from it."""
        ratio = y / (self.job_ns + self.byte_ns * x)
        off = ratio / np.median(ratio) - 1
        spread = max(1.4826 * float(np.median(np.abs(off))), _SPREAD)
        return np.maximum(1 - (off / (_OUTLIER * spread)) ** 2, 0.0) ** 2


def _moments(x: Floats, y: Floats, weights: Floats) -> Floats:
    return np.array([weights.sum(), weights @ x, weights @ y, weights @ (x * x), weights @ (x * y), weights @ (y * y)])


def _line(sums: npt.NDArray[Any], first: float) -> tuple[float, float]:
    """a >= 0 and b > 0 of the line through the points with these moments, a drawn to `first`."""
    n, x, y, xx, xy, yy = (float(value) for value in sums)
    a, b = _drawn(n, x, y, xx, xy, first, _PRIOR * n)
    scatter = yy - 2 * a * y - 2 * b * xy + a * a * n + 2 * a * b * x + b * b * xx
    return _drawn(n, x, y, xx, xy, first, max(_PRIOR * n, scatter * n / (_PRIOR_SPREAD * y) ** 2))


def _drawn(n: float, x: float, y: float, xx: float, xy: float, first: float, weight: float) -> tuple[float, float]:
    """The line, with the first `a` as a point of this weight."""
    a = ((y + weight * first) * xx - xy * x) / ((n + weight) * xx - x * x)
    if a < 0:
        return 0.0, xy / xx
    b = (xy - a * x) / xx
    if b > 0:
        return a, b
    # Time that falls with the bytes: the line is level but for what the prior leaves.
    a = min(first, y / n / 2)
    return a, (y / n - a) / (x / n)
