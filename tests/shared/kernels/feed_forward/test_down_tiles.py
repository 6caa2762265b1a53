"""Down rows in tiles against float64 numpy.  pytest tests/shared/kernels/feed_forward/test_down_tiles.py"""

import numpy as np
import pytest

from warmfront.shared.kernels.feed_forward.down_tiles import (
    add_down_tile,
    add_down_tiles,
    down_in_bytes,
    down_in_tiles,
    interleave_down,
)
from warmfront.shared.kernels.gemm import Panels
from warmfront.shared.kernels.prefill.byte_panels import PANEL_BLOCK
from warmfront.shared.kernels.prefill.down_bytes import (
    DownRows,
    add_down_bytes,
    add_strips,
    quantise_factors,
    widen_neuron_scales,
)
from warmfront.shared.machine.memory import address
from warmfront.shared.model.formats import Kind, join_nibbles, pack, unpack

COLS, GROUPS, PADDING = 96, 3, 64
KINDS = [kind for kind in Kind if down_in_bytes(int(kind))]
# Sums are in units of 2^-40.
INVERSE = np.float32(2.0**40)

pytestmark = pytest.mark.skipif(not KINDS, reason="no weight type is held in tiles: this CPU does not multiply bytes")


class Down:
    """The down rows of groups, as rows with bytes between them that are NaN in every type and as tiles."""

    def __init__(self, kind: Kind) -> None:
        rng = np.random.default_rng(int(kind))
        self.kind = kind
        if kind == Kind.Q4C:
            numbers = rng.integers(0, 16, (GROUPS * 32, COLS // 32, 32), dtype=np.uint8)
            self.tails = rng.normal(0, 0.1, (GROUPS, 2, COLS)).astype(np.float16)
            scale, minimum = np.repeat(self.tails.astype(np.float64), 32, 0).swapaxes(0, 1)
            rows, self.values = join_nibbles(numbers), numbers.reshape(-1, COLS) * scale + minimum
        else:
            # Each row has a size of its own: no two scales are alike.
            size = np.exp(rng.normal(0, 1, (GROUPS * 32, 1)))
            rows = pack((size * rng.standard_normal((GROUPS * 32, COLS))).astype(np.float32), kind)
            self.tails, self.values = np.zeros((GROUPS, 0)), unpack(rows, kind, COLS).astype(np.float64)
        self.stride = rows.shape[1] + PADDING
        self.rows = np.full((GROUPS * 32, self.stride), 0xFF, np.uint8)
        self.rows[:, : rows.shape[1]] = rows
        # Tiles and, some bytes behind them, tails, as in a group.
        self.tail = 32 * rows.shape[1] + PADDING
        self.memory = np.full((GROUPS, self.tail + self.tails[0].nbytes), 0xFF, np.uint8)
        self.memory[:, self.tail :] = self.tails.reshape(GROUPS, -1).view(np.uint8)
        self.tiles = self.memory[:, : self.tail]
        for group, tile in enumerate(self.tiles):
            interleave_down(kind, self.rows[32 * group :].reshape(-1), self.stride, COLS, address(tile))
        assert (self.tiles[:, -PADDING:] == 0xFF).all()

    def place(self, group: int, tiled: bool) -> DownRows:
        at, stride = (self.tiles[group], 0) if tiled else (self.rows[32 * group :], self.stride)
        return DownRows(int(self.kind), address(at), stride, address(self.tails[group]), COLS)

    def of_one(self, group: int, factors: np.ndarray) -> np.ndarray:
        """What `add_down_tile` adds for float32 [32] factors, in float64."""
        scaled, sums = factors * INVERSE, np.full(COLS + 2, 7, np.int64)
        factors, out = Panels(address(scaled), 0, 1), Panels(address(sums[1:]), 0, 1)
        add_down_tile(int(self.kind), address(self.memory[group]), self.tail, factors, out, COLS, 0)
        assert sums[0] == sums[-1] == 7
        return (sums[1:-1] - 7) / np.float64(INVERSE)

    def of_two(self, factors: np.ndarray, at_once: bool) -> np.ndarray:
        """The int64 sums [tokens, COLS] of the first and the last group, for float32 [2, tokens, 32] factors."""
        tokens, kind, scaled = factors.shape[1], int(self.kind), factors * INVERSE
        sums = np.full((tokens, COLS + 2), 7, np.int64)
        out = Panels(address(sums) + 8, 8 * (COLS + 2), tokens)
        parts = [Panels(address(each), 4 * 32, tokens) for each in scaled]
        first, last = address(self.memory[0]), address(self.memory[-1])
        if at_once:
            add_down_tiles(kind, (first, last), self.tail, parts[0], out, COLS, 4096)
        else:
            add_down_tile(kind, last, self.tail, parts[1], out, COLS, 0)
            add_down_tile(kind, first, self.tail, parts[0], out, COLS, 0)
        assert (sums[:, [0, -1]] == 7).all()
        return sums[:, 1:-1]

    def of_several(self, factors: np.ndarray, tiled: bool) -> np.ndarray:
        """The int64 sums [tokens, COLS] of all groups, for float32 [tokens, groups, 32] factors."""
        kind, count = int(self.kind), -(-len(factors) // 16)
        padded = np.full((count * 16, GROUPS, 32), np.nan, np.float32)
        padded[: len(factors)] = factors
        panels = np.ascontiguousarray(padded.reshape(count, 16, GROUPS, 32).transpose(2, 0, 3, 1))
        inverse = np.full(count * 16, INVERSE, np.float32)
        scales, blocks = np.zeros((2, 32), np.float32), np.zeros((GROUPS, count, PANEL_BLOCK), np.uint8)
        strips, ones = np.full((COLS // 32, count * 16 + 16, 32), 7, np.int64), np.ones(32, np.float32)
        places = np.random.default_rng(count).permutation(strips.shape[1])[: len(factors)].astype(np.int32)
        for block, strip in enumerate(strips):
            for group in range(GROUPS):
                rows = self.place(group, tiled)
                if self.kind != Kind.Q4C:
                    widen_neuron_scales(rows, block, address(scales))
                scales_at = address(ones if self.kind == Kind.Q4C else scales)
                own = address(blocks[group])
                quantise_factors(kind, address(panels[group]), address(inverse), scales_at, count, own)
                add_down_bytes(rows, block, own, address(places), len(factors), address(strip))
        others = np.delete(strips, places, 1)
        assert (others == 7).all()
        return (strips[:, places] - 7).transpose(1, 0, 2).reshape(-1, COLS)


@pytest.fixture(scope="module", params=KINDS, ids=str)
def down(request: pytest.FixtureRequest) -> Down:
    return Down(request.param)


@pytest.fixture(scope="module", params=[kind for kind in Kind if down_in_tiles(int(kind))], ids=str)
def any_down(request: pytest.FixtureRequest) -> Down:
    """Of a type that single tokens take from tiles: on every CPU those of floats."""
    return Down(request.param)


def factors_of(tokens: int) -> np.ndarray:
    return np.random.default_rng(tokens).standard_normal((tokens, GROUPS, 32)).astype(np.float32)


def test_one_token(down: Down) -> None:
    for group in range(GROUPS):
        values = down.values[32 * group : 32 * group + 32]
        for factors in (factors_of(1)[0, group], np.eye(32, dtype=np.float32)[5], np.zeros(32, np.float32)):
            expected = factors.astype(np.float64) @ values
            size = np.abs(factors.astype(np.float64)) @ np.abs(values)
            # The factors have 15 bits of the largest of them times its scale.
            np.testing.assert_allclose(down.of_one(group, factors), expected, rtol=0, atol=1e-3 * size.max() + 1e-9)


@pytest.mark.parametrize("tokens", [1, 3])
def test_two_groups_at_once_are_one_after_the_other(any_down: Down, tokens: int) -> None:
    factors = np.random.default_rng(tokens).standard_normal((2, tokens, 32)).astype(np.float32)
    np.testing.assert_array_equal(any_down.of_two(factors, True), any_down.of_two(factors, False))


@pytest.mark.parametrize("tokens", [1, 2, 15, 16, 17, 33, 70])
def test_several_tokens(down: Down, tokens: int) -> None:
    factors = factors_of(tokens)
    expected = factors.reshape(tokens, -1).astype(np.float64) @ down.values
    sums = down.of_several(factors, True)
    np.testing.assert_allclose(sums / np.float64(INVERSE), expected, rtol=0, atol=2e-2 * np.abs(expected).max())
    # From rows the same, to the bit.
    np.testing.assert_array_equal(down.of_several(factors, False), sums)


def test_a_token_is_the_same_among_others(down: Down) -> None:
    """To the bit, in whatever company and at whatever place; also beside one that is not finite."""
    factors = factors_of(70)
    together = down.of_several(factors, True)
    for some in (slice(0, 1), slice(5, 21), slice(16, 49), slice(3, 70)):
        np.testing.assert_array_equal(down.of_several(factors[some], True), together[some])
    factors[[5, 17]] = np.nan
    others = np.delete(np.arange(70), [5, 17])
    np.testing.assert_array_equal(down.of_several(factors, True)[others], together[others])


def test_strips_become_panels() -> None:
    strips = np.random.default_rng(0).integers(-(1 << 60), 1 << 60, (COLS // 32, 48, 32))
    before = np.random.default_rng(1).integers(-(1 << 60), 1 << 60, (3, COLS, 16))
    sums = before.copy()
    add_strips(address(strips), 3, COLS, address(sums))
    tokens = strips.transpose(1, 0, 2).reshape(3, 16, COLS)
    np.testing.assert_array_equal(sums - before, tokens.transpose(0, 2, 1))
