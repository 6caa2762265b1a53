"""Homes of all groups, and what a GPU gets first.  pytest tests/coordinator/test_placement.py"""

import numpy as np
import pytest

from warmfront.coordinator.placement import first_groups, place_homes


@pytest.mark.parametrize(
    ("groups", "threads", "expected"),
    [
        (10, [1], [10]),
        (10, [1, 1], [5, 5]),
        (9, [2, 1], [6, 3]),
        (12, [1, 2, 3], [2, 4, 6]),
        (100, [8, 7], [53, 47]),
        (1, [1, 1], None),
        (2, [4, 4, 4], None),
        (48, [7, 3, 5, 9], None),
    ],
)
def test_homes_follow_the_threads(groups: int, threads: list[int], expected: list[int] | None) -> None:
    home = place_homes(groups, 3, threads)
    assert home.shape == (3, groups)
    assert home.dtype == np.uint8
    for row in home:
        for part in (row[: groups // 2], row[: groups // 4]):  # the hot ones, too
            for index, share in enumerate(threads):
                assert abs(np.count_nonzero(part == index) - len(part) * share / sum(threads)) <= 1.5
        have = np.bincount(row, minlength=len(threads)).tolist()
        assert expected is None or have == expected
        for count, share in zip(have, threads, strict=True):
            assert abs(count - groups * share / sum(threads)) <= 1


@pytest.mark.parametrize(
    ("slots", "expected"),
    [(0, [0, 0, 0]), (1, [1, 0, 0]), (3, [1, 1, 1]), (5, [2, 2, 1]), (29, [10, 10, 9]), (30, [10, 10, 10])],
)
def test_a_gpu_begins_with_the_first_groups_of_every_layer(slots: int, expected: list[int]) -> None:
    first = first_groups(10, 3, slots)
    assert first.shape == (3, 10)
    assert first.dtype == bool
    for row, count in zip(first, expected, strict=True):
        assert np.flatnonzero(row).tolist() == list(range(count))


def test_all_slots_are_used() -> None:
    rng = np.random.default_rng(0)
    for _ in range(200):
        groups, layers = (int(n) for n in rng.integers(1, (20, 9)))
        slots = int(rng.integers(0, groups * layers + 1))
        assert np.count_nonzero(first_groups(groups, layers, slots)) == slots
