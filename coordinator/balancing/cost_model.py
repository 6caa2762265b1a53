"""What a worker's jobs cost: t = a + b * bytes, fitted to its load reports.

Every report gives a point per layer: bytes read and time taken per job. The fit is a least-squares line through the
points of all reports, each report weighing half of the next, so that a worker that slows down is known after three or
four. Layers that stand out from the others (the scheduler took the core) get little or no weight (Tukey's biweight), by
how far they are from the line relative to the report's median. Layers that all read the same say nothing about how a
cost divides into a and b: a weak prior holds `a` at its first value. It decides where the bytes differ by less than
about 5 %, and the more so the more the times scatter: `a` is not believed to be more than a tenth of the time off
without good evidence. Without that, layers that read nearly the same gave lines of any slope (docs/log.md, 2026-11-22).
"""

from typing import Any

import numpy as np
import numpy.typing as npt

from warmfront.shared.kernels.jit import inlined, kernel

__all__ = ["WorkerCosts"]

Floats = npt.NDArray[np.float64]

_KEPT = 0.5  # share of the sums that a new report leaves
_PRIOR = 0.0025  # smallest weight of the first `a`, per point: 5 % squared, the bytes' coefficient of variation
_PRIOR_SPREAD = 0.1  # of the mean time: by how much `a` may well differ from the first one
_OUTLIER = 4.0  # robust deviations from the line, beyond which a point has no weight
_MIN_SPREAD = 0.03  # of the expected time: a robust deviation is at least this, or equal times would all be outliers
_ROUNDS = 3  # of fitting and weighing: the weights depend on the line


class WorkerCosts:
    """A worker's costs as known by now: `job_ns` per job and `byte_ns` per byte; before any report, a guess."""

    def __init__(self, job_ns: float, byte_ns: float) -> None:
        self.job_ns = job_ns
        self.byte_ns = byte_ns
        self._prior_ns = job_ns
        self._moments = np.zeros(6)  # sums over the points of all reports so far: n, x, y, xx, xy, yy

    def update(self, jobs: float, busy_ns: npt.ArrayLike, read_bytes: npt.ArrayLike) -> None:
        """Take what a worker did since its last report: jobs per layer; their total time and bytes, [layers] each.

        Layers of which the worker read nothing do not count; with none left, nothing changes.
        """
        busy, read = np.asarray(busy_ns, np.float64), np.asarray(read_bytes, np.float64)
        used = (read > 0) & (busy > 0)
        if jobs <= 0 or not used.any():
            return
        line = np.array([self.job_ns, self.byte_ns])
        _refit(read[used] / jobs, busy[used] / jobs, self._moments, line, self._prior_ns)
        self.job_ns, self.byte_ns = line.tolist()


# Compiled: numpy took a third of a millisecond for the dozens of values of a worker's report (docs/log.md). Number by
# number: where arrays are assigned to arrays, numba compiles for seconds what it would say of shapes that differ.
@kernel
def _refit(x: Floats, y: Floats, moments: Floats, line: Floats, prior: float) -> None:
    """Take the points (x bytes, y ns) into `moments`, and replace `line`, (a, b), by the one through all points."""
    kept, count = _KEPT * moments, len(x)
    off = np.empty(count)
    for _ in range(_ROUNDS):
        # Relative to the median: one that has slowed down is off its old line in all layers, and none is an outlier.
        for i in range(count):
            off[i] = y[i] / (line[0] + line[1] * x[i])
        middle = np.median(off)
        for i in range(count):
            off[i] = off[i] / middle - 1
        # 1.4826 times the median deviation is the standard deviation, for normally distributed points.
        spread = max(1.4826 * np.median(np.abs(off)), _MIN_SPREAD)
        for j in range(len(kept)):
            moments[j] = kept[j]
        for i in range(count):
            weight = max(1 - (off[i] / (_OUTLIER * spread)) ** 2, 0.0) ** 2
            terms = (1.0, x[i], y[i], x[i] * x[i], x[i] * y[i], y[i] * y[i])
            for j in range(len(kept)):
                moments[j] += weight * terms[j]
        line[0], line[1] = _fit(moments, prior)


@inlined
def _fit(moments: Floats, prior: float) -> Any:
    """a >= 0 and b > 0 of the line through the points with these moments, `a` drawn to `prior`."""
    n, x, y, xx, xy, yy = moments[0], moments[1], moments[2], moments[3], moments[4], moments[5]
    a, b = _line(moments, prior, _PRIOR * n)
    # Again, now that the points' scatter is known: the prior's weight is their variance over its own.
    scatter = yy - 2 * a * y - 2 * b * xy + a * a * n + 2 * a * b * x + b * b * xx
    return _line(moments, prior, max(_PRIOR * n, scatter * n / (_PRIOR_SPREAD * y) ** 2))


@kernel
def _line(moments: Floats, prior: float, weight: float) -> Any:
    """The line, with `prior` for `a` as one more observation of this weight."""
    n, x, y, xx, xy = moments[0], moments[1], moments[2], moments[3], moments[4]
    a = ((y + weight * prior) * xx - xy * x) / ((n + weight) * xx - x * x)
    if a < 0:
        return 0.0, xy / xx
    b = (xy - a * x) / xx
    if b > 0:
        return a, b
    # Time that falls as the bytes grow: take a line that is as level as the prior, or half of the mean time, leaves it.
    a = min(prior, y / n / 2)
    return a, (y / n - a) / (x / n)
