"""Sums of down rows against float64 and, bit for bit, float32 numpy.

Run: pytest tests/shared/kernels/feed_forward/test_down_rows.py
"""

from dataclasses import dataclass

import numpy as np
import pytest

from warmfront.shared.kernels.feed_forward.down_rows import AHEAD_AT, FACTORS_AT, LIST_BYTES, add_down_rows
from warmfront.shared.machine.memory import address
from warmfront.shared.model.formats import Kind, join_nibbles, pack, unpack

UNIT = 2.0**-24
PAGE = 4096
# Odd and even numbers of blocks: none, some or all of them are taken four at a time.
WIDTHS = [32, 96, 128, 160, 288]


@dataclass
class Group:
    """32 packed rows at an odd address and a tail, surrounded by NaN; `numbers` are what the rows say by themselves."""

    kind: Kind
    cols: int
    rows: list[int]
    tail: int
    numbers: np.ndarray
    scales: np.ndarray
    memory: np.ndarray

    @classmethod
    def random(cls, kind: Kind, cols: int) -> "Group":
        rng = np.random.default_rng(cols + int(kind))
        scales = np.array([[1.0], [0.0]]).repeat(cols, 1).astype(np.float32)
        tail = np.zeros(0, np.uint8)
        if kind == Kind.Q4C:
            numbers = rng.integers(0, 16, (32, cols)).astype(np.float32)
            packed = join_nibbles(numbers.astype(np.uint8).reshape(32, -1, 32)).reshape(32, -1)
            halves = rng.normal(0, 0.05, (2, cols)).astype(np.float16)
            scales, tail = halves.astype(np.float32), halves.view(np.uint8).reshape(-1)
        else:
            packed = pack(rng.standard_normal((32, cols)).astype(np.float32), kind)
            numbers = unpack(packed, kind, cols)
        # Not one behind the other: each between NaNs of every type.
        stride = packed.shape[1] + 64
        memory = np.full(1 + 33 * stride + tail.size + 64, 0xFF, np.uint8)
        starts = [1 + 64 + stride * i for i in range(32)]
        for start, row in zip(starts, packed, strict=True):
            memory[start : start + row.size] = row
        at = 1 + 33 * stride
        memory[at : at + tail.size] = tail
        base = address(memory)
        return cls(kind, cols, [base + start for start in starts], base + at, numbers, scales, memory)

    def add(self, picked: np.ndarray, factors: np.ndarray, start: np.ndarray, ahead: list[int]) -> np.ndarray:
        """The sums, after a check that nothing behind them or behind the scratch memory was written."""
        count, size = len(picked), LIST_BYTES + 4 * self.cols
        listed = np.full(size + 64, 0xFF, np.uint8)
        listed[: 8 * count].view(np.int64)[:] = [self.rows[i] for i in picked]
        listed[AHEAD_AT : AHEAD_AT + 8 * count].view(np.int64)[:] = ahead
        listed[FACTORS_AT : FACTORS_AT + 4 * count].view(np.float32)[:] = factors
        listed[FACTORS_AT + 128 : FACTORS_AT + 132].view(np.float32)[0] = np.cumsum(factors, dtype=np.float32)[-1]
        sums = np.full(self.cols + 16, 77, np.int64)
        inner = sums[8:-8]
        inner[:] = start
        add_down_rows(int(self.kind), address(listed), count, self.tail, address(inner), self.cols)
        assert (listed[size:] == 0xFF).all()
        assert (sums[:8] == 77).all()
        assert (sums[-8:] == 77).all()
        return inner.copy()

    def expect(self, picked: np.ndarray, factors: np.ndarray) -> np.ndarray:
        """In float64."""
        weights = self.numbers[picked].astype(np.float64) * self.scales[0] + self.scales[1]
        return np.asarray(factors.astype(np.float64) @ weights)


def drawn(count: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Rows in ascending order, and factors that carry 1 / unit."""
    rng = np.random.default_rng(100 * count + seed)
    picked = np.sort(rng.permutation(32)[:count])
    return picked, (rng.standard_normal(count) / UNIT).astype(np.float32)


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 8, 31, 32])
@pytest.mark.parametrize("kind", list(Kind))
def test_sums(kind: Kind, count: int) -> None:
    for cols in WIDTHS:
        group = Group.random(kind, cols)
        picked, factors = drawn(count)
        start = np.random.default_rng(cols).integers(-(1 << 40), 1 << 40, cols)
        got = group.add(picked, factors, start, [0] * count)
        expected = group.expect(picked, factors)
        scale = np.abs(group.numbers[picked] * group.scales[0]).max() * np.abs(factors).sum()
        np.testing.assert_allclose((got - start) * UNIT, expected * UNIT, rtol=0, atol=(3e-7 * scale + 1) * UNIT)


def chain(weights: np.ndarray, factors: np.ndarray, product: type[np.floating]) -> np.ndarray:
    """The rows added in order in float32, each product in a type that holds it exactly, or not."""
    total = np.zeros(weights.shape[1], np.float32)
    for row, factor in zip(weights, factors, strict=True):
        total = (total.astype(product) + row.astype(product) * product(factor)).astype(np.float32)
    return total


@pytest.mark.skipif(np.finfo(np.longdouble).nmant < 63, reason="long double is no longer than double here")
@pytest.mark.parametrize("count", [1, 3, 4, 5, 8, 32])
@pytest.mark.parametrize("kind", [kind for kind in Kind if kind != Kind.Q4C])
def test_rows_are_added_in_order_one_multiply_add_each(kind: Kind, count: int) -> None:
    """Bit for bit, however the kernel cuts list and columns; with one rounding, or two where the CPU fuses nothing."""
    ways = set()
    for cols in WIDTHS:
        group = Group.random(kind, cols)
        picked, factors = drawn(count)
        got = group.add(picked, factors, np.zeros(cols, np.int64), [0] * count)
        for product in (np.longdouble, np.float32):
            total = chain(group.numbers[picked], factors, product)
            # Where a float has fractions they are rounded off, or cut off.
            if (np.abs(got - total.astype(np.float64)) < 1).all():
                ways.add((cols, product))
    assert any({cols for cols, way in ways if way is product} == set(WIDTHS) for product in (np.longdouble, np.float32))


@pytest.mark.parametrize("kind", list(Kind))
def test_what_the_sums_were_before_changes_nothing(kind: Kind) -> None:
    """What a group adds is the same integer whatever is there already, negative, or near what a sum can hold."""
    group = Group.random(kind, 160)
    picked, factors = drawn(13)
    alone = group.add(picked, factors, np.zeros(160, np.int64), [0] * 13)
    for start in (1, -1, 1 << 52, -(1 << 61), (1 << 61) + 12345):
        assert (group.add(picked, factors, np.full(160, start), [0] * 13) - start == alone).all()


@pytest.mark.parametrize("kind", list(Kind))
def test_fetching_meanwhile_changes_nothing(kind: Kind) -> None:
    """Not the result, and addresses where nothing is do not fault."""
    group = Group.random(kind, 288)
    picked, factors = drawn(7)
    start = np.zeros(288, np.int64)
    results = {group.add(picked, factors, start, [at] * 7).tobytes() for at in (group.rows[0], 0, PAGE, -PAGE)}
    assert len(results) == 1
