"""How fast this machine's workers are: ns of a job, ns of a byte, fitted to what they report and kept for next time.

A straight line through the time per job over the bytes per job of a layer. The points come from decoding with
different shares of every layer on the GPU; each is the median of several rounds, for any one may have been disturbed.
"""

import contextlib
import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from warmfront.coordinator.solver import Times
from warmfront.coordinator.whole_file import write_whole
from warmfront.shared.errors import ResourceError
from warmfront.shared.paths import cache_root

__all__ = ["TimesKey", "fit_line", "load_times", "save_times"]

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class TimesKey:
    """What unit times depend on: the packed model's file (its stem), selector, each worker's device and threads."""

    model: str
    selector: str
    devices: tuple[str, ...]
    threads: tuple[int, ...]

    def to_json(self) -> str:
        """The same for the same key."""
        return json.dumps(asdict(self), sort_keys=True)

    @property
    def path(self) -> Path:
        """Where its times are kept."""
        digest = hashlib.sha256(self.to_json().encode()).hexdigest()
        return cache_root() / "times" / f"{digest[:20]}.json"


def load_times(key: TimesKey) -> Times | None:
    """The times measured earlier; None if there are none, or what is there is damaged."""
    try:
        kept = json.loads(key.path.read_bytes())
        times = Times(**{name: float(value) for name, value in kept["times"].items()})
    except (OSError, ValueError, TypeError, LookupError, AttributeError):
        return None
    sound = all(np.isfinite(times)) and min(times) >= 0
    return times if sound and kept.get("key") == json.loads(key.to_json()) else None


def save_times(key: TimesKey, times: Times) -> None:
    """Keep times for `load_times`; where the cache cannot be written, they are measured again next time."""
    kept = {"key": json.loads(key.to_json()), "times": times._asdict()}
    with contextlib.suppress(OSError):
        key.path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(key.path, json.dumps(kept))


def fit_line(busy_ns: Floats, read: Floats) -> tuple[float, float]:
    """(ns of a job, ns of a byte) of the line through the medians of `busy_ns` and `read` over the rounds.

    Both float64 [rounds, points], per job; points without a byte do not count, for who computes nothing may skip the
    job. Of all lines that neither fall nor start below zero it is the one with the least squares. Raises ResourceError
    if no point has a byte.
    """
    y, x = np.median(busy_ns, axis=0), np.median(read, axis=0)
    x, y = x[x > 0], y[x > 0]
    if not len(x):
        raise ResourceError("no worker time was measured: the workers had nothing to compute")
    spread = x - x.mean()
    slope = float(spread @ y / (spread @ spread)) if spread.any() else 0.0
    job = float(y.mean() - slope * x.mean())
    if slope < 0:
        return float(y.mean()), 0.0
    return (job, slope) if job >= 0 else (0.0, float(x @ y / (x @ x)))
