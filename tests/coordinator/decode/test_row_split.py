"""How rows are divided over the team's threads: none twice, none left out, and away from a thread that is slow."""

import numpy as np
import pytest

from warmfront.coordinator.decode.row_split import WHOLE, RowSplit, portion


def decode(shares: RowSplit, tokens: int, slowness: list[float], noise: float = 0.0) -> None:
    """Tokens whose threads take `slowness` ns for each of WHOLE parts."""
    random = np.random.default_rng(5)
    for _ in range(tokens):
        spent = np.diff(shares.cuts) * np.array(slowness) * (1 + noise * random.standard_normal(len(slowness)))
        shares.busy[:, 0] += spent.astype(np.int64)
        shares.token()


@pytest.mark.parametrize("threads", [1, 2, 3, 7])
def test_every_item_belongs_to_one_thread(threads: int) -> None:
    random = np.random.default_rng(threads)
    for _ in range(200):
        cuts = np.sort(np.concatenate(([0, WHOLE], random.integers(0, WHOLE + 1, threads - 1))))
        total, unit = int(random.integers(1, 5000)), int(random.choice([1, 8, 16]))
        ranges = [portion(cuts, total, unit, rank) for rank in range(threads)]
        assert [low for low, _ in ranges] == [0, *(high for _, high in ranges[:-1])]
        assert ranges[-1][1] == total
        assert all(low % unit == 0 and low <= high for low, high in ranges)


def test_portions_follow_the_cuts() -> None:
    cuts = np.array([0, WHOLE // 4, WHOLE])
    assert [portion(cuts, 1000, 8, rank) for rank in range(2)] == [(0, 248), (248, 1000)]


def test_rows_leave_a_slow_thread_and_come_back() -> None:
    shares = RowSplit(2, moves=True)
    assert shares.cuts.tolist() == [0, WHOLE // 2, WHOLE]
    decode(shares, 64, [3.0, 1.0])
    assert shares.cuts[1] / WHOLE == pytest.approx(0.25, abs=0.02)
    decode(shares, 64, [1.0, 1.0])
    assert shares.cuts.tolist() == [0, WHOLE // 2, WHOLE]


def test_of_several_threads_the_slow_one_gives() -> None:
    shares = RowSplit(4, moves=True)
    decode(shares, 64, [1.0, 1.0, 2.0, 1.0])
    assert np.diff(shares.cuts) / WHOLE == pytest.approx([2 / 7, 2 / 7, 1 / 7, 2 / 7], abs=0.02)


def test_noise_moves_nothing() -> None:
    shares = RowSplit(2, moves=True)
    decode(shares, 400, [1.0, 1.02], noise=0.03)
    assert shares.cuts.tolist() == [0, WHOLE // 2, WHOLE]


def test_a_thread_keeps_rows_to_be_measured_by() -> None:
    shares = RowSplit(2, moves=True)
    decode(shares, 64, [10_000.0, 1.0])
    assert 0.01 < shares.cuts[1] / WHOLE < 0.05


def test_what_is_frozen_stays() -> None:
    shares = RowSplit(2, moves=False)
    decode(shares, 64, [3.0, 1.0])
    assert shares.cuts.tolist() == [0, WHOLE // 2, WHOLE]
