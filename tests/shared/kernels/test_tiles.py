"""Matrices in tiles against float64 numpy.

Run: pytest tests/shared/kernels/test_tiles.py
"""

import numpy as np
import pytest

from warmfront.shared.kernels.byte_dot import quantise_batch, quantised_bytes
from warmfront.shared.kernels.gemm import Panels, Rows
from warmfront.shared.kernels.tiles import (
    TILE,
    in_tiles,
    interleave,
    multiply_tile,
    multiply_tiles,
    widen_tiled_row,
)
from warmfront.shared.machine.memory import address
from warmfront.shared.model.formats import Kind, pack, row_bytes, unpack

ROWS = 3 * TILE
WIDTHS = (32, 96, 544)
KINDS = [kind for kind in Kind if in_tiles(int(kind))]
# What an input of 15 bits loses.
QUANTISED = 1e-4

pytestmark = pytest.mark.skipif(not KINDS, reason="no weight type is held in tiles: this CPU does not multiply bytes")


class Tiles:
    """A random matrix in tiles, between bytes that are NaN in every type, and what it holds in float64."""

    def __init__(self, kind: Kind, cols: int) -> None:
        values = np.random.default_rng(int(kind) + cols).standard_normal((ROWS, cols)).astype(np.float32)
        packed = pack(values, kind)
        self.values = unpack(packed, kind, cols).astype(np.float64)
        self._memory = np.full(packed.nbytes + 128, 0xFF, np.uint8)
        self._memory[64:-64] = packed.reshape(-1)
        self.rows = Rows(int(kind), address(self._memory) + 64, row_bytes(kind, cols), cols)
        interleave(kind, self.rows.at, ROWS, cols)
        assert (self._memory[:64] == 0xFF).all()
        assert (self._memory[-64:] == 0xFF).all()

    def times(self, x: np.ndarray, ahead: int = 0, two: bool = False) -> np.ndarray:
        """The products [tokens, rows] with float32 [tokens, cols]; two: of the first and the last tile at once."""
        tokens, cols = x.shape
        quantised = np.full(tokens * quantised_bytes(cols), 0xFF, np.uint8)
        q_at, q_row = quantise_batch(address(x), address(quantised), cols, tokens)
        y = np.full((tokens, ROWS + 2), np.nan, np.float32)
        inputs, kind = Panels(q_at, q_row, tokens), self.rows.kind
        tiles = [self.rows.at + row * self.rows.stride for row in range(0, ROWS, TILE)]
        outs = [Panels(address(y) + 4 * (1 + row), 4 * (ROWS + 2), tokens) for row in range(0, ROWS, TILE)]
        if two:
            multiply_tiles(kind, (tiles[0], tiles.pop()), cols, inputs, outs[0], outs.pop().at, ahead)
            del tiles[0], outs[0]
        for tile, out in zip(tiles, outs, strict=True):
            multiply_tile(kind, tile, cols, inputs, out, ahead)
        assert np.isnan(y[:, [0, -1]]).all()
        return y[:, 1:-1]


@pytest.fixture(scope="module", params=[(kind, cols) for kind in KINDS for cols in WIDTHS], ids=str)
def tiles(request: pytest.FixtureRequest) -> Tiles:
    return Tiles(*request.param)


def test_one_input(tiles: Tiles) -> None:
    x = np.random.default_rng(1).standard_normal((1, tiles.rows.cols)).astype(np.float32)
    expected = x.astype(np.float64) @ tiles.values.T
    np.testing.assert_allclose(tiles.times(x), expected, rtol=QUANTISED, atol=QUANTISED * np.abs(expected).max())


def test_whole_numbers_are_exact(tiles: Tiles) -> None:
    """An input that 15 bits hold loses nothing: what is left is a float32 sum, of the scales of both."""
    x = np.random.default_rng(2).integers(-100, 100, (1, tiles.rows.cols)).astype(np.float32)
    x[:, ::32] = 127  # the largest of each block: a step is then 2^-7, and whole numbers are multiples of it
    expected = x.astype(np.float64) @ tiles.values.T
    size = np.abs(x.astype(np.float64)) @ np.abs(tiles.values.T)
    assert (np.abs(tiles.times(x) - expected) <= 2e-6 * size).all()


def test_fetching_ahead_changes_no_bit(tiles: Tiles) -> None:
    x = np.random.default_rng(3).standard_normal((1, tiles.rows.cols)).astype(np.float32)
    for ahead in (1, 4096, -(1 << 40)):
        np.testing.assert_array_equal(tiles.times(x), tiles.times(x, ahead))


@pytest.mark.parametrize("tokens", [1, 3])
def test_two_tiles_at_once_are_one_after_the_other(tiles: Tiles, tokens: int) -> None:
    x = np.random.default_rng(4).standard_normal((tokens, tiles.rows.cols)).astype(np.float32)
    np.testing.assert_array_equal(tiles.times(x, 4096, two=True), tiles.times(x))


def test_infinities_and_nan_reach_every_row(tiles: Tiles) -> None:
    for number in (np.nan, np.inf):
        x = np.ones((3, tiles.rows.cols), np.float32)
        x[1, -1] = number
        assert np.isfinite(tiles.times(x)).all(1).tolist() == [True, False, True]
        assert not np.isfinite(tiles.times(x)[1]).any()


def test_a_batch_is_its_tokens_one_by_one(tiles: Tiles) -> None:
    """Bit for bit, whatever their number."""
    x = np.random.default_rng(5).standard_normal((16, tiles.rows.cols)).astype(np.float32)
    alone = np.concatenate([tiles.times(token[None], 4096) for token in x])
    for first, last in ((0, 16), (0, 7), (5, 8), (14, 16)):
        np.testing.assert_array_equal(tiles.times(x[first:last], 4096), alone[first:last])


def test_a_row_by_itself(tiles: Tiles) -> None:
    out = np.full(tiles.rows.cols + 2, np.nan, np.float32)
    for row in range(ROWS):
        widen_tiled_row(tiles.rows, row, address(out[1:]))
        np.testing.assert_array_equal(out[1:-1], tiles.values[row])
    assert np.isnan(out[[0, -1]]).all()
