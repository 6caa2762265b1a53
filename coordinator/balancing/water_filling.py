"""Even loads: how much each worker takes of a layer so that all finish together, and which groups make that up.

W workers, L layers, G groups. Minimising the longest of the times a + b * load over all splits of a total is water
filling: raise one common level of time until the vessels (workers, each starting at its a and widening by 1 / b) hold
the total.
"""

from typing import Any

import numpy as np

from warmfront.coordinator.balancing.interface import Bools, Floats, Reals
from warmfront.shared.kernels.jit import kernel

__all__ = ["even_loads", "job_ns", "select_heaviest"]

# Halvings of the threshold between light and heavy: then equal weights are all that is left between, of doubles too.
_HALVINGS = 52


def job_ns(costs: Floats, loads: Floats) -> Floats:
    """ns [W, L] of jobs that read `loads` [W, L] bytes: a + b * load, under `costs` [W, 2]."""
    return costs[:, :1] + costs[:, 1:] * loads


def even_loads(costs: Floats, total: Floats, caps: Floats | None = None, extra_ns: Floats | float = 0.0) -> Floats:
    """Bytes [W, L]: of all loads of sum `total` [L] those whose longest job is shortest.

    All workers that hold some finish at once, but for those that are full to their `caps` [W, L]. A worker whose job
    alone takes longer holds nothing. What all caps together do not hold is left out. `extra_ns` [W, L] counts into each
    worker's time.
    """
    shape = len(costs), len(total)
    room = np.minimum(total, np.inf if caps is None else caps)
    # Arrays of one kind, whatever is broadcast: for each other kind it would be compiled once more.
    loads, start, limit = np.empty(shape), np.empty(shape), np.empty(shape)
    start[:], limit[:] = costs[:, :1] + extra_ns, room
    _pour(start, costs[:, 1].copy(), total, limit, loads)
    return loads


@kernel
def _pour(start: Floats, widen: Floats, total: Floats, room: Floats, loads: Floats) -> None:
    """Fill `loads` [W, L]: worker w begins at `start` [W, L], holds level / `widen` [W] above, up to `room` [W, L]."""
    workers, layers = room.shape
    for layer in range(layers):
        # Solved exactly: what is held is a function of the level that is linear between the 2 W levels at which a
        # worker starts to fill or is full. Find the two around the total.
        low = high = below = above = 0.0
        has_low = has_high = False
        for mark in range(2 * workers):
            worker = mark // 2
            level = start[worker, layer] + (widen[worker] * room[worker, layer] if mark % 2 else 0.0)
            held = 0.0
            for other in range(workers):
                held += min(max((level - start[other, layer]) / widen[other], 0.0), room[other, layer])
            if held < total[layer]:
                if not has_low or level > low:
                    low, below, has_low = level, held, True
            elif not has_high or level < high:
                high, above, has_high = level, held, True
        # With room for less than the total all are full at the highest level; without a total none holds anything at
        # the lowest.
        level = high if has_high else low
        if has_low and has_high and above > below:
            level = low + (total[layer] - below) / (above - below) * (high - low)
        for worker in range(workers):
            loads[worker, layer] = min(max((level - start[worker, layer]) / widen[worker], 0.0), room[worker, layer])


def select_heaviest(weights: Reals, limit: Floats, allowed: Bools) -> Bools:
    """bool [L, G]: of those `allowed` [L, G], in each layer the heaviest that together come nearest to `limit` [L].

    Among equal ones the first. `weights` [L, G] are not negative.
    """
    taken = np.zeros(allowed.shape, np.bool_)
    _select(np.asarray(weights, np.float64), limit, np.asarray(allowed), taken)
    return taken


@kernel
def _select(weights: Floats, limit: Floats, allowed: Any, taken: Any) -> None:
    layers, groups = allowed.shape
    ours = np.empty(groups)
    for layer in range(layers):
        top = 0.0
        for group in range(groups):
            ours[group] = weights[layer, group] if allowed[layer, group] else -1.0
            top = max(top, ours[group])
        # Above `high` all fit, down to `low` they do not. Without sorting: that took most of a decision's time.
        low, high = -1e-300, top
        for _ in range(_HALVINGS):
            middle = (low + high) / 2
            total = 0.0
            for group in range(groups):
                total += ours[group] if ours[group] > middle else 0.0
            if total <= limit[layer]:
                high = middle
            else:
                low = middle
        high = max(high, 0.0)
        total = 0.0
        for group in range(groups):
            if ours[group] > high:
                taken[layer, group] = True
                total += ours[group]
        for group in range(groups):
            # The last one is taken if more than half of it fits: rounding to the nearest, so that no layer is off by a
            # group.
            if low < ours[group] <= high and total + ours[group] / 2 < limit[layer]:
                taken[layer, group] = True
                total += ours[group]
