"""Homes of all groups, and what a GPU gets first.  pytest tests/coordinator/placement/test_homes.py"""

import numpy as np
import pytest

from warmfront.coordinator.placement.homes import bytes_by_node, first_groups, most_active, place_homes, whole_layers
from warmfront.shared.machine.core_plan import CorePlan, WorkerCores


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
    home = place_homes(np.ones((3, groups)), threads)
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


def test_a_gpu_begins_with_what_is_read_most() -> None:
    load = np.array([[1.0, 5.0, 2.0], [2.0, 0.0, 2.0]])
    # Of equals the first groups of all layers.
    np.testing.assert_array_equal(most_active(load, 3), [[0, 1, 1], [1, 0, 0]])


def test_whole_layers_are_the_first_ones_that_fit() -> None:
    np.testing.assert_array_equal(whole_layers((3, 4), 11).sum(1), [4, 4, 0])
    assert whole_layers((3, 4), 12).all()
    assert not whole_layers((3, 4), 3).any()


def test_all_slots_are_used() -> None:
    rng = np.random.default_rng(0)
    for _ in range(200):
        groups, layers = (int(n) for n in rng.integers(1, (20, 9)))
        slots = int(rng.integers(0, groups * layers + 1))
        assert np.count_nonzero(first_groups(groups, layers, slots)) == slots


def test_any_speeds_are_followed_in_every_layer() -> None:
    rng = np.random.default_rng(2)
    for _ in range(500):
        workers, groups, layers = (int(n) for n in rng.integers(1, (17, 400, 5)))
        speeds = (rng.uniform(0.01, 100, workers) ** rng.choice([0, 1])).tolist()
        home = place_homes(np.ones((layers, groups)), speeds)
        assert home.shape == (layers, groups), "each group has exactly one home"
        assert home.max() < workers
        assert (home == home[0]).all()
        exact = groups * np.array(speeds) / sum(speeds)
        assert np.abs(np.bincount(home[0], minlength=workers) - exact).max() <= 1
        hot = np.bincount(home[0, : groups // 2], minlength=workers)
        assert np.abs(hot - exact / 2).max() <= 2.5, "of the hot half, too"


@pytest.mark.parametrize("speeds", [[1, 1], [3, 1], [2, 1, 1]])
def test_every_worker_has_its_part_of_each_expert_and_of_the_load(speeds: list[float]) -> None:
    rng = np.random.default_rng(3)
    uses = np.stack([rng.permutation(1.0 / np.arange(1, 41)) for _ in range(4)])  # of 40 experts of 7 groups
    load = np.repeat(uses, 7, axis=1)
    home, shares = place_homes(load, speeds), np.array(speeds) / sum(speeds)
    by_expert = (home.reshape(4, 40, 7)[..., None] == np.arange(len(speeds))).sum(2)
    assert np.abs(by_expert - 7 * shares).max() <= 1.5
    for layer in range(4):
        loads = np.bincount(home[layer], load[layer])
        # Off by a group of the most used one at most, of which there are some twenty by weight.
        assert np.abs(loads - load[layer].sum() * shares).max() <= load.max()


def test_bytes_of_each_node() -> None:
    home = place_homes(np.ones((2, 12)), [2, 1, 1])
    workers = (WorkerCores(0, (0, 1), 0), WorkerCores(1, (4,), 0), WorkerCores(2, (8,), 2))
    assert bytes_by_node(CorePlan(workers), home, 100, 1000) == {0: 1800 + 750, 2: 600 + 250}
    alone = CorePlan((WorkerCores(None, (0, 4)),))
    assert bytes_by_node(alone, np.zeros_like(home), 100, 1000) == {}
