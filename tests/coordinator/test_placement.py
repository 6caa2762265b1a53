"""Homes and owners of all groups.  pytest tests/coordinator/test_placement.py"""

import numpy as np
import pytest

from warmfront.coordinator.placement import place
from warmfront.shared.bundle import BundleLayout
from warmfront.shared.errors import UsageError
from warmfront.shared.weights import Kind

# A bundle: 3 rows of 64 float32, 768 bytes; a group: 24,576.
GROUP_BYTES = 24_576


def layout_of(groups: int) -> BundleLayout:
    layout = BundleLayout(hidden=64, ffn=groups * 32, gate_kind=Kind.F32, down_kind=Kind.F32)
    assert layout.group_bytes == GROUP_BYTES
    return layout


def counts(row: np.ndarray, workers: int) -> list[int]:
    return np.bincount(row, minlength=workers).tolist()


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
    home, owner = place(layout_of(groups), 3, threads, None)
    np.testing.assert_array_equal(home, owner)
    assert home.shape == (3, groups)
    assert home.dtype == np.uint8
    for row in home:
        assert (np.diff(row.astype(int)) >= 0).all(), "each worker has one slice"
        have = counts(row, len(threads))
        assert expected is None or have == expected
        for count, share in zip(have, threads, strict=True):
            assert abs(count - groups * share / sum(threads)) <= 1


@pytest.mark.parametrize(("slots", "expected"), [(1, [1, 0, 0]), (3, [1, 1, 1]), (5, [2, 2, 1]), (29, [10, 10, 9])])
def test_the_gpu_owns_the_first_groups_of_every_layer(slots: int, expected: list[int]) -> None:
    home, owner = place(layout_of(10), 3, [1, 1], slots * GROUP_BYTES + GROUP_BYTES - 1)
    np.testing.assert_array_equal(home, place(layout_of(10), 3, [1, 1], None).home)
    for layer, count in enumerate(expected):
        assert (owner[layer, :count] == 2).all()
        np.testing.assert_array_equal(owner[layer, count:], home[layer, count:])


@pytest.mark.parametrize("budget", [30, 31, 32, 1000])
def test_a_budget_for_more_than_the_model(budget: int) -> None:
    home, owner = place(layout_of(10), 3, [3], budget * GROUP_BYTES)
    assert (owner == 1).all()
    assert not home.any()


def test_the_budget_is_kept_and_used() -> None:
    rng = np.random.default_rng(0)
    for _ in range(200):
        groups, layers, budget = (int(n) for n in rng.integers(1, (20, 9, 60 * GROUP_BYTES)))
        if budget < GROUP_BYTES:
            continue
        owned = np.count_nonzero(place(layout_of(groups), layers, [2], budget).owner)
        assert owned * GROUP_BYTES <= budget
        assert owned == min(budget // GROUP_BYTES, groups * layers)


@pytest.mark.parametrize("budget", [0, 1, GROUP_BYTES - 1])
def test_a_budget_for_no_group(budget: int) -> None:
    with pytest.raises(
        UsageError,
        match=f"^a VRAM budget of {budget} bytes holds no group of neurons \\({GROUP_BYTES} bytes\\): [^\n]+$",
    ):
        place(layout_of(10), 3, [1], budget)
