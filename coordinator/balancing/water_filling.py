"""Even loads: how much each worker takes of a layer so that all finish together, and which groups make that up."""

import numpy as np

from warmfront.coordinator.balancing.interface import Bools, Floats, Ints

__all__ = ["fill", "level", "times"]


def times(costs: Floats, loads: Floats) -> Floats:
    """ns [W, L]: a + b * load of `loads` [W, L], bytes, under `costs` [W, 2]."""
    return costs[:, :1] + costs[:, 1:] * loads


def level(costs: Floats, total: Floats, caps: Floats | None = None, more: Floats | float = 0.0) -> Floats:
    """Bytes [W, L]: the loads, of sum `total` [L], whose longest time is least.

    Like water poured into vessels: all that hold some stand equally high, but for those full to their `caps` [W, L]; a
    worker whose job alone takes longer holds nothing. What all caps together do not hold is left out. `more` [W, L],
    ns, counts into each worker's time.
    """
    a, b = costs[:, :1] + more, costs[:, 1:]
    room = np.broadcast_to(total, (len(costs), len(total)))
    if caps is not None:
        room = np.minimum(room, caps)
    # What is held as a function of the height is linear between the heights where a vessel starts to fill or is full.
    heights = np.sort(np.concatenate((np.broadcast_to(a, room.shape), a + b * room)), axis=0)
    held = np.clip((heights[:, None] - a) / b, 0, room).sum(1)
    upper = np.clip((held < total).sum(0), 1, len(heights) - 1)[None]
    low, high = (np.take_along_axis(heights, at, 0) for at in (upper - 1, upper))
    below, above = (np.take_along_axis(held, at, 0) for at in (upper - 1, upper))
    share = (total - below) / np.where(above > below, above - below, 1.0)
    return np.asarray(np.clip((low + np.clip(share, 0, 1) * (high - low) - a) / b, 0, room))


def fill(weights: Floats, order: Ints, limit: Floats, allowed: Bools) -> Bools:
    """bool [L, G]: of those `allowed` [L, G], in each layer the heaviest that together come nearest to `limit` [L].

    `order`: argsort of -weights over the groups, which several calls can share.
    """
    heaviest = np.take_along_axis(np.where(allowed, weights, 0.0), order, 1)
    taken = np.cumsum(heaviest, axis=1) - heaviest / 2 < limit[:, None]
    result = np.empty_like(allowed)
    np.put_along_axis(result, order, taken, 1)
    return np.asarray(result & allowed)
