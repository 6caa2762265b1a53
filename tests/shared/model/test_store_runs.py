"""Groups that are read together.  pytest tests/shared/model/test_store_runs.py"""

import numpy as np
import pytest

from warmfront.shared.model.store import run_of


@pytest.mark.parametrize(
    ("places", "run"),
    [
        ([(0, 0)], 1),
        ([(0, 0), (0, 1), (0, 2)], 3),
        ([(3, 5), (3, 6), (3, 8), (3, 9)], 2),
        ([(0, 2), (1, 3)], 1),
        ([(0, 2), (1, 0), (1, 1)], 1),
        ([(0, 1), (0, 1)], 1),
        ([(0, 1), (0, 0)], 1),
    ],
)
def test_run_of(places: list[tuple[int, int]], run: int) -> None:
    assert run_of(np.array(places, np.int64)) == run


def test_runs_read_all_places_in_order() -> None:
    """Cutting any ordered set of places into runs gives each place once."""
    rng = np.random.default_rng(0)
    for _ in range(100):
        places = np.argwhere(rng.random((3, 12)) < 0.7)
        at, read = 0, []
        while at < len(places):
            layer, group = places[at]
            count = run_of(places[at : at + 5])
            assert 1 <= count <= 5
            read += [(layer, group + i) for i in range(count)]
            at += count
        assert read == [tuple(place) for place in places]
