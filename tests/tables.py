"""What holds of a front's tables between any two jobs: used by its own tests and by those with real workers."""

from collections.abc import Mapping
from typing import Any

import numpy as np

__all__ = ["assert_tables_hold"]


def assert_tables_hold(front: Any, slots: Mapping[str, int]) -> None:
    """No slot is used twice and none is lost, every owner holds its groups, every group has one home.

    `slots`: of each worker that takes part.
    """
    board, resident, homes = front._board, front.resident, front.homes
    owner = board.owner.astype(np.intp)
    assert np.take_along_axis(resident, owner[None], 0).all(), "an owner does not hold its group"
    assert (resident[homes].sum(0) == 1).all(), "a group has no home, or two"
    np.testing.assert_array_equal(resident[homes].argmax(0), front.home)
    coming = np.zeros_like(resident)
    for worker, name in enumerate(front.names):
        used = board.slot[worker][resident[worker]].tolist()
        for batch in front._batches.values():
            if batch.worker == worker:
                layers, groups, places = batch.places.T
                assert not coming[worker, layers, groups].any(), "a group comes twice"
                coming[worker, layers, groups] = True
                used += places.tolist()
        assert sorted([*used, *front._free[worker]]) == list(range(slots.get(name, 0))), name
    np.testing.assert_array_equal(front._coming, coming)
    assert not (coming & resident).any(), "a group comes to where it is"
    assert not (front._fresh & ~resident).any()
    assert not front._fresh[homes].any()
