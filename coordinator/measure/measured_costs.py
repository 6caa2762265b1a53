"""How fast this machine's workers are: ns of a job, ns of a byte, fitted to what they report and kept for next time.

A straight line through the time per job over the bytes per job of a layer. The points come from decoding with
different shares of every layer on the GPU; each is the median of several rounds, for any one may have been disturbed.
"""

import contextlib
import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from warmfront.coordinator.placement.solver import DeviceCosts
from warmfront.shared.errors import ResourceError, WorkerError
from warmfront.shared.files import locked, make_folder, write_whole
from warmfront.shared.paths import cache_root

if TYPE_CHECKING:
    from warmfront.coordinator.engine.engine import Engine

__all__ = ["CostsKey", "fit_line", "key_of", "load_costs", "measure_costs", "save_costs"]

# Parts of what the GPU holds of a layer that it is given in turn.
_SHARES = (1.0, 0.6, 0.3, 0.1)
_ROUNDS, _TOKENS = 5, 4

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class CostsKey:
    """What costs depend on: the packed model's file (its stem), selector, each worker's device and threads."""

    model: str
    selector: str
    devices: tuple[str, ...]
    threads: tuple[int, ...]

    def to_json(self) -> str:
        """The same for the same key."""
        return json.dumps(asdict(self), sort_keys=True)

    @property
    def path(self) -> Path:
        """Where its costs are kept."""
        digest = hashlib.sha256(self.to_json().encode()).hexdigest()
        return cache_root() / "times" / f"{digest[:20]}.json"


def key_of(engine: "Engine") -> CostsKey:
    """The key of an engine's workers."""
    cores = engine.plan.cores
    threads = (*(len(worker.cpus) for worker in cores.workers), len(cores.gpu))
    return CostsKey(
        engine.model.path.stem,
        engine.plan.selector.name,
        tuple(worker.device for worker in engine.statistics.workers()),
        threads,
    )


def load_costs(key: CostsKey) -> DeviceCosts | None:
    """The costs measured earlier; None if there are none, or what is there is damaged."""
    try:
        kept = json.loads(key.path.read_bytes())
        costs = DeviceCosts(**{name: float(value) for name, value in kept["times"].items()})
    except (OSError, ValueError, TypeError, LookupError, AttributeError):
        return None
    sound = all(np.isfinite(costs)) and min(costs) >= 0
    return costs if sound and kept.get("key") == json.loads(key.to_json()) else None


def save_costs(key: CostsKey, costs: DeviceCosts) -> None:
    """Keep costs for `load_costs`; where the cache cannot be written, they are measured again next time."""
    kept = {"key": json.loads(key.to_json()), "times": costs._asdict()}
    with contextlib.suppress(OSError):
        make_folder(key.path.parent)
        with locked(key.path):
            write_whole(key.path, json.dumps(kept).encode())


def measure_costs(engine: "Engine") -> DeviceCosts:
    """Decode some tokens with an engine that has a GPU, which keeps its groups but computes changing shares of them.

    Who owns what is in the end as before. Raises ResourceError if the GPU had nothing to compute.
    """
    names = engine.ownership.names
    on_gpu = np.array([not name.startswith("cpu") for name in names])
    ids = [token % engine.model.spec.vocab for token in range(1, 4)]
    before = engine.ownership.owners()
    owned = on_gpu[before]
    # The rank of each group among those of its layer on the GPU, from 0 to 1.
    rank = np.cumsum(owned, axis=1) / np.maximum(owned.sum(1, keepdims=True), 1)
    rounds: list[list[tuple[Floats, Floats]]] = []
    try:
        for _ in range(_ROUNDS):
            rounds.append([])
            for shift in range(len(_SHARES)):
                shares = np.array(_SHARES)[(np.arange(len(before)) + shift) % len(_SHARES), None]
                given = owned & ((rank <= shares) | (np.cumsum(owned, axis=1) == 1))
                engine.ownership.hand_over(np.where(owned & ~given, engine.ownership.home, before))
                rounds[-1].append(_decode(engine, ids))
    finally:
        engine.ownership.hand_over(before)
        engine.reset()
    # [rounds, workers, shares x layers]
    busy, read = (np.array([np.concatenate([some[i] for some in each], axis=1) for each in rounds]) for i in (0, 1))
    return DeviceCosts(
        *fit_line(busy[:, ~on_gpu].max(1), read[:, ~on_gpu].sum(1)),
        *fit_line(busy[:, on_gpu].max(1), read[:, on_gpu].sum(1)),
    )


def _decode(engine: "Engine", ids: list[int]) -> tuple[Floats, Floats]:
    """Of a few tokens, per token: the workers' ns and bytes, [workers, layers] each."""
    was = engine.statistics.reports()
    engine.decode_ids(ids, _TOKENS)
    now, names = engine.statistics.reports(), engine.ownership.names
    if any(name not in was or name not in now for name in names):
        raise WorkerError("a worker was lost while its speed was measured: run it again")
    tokens = np.array([now[name].jobs - was[name].jobs for name in names])[:, None] / engine.model.spec.layers
    busy = np.array([np.subtract(now[name].busy_ns, was[name].busy_ns) for name in names])
    read = np.array([np.subtract(now[name].bytes, was[name].bytes) for name in names])
    return busy / tokens, read / tokens


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
