"""Even loads: how much each worker takes of a layer so that all finish together, and which groups make that up.

W workers, L layers, G groups. Minimising the longest of the times a + b * load over all splits of a total is water
filling: raise one common level of time until the vessels (workers, each starting at its a and widening by 1 / b) hold
the total.
"""

import numpy as np

from warmfront.coordinator.balancing.interface import Bools, Floats, Ints

__all__ = ["even_loads", "job_ns", "select_heaviest"]


def job_ns(costs: Floats, loads: Floats) -> Floats:
    """ns [W, L] of jobs that read `loads` [W, L] bytes: a + b * load, under `costs` [W, 2]."""
    return costs[:, :1] + costs[:, 1:] * loads


def even_loads(costs: Floats, total: Floats, caps: Floats | None = None, extra_ns: Floats | float = 0.0) -> Floats:
    """Bytes [W, L]: of all loads of sum `total` [L] those whose longest job is shortest.

    All workers that hold some finish at once, but for those that are full to their `caps` [W, L]. A worker whose job
    alone takes longer holds nothing. What all caps together do not hold is left out. `extra_ns` [W, L] counts into each
    worker's time.
    """
    a, b = costs[:, :1] + extra_ns, costs[:, 1:]
    room = np.broadcast_to(total, (len(costs), len(total)))
    if caps is not None:
        room = np.minimum(room, caps)
    # Solved exactly and for all layers at once, without iterating: what is held is a function of the level that is
    # linear between the 2 W levels at which a worker starts to fill or is full. Find the two around the total.
    levels = np.sort(np.concatenate((np.broadcast_to(a, room.shape), a + b * room)), axis=0)
    held = np.clip((levels[:, None] - a) / b, 0, room).sum(1)
    upper = np.clip((held < total).sum(0), 1, len(levels) - 1)[None]
    low, high = (np.take_along_axis(levels, at, 0) for at in (upper - 1, upper))
    below, above = (np.take_along_axis(held, at, 0) for at in (upper - 1, upper))
    # Two equal levels hold equally much; any divisor but 0 will do. Beyond the caps the share exceeds 1.
    share = (total - below) / np.where(above > below, above - below, 1.0)
    return np.asarray(np.clip((low + np.clip(share, 0, 1) * (high - low) - a) / b, 0, room))


def select_heaviest(weights: Floats, order: Ints, limit: Floats, allowed: Bools) -> Bools:
    """bool [L, G]: of those `allowed` [L, G], in each layer the heaviest that together come nearest to `limit` [L].

    `order`: argsort of -weights over the groups, which several calls can share.
    """
    heaviest = np.take_along_axis(np.where(allowed, weights, 0.0), order, 1)
    # The last one is taken if more than half of it fits: rounding to the nearest, so that no layer is off by a group.
    taken = np.cumsum(heaviest, axis=1) - heaviest / 2 < limit[:, None]
    result = np.empty_like(allowed)
    np.put_along_axis(result, order, taken, 1)
    return np.asarray(result & allowed)
