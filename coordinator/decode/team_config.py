"""How a team of the coordinator runs, whichever kind it is; filled by the runtime."""

from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from warmfront.shared.kernels.fetching import Distances, usual_distances
from warmfront.shared.machine.core_plan import CorePlan
from warmfront.shared.model.formats import Kind
from warmfront.shared.selector import Selector

__all__ = ["Place", "TeamConfig"]


class Place(NamedTuple):
    """Where a token stands."""

    # In its text.
    position: int
    # int64 [pages of a context]: the pages of the KV cache that hold the text.
    table: npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True, kw_only=True)
class TeamConfig:
    """Settings of a `ThreadTeam` or a `TorchTeam`."""

    # A thread for each of its `coordinator` cpus.
    cores: CorePlan
    # The longest text, and how many such texts the KV cache holds.
    context: int
    # Weight type of its keys and values.
    cache_kind: Kind
    selector: Selector
    texts: int = 1
    # Predict a layer's neurons while the one before is computed.
    look_ahead: bool = False
    # Threads: how far ahead rows are fetched.
    distances: Distances = field(default_factory=usual_distances)
    # Threads: keep each on its cpu.
    pinned: bool = True
    # Threads: rows move between them as the load of their cores shifts.
    balances: bool = True
    # Threads: the feed-forward inputs may be asked for.
    captures: bool = False
    # Torch: the device as torch calls it; "cpu" emulates one by the threads.
    device: str = "cpu"
