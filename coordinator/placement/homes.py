"""Which CPU worker keeps each group of neurons, and which groups a GPU starts with."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from warmfront.shared.machine.core_plan import CorePlan

__all__ = ["bytes_by_node", "first_groups", "most_active", "place_homes", "whole_layers"]


def place_homes(load: npt.NDArray[np.float64], speeds: Sequence[float]) -> npt.NDArray[np.uint8]:
    """The home of each group, uint8 [layers, groups]: every layer is dealt to the CPU workers by their `speeds`.

    Dealt, not sliced, in order of the expected `load` [layers, groups]: with slices the first worker had all the hot
    ones. The groups of an expert, which are used together, follow each other there, so every worker gets its part of
    each expert: whichever experts a token chooses, all workers have their share of it.
    """
    layers, groups = load.shape
    # Rounded sums, not rounded shares: these add up to `groups`. Then each worker's groups are spread evenly.
    shares = np.diff(np.rint(groups * np.cumsum([0, *speeds]) / sum(speeds)).astype(int))
    turns = np.concatenate([(np.arange(share) + 0.5) / share for share in shares if share])
    workers = np.repeat(np.arange(len(speeds), dtype=np.uint8), shares)[np.argsort(turns, kind="stable")]
    home = np.empty((layers, groups), np.uint8)
    np.put_along_axis(home, np.argsort(-load, axis=1, kind="stable"), workers[None], 1)
    return home


def bytes_by_node(cores: CorePlan, home: npt.NDArray[np.uint8], group_bytes: int, other_bytes: int) -> dict[int, int]:
    """Bytes that are bound to each NUMA node: its workers' groups, and its threads' part of the `other_bytes`."""
    groups = np.bincount(home.ravel(), minlength=len(cores.workers)).tolist()
    team = [cores.memory_of(cpu) for cpu in cores.coordinator]
    return {
        node: sum(count for count, worker in zip(groups, cores.workers, strict=True) if worker.memory == node)
        * group_bytes
        + other_bytes * team.count(node) // len(team)
        for node in cores.memory_nodes
    }


def most_active(expected_load: npt.NDArray[np.float64], count: int) -> npt.NDArray[np.bool_]:
    """The `count` groups with the largest `expected_load`, bool [layers, groups].

    Among equals those with the lowest numbers, of all layers: without a profile every layer gets the same share.
    """
    layer, group = np.indices(expected_load.shape)
    best = np.lexsort((layer.ravel(), group.ravel(), -expected_load.ravel()))[:count]
    chosen = np.zeros(expected_load.size, bool)
    chosen[best] = True
    return chosen.reshape(expected_load.shape)


def first_groups(groups: int, layers: int, slots: int) -> npt.NDArray[np.bool_]:
    """The first groups of every layer, bool [layers, groups], together `slots`; the first layers get one more."""
    counts = np.array([slots // layers + (layer < slots % layers) for layer in range(layers)])
    return np.arange(groups) < counts[:, None]


def whole_layers(shape: tuple[int, ...], slots: int) -> npt.NDArray[np.bool_]:
    """All groups of as many layers, the first ones, as fit: bool [layers, groups]."""
    layers, groups = shape
    return np.tile(np.arange(layers)[:, None] < slots // groups, (1, groups))
