"""Rows times several tokens against float64 numpy.  pytest tests/shared/kernels/prefill/test_matrix.py"""

import numpy as np
import pytest

from warmfront.shared.kernels.gemm import Panels, Rows, panels_of
from warmfront.shared.kernels.prefill.matrix import multiply_tokens, pack_tokens
from warmfront.shared.kernels.tiles import TILE, in_tiles, interleave
from warmfront.shared.machine.memory import address
from warmfront.shared.model.formats import Kind, pack, row_bytes, unpack
from warmfront.shared.model.panels import PRODUCT_FLOATS

# Two tiles and the 8 rows that fill none; of widths that are part of a stretch of blocks, and more than one.
ROWS, WIDTHS = 2 * TILE + 8, (32, 96, 544)
KINDS = [kind for kind in Kind if kind != Kind.Q4C]
TOKENS = (1, 2, 15, 16, 17, 33, 70)


class Matrix:
    """A random matrix between bytes that are NaN in every type, in tiles or not, and what it holds in float64."""

    def __init__(self, kind: Kind, cols: int, tiled: int) -> None:
        values = np.random.default_rng(int(kind) + cols).standard_normal((ROWS, cols)).astype(np.float32)
        packed = pack(values, kind)
        self.values = unpack(packed, kind, cols).astype(np.float64)
        self._memory = np.full(packed.nbytes + 128, 0xFF, np.uint8)
        self._memory[64:-64] = packed.reshape(-1)
        self.rows, self.tiled = Rows(int(kind), address(self._memory) + 64, row_bytes(kind, cols), cols), tiled
        if tiled:
            interleave(kind, self.rows.at, tiled, cols)

    def times(self, x: np.ndarray, low: int = 0, high: int = ROWS) -> np.ndarray:
        """[tokens, high - low], of float32 x [tokens, cols]; nothing else is written."""
        kind, cols, panels = self.rows.kind, self.rows.cols, panels_of(len(x))
        lanes = np.full((panels, cols, 16), np.nan, np.float32)
        padded = np.full((panels * 16, cols), np.nan, np.float32)
        padded[: len(x)] = x
        lanes[:] = padded.reshape(panels, 16, cols).transpose(0, 2, 1)
        packed = np.full(lanes.nbytes, 0xFF, np.uint8)
        scratch = np.full(8 * cols + PRODUCT_FLOATS + 16, np.nan, np.float32)
        y = np.full((panels, ROWS, 16), np.nan, np.float32)
        x_at = pack_tokens(kind, address(lanes), address(packed), cols, panels)
        out = Panels(address(y), ROWS * 64, panels)
        multiply_tokens(self.rows, self.tiled, low, high, x_at, out, address(scratch))
        assert np.isnan(scratch[-16:]).all()
        assert np.isnan(y[:, :low]).all()
        assert np.isnan(y[:, high:]).all()
        return y.transpose(0, 2, 1).reshape(-1, ROWS)[: len(x), low:high]


PLACES = [(kind, tiled) for kind in KINDS for tiled in ((0, ROWS // TILE * TILE) if in_tiles(int(kind)) else (0,))]


@pytest.fixture(scope="module", params=[(*place, cols) for place in PLACES for cols in WIDTHS], ids=str)
def matrix(request: pytest.FixtureRequest) -> Matrix:
    kind, tiled, cols = request.param
    return Matrix(kind, cols, tiled)


def inputs(tokens: int, cols: int) -> np.ndarray:
    return np.random.default_rng(tokens).standard_normal((tokens, cols)).astype(np.float32)


@pytest.mark.parametrize("tokens", TOKENS)
def test_any_number_of_tokens(matrix: Matrix, tokens: int) -> None:
    x = inputs(tokens, matrix.rows.cols)
    expected = x.astype(np.float64) @ matrix.values.T
    # The inputs may have 8 bits, or the products be of bfloat16.
    tolerance = 1e-5 if matrix.rows.kind == Kind.F32 else 2e-2
    np.testing.assert_allclose(matrix.times(x), expected, rtol=0, atol=tolerance * np.abs(expected).max())


@pytest.mark.parametrize(("low", "high"), [(0, 8), (8, 32), (8, 16), (24, 40), (32, 40), (24, 24)])
def test_some_rows(matrix: Matrix, low: int, high: int) -> None:
    x = inputs(20, matrix.rows.cols)
    np.testing.assert_array_equal(matrix.times(x, low, high), matrix.times(x)[:, low:high])


def test_whole_numbers_are_exact(matrix: Matrix) -> None:
    """An input that 8 bits hold loses nothing: what is left is a float32 sum, of the scales of both."""
    x = np.random.default_rng(2).integers(-100, 100, (20, matrix.rows.cols)).astype(np.float32)
    x[:, ::32] = 127
    expected = x.astype(np.float64) @ matrix.values.T
    size = np.abs(x.astype(np.float64)) @ np.abs(matrix.values).T
    # The weights of float16 may be rounded to bfloat16.
    tolerance = 4e-3 if matrix.rows.kind == Kind.F16 else 2e-6
    assert (np.abs(matrix.times(x) - expected) <= tolerance * size).all()


def test_a_token_is_the_same_among_others(matrix: Matrix) -> None:
    """To the bit, in whatever company and at whatever place."""
    x = inputs(70, matrix.rows.cols)
    together = matrix.times(x)
    for some in (slice(0, 1), slice(5, 21), slice(16, 49), slice(3, 70)):
        np.testing.assert_array_equal(matrix.times(x[some]), together[some])


@pytest.mark.parametrize("number", [np.nan, np.inf])
def test_a_token_that_is_not_finite_spoils_no_other(matrix: Matrix, number: float) -> None:
    x = inputs(36, matrix.rows.cols)
    clean = matrix.times(x)
    x[[5, 17], -1] = number
    found = matrix.times(x)
    assert not np.isfinite(found[[5, 17]]).any()
    others = np.delete(np.arange(36), [5, 17])
    np.testing.assert_array_equal(found[others], clean[others])
