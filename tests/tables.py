"""What holds of the ownership tables between any two jobs: used by its own tests and by those with real workers."""

from collections.abc import Mapping
from typing import Any

import numpy as np

__all__ = ["assert_tables_hold"]


def assert_tables_hold(ownership: Any, slots: Mapping[str, int]) -> None:
    """No slot is used twice and none is lost, every owner holds its groups, every group has one home.

    `slots`: of each worker that takes part.
    """
    board, resident, homes = ownership._board, ownership.resident, ownership.is_home
    owner = board.owner.astype(np.intp)
    assert np.take_along_axis(resident, owner[None], 0).all(), "an owner does not hold its group"
    assert (resident[homes].sum(0) == 1).all(), "a group has no home, or two"
    np.testing.assert_array_equal(resident[homes].argmax(0), ownership.home)
    in_flight = np.zeros_like(resident)
    for worker, name in enumerate(ownership.names):
        used = board.slot[worker][resident[worker]].tolist()
        for batch in ownership._batches.values():
            if batch.worker == worker:
                layers, groups, places = batch.places.T
                assert not in_flight[worker, layers, groups].any(), "a group comes twice"
                in_flight[worker, layers, groups] = True
                used += places.tolist()
        assert sorted([*used, *ownership._free[worker]]) == list(range(slots.get(name, 0))), name
    np.testing.assert_array_equal(ownership._in_flight, in_flight)
    assert not (in_flight & resident).any(), "a group comes to where it is"
    unfired = ownership._unfired
    assert resident[tuple(unfired.T)].all()
    assert not homes[unfired[:, 0]].any()
    assert len(np.unique(unfired, axis=0)) == len(unfired)
