"""The groups of a CPU worker that holds all that it is the home of: read once, each into a slot of its own."""

import time
from typing import Any

import numpy as np
import numpy.typing as npt

from warmfront.shared.kernels.feed_forward.bundles import arrange_group, bundles_at
from warmfront.shared.kernels.fetching import as_distances
from warmfront.shared.machine.memory import address, anonymous, collapse
from warmfront.shared.machine.numa import bind, ensure_free, free_on, pages_by_node
from warmfront.shared.model.store import PackedModel, run_of
from warmfront.shared.selector import Work, selector_of
from warmfront.shared.wire.messages import Assignment
from warmfront.shared.wire.worker_main import Places

__all__ = ["ResidentGroups"]


class ResidentGroups:
    """Slots of memory for every group whose home the worker is, in order of layer and group, and spare ones behind."""

    # To kernels: no cache (`cache_table.py`).
    record = 0

    def __init__(self, plan: Assignment, model: PackedModel, places: npt.NDArray[np.int64], slot: Any) -> None:
        """`places` [n, (layer, group)]: those groups; `slot` int32 [layers, groups]: the board's table of slots."""
        self._model, self._places, self._threads, self.slot = model, places, len(plan.cpus), slot
        size = model.layout.group_bytes
        self._weights = anonymous(max(1, len(places) + plan.spare_slots) * size, huge=True)
        self._spare = plan.spare_slots
        if plan.memory_node >= 0 and bind(self._weights, plan.memory_node):
            # What the node cannot hold is refused, and there are only as many spare slots as fit.
            ensure_free(plan.memory_node, len(places) * size)
            self._spare = min(self._spare, free_on(plan.memory_node) // size - len(places))
        work = selector_of(plan.selector).work
        self.bundles = bundles_at(
            address(self._weights),
            model.layout,
            model.spec.architecture.feed_forward,
            work is Work.DENSE,
            as_distances(plan.distances),
            work is Work.GATES,
        )
        self._loaded = [0] * self._threads

    def fill(self, rank: int) -> None:
        """Read a thread's share of the groups, a run of neighbours at a time.

        A thread writes the memory that it will mostly read, so that pages lie near its core.
        """
        count, threads = len(self._places), self._threads
        low, high = count * rank // threads, count * (rank + 1) // threads
        size = self._model.layout.group_bytes
        since = low
        while low < high:
            layer, group = self._places[low].tolist()
            run = run_of(self._places[low:high])
            # What has no weights takes no memory: it is never touched.
            have = min(run, max(self._model.groups[layer] - group, 0))
            out = self._weights[low * size : (low + have) * size]
            self._model.read_groups(layer, group, out.reshape(have, size))
            self._arrange(out)
            self._loaded[rank] += run * size
            if have < run:
                collapse(self._weights[since * size : (low + have) * size])
                since = low + run
            low += run
        collapse(self._weights[since * size : high * size])

    def _arrange(self, groups: npt.NDArray[np.uint8]) -> None:
        """Lay groups that have been read out as they are computed."""
        for at in range(0, groups.nbytes, self._model.layout.group_bytes):
            arrange_group(self.bundles, address(groups) + at)

    def move(self, places: Places) -> int:
        """Read groups into slots; returns the ns of work that it took. Nobody computes with them yet."""
        size, started = self._model.layout.group_bytes, time.thread_time_ns()
        for layer, group, slot in places.tolist():
            out = self._weights[slot * size : (slot + 1) * size]
            self._model.read_groups(layer, group, out.reshape(1, size))
            self._arrange(out)
        return time.thread_time_ns() - started

    def progress(self) -> tuple[int, int]:
        """Bytes loaded, of how many."""
        return sum(self._loaded), len(self._places) * self._model.layout.group_bytes

    def capacity(self) -> tuple[int, dict[str, int]]:
        """Slots: those of the homes and the spare ones; bytes of the homes by NUMA node."""
        size = len(self._places) * self._model.layout.group_bytes
        pages = pages_by_node(self._weights[:size])
        found = max(1, sum(pages.values()))
        return len(self._places) + self._spare, {f"node{n}": size * count // found for n, count in pages.items()}

    def counters(self) -> list[int]:
        """What a cache counted: nothing."""
        return []

    def check(self) -> None:
        """Raise what went wrong while serving: nothing is read then."""

    def stop(self) -> None:
        """Nothing runs."""
