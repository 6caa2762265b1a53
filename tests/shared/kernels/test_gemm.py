"""Packed rows times several tokens, against float64 numpy.  pytest tests/shared/kernels/test_gemm.py"""

import numpy as np
import pytest

from warmfront.shared.kernels import gemm
from warmfront.shared.machine.memory import address
from warmfront.shared.model.formats import Kind, pack, unpack

COLS = 96
KINDS = [kind for kind in Kind if kind != Kind.Q4C]


def close(got: np.ndarray, expected: np.ndarray, kind: Kind) -> None:
    """float32 for float32 rows; else the products may be of bfloat16, whose numbers have 8 bits."""
    tolerance = 1e-5 if kind == Kind.F32 else 1e-2
    np.testing.assert_allclose(got, expected, rtol=tolerance, atol=tolerance * np.abs(expected).max())


def prepared(kind: Kind, x: np.ndarray) -> tuple[np.ndarray, int]:
    """Memory to keep, and the address of panels [panels, features, 16] as `kind` wants them."""
    out = np.zeros_like(x)
    return out, gemm.pack_panels(kind, address(x), address(out), x.shape[1], x.shape[0])


@pytest.mark.parametrize("panels", [1, 2, 3, 4, 5, 7])
@pytest.mark.parametrize("kind", KINDS)
def test_rows(kind: Kind, panels: int) -> None:
    rng = np.random.default_rng(panels)
    rows = pack(rng.standard_normal((8, COLS)).astype(np.float32), kind)
    x = rng.standard_normal((panels, COLS, 16)).astype(np.float32)
    kept, x_at = prepared(kind, x)
    # Eight rows in the middle of twelve: what is around stays as it is.
    y, scratch = np.full((panels, 12, 16), np.nan, np.float32), np.zeros((8, COLS), np.float32)
    y_at = address(y) + 2 * 64
    packed = gemm.Rows(kind, address(rows), rows.shape[1], COLS)
    gemm.multiply_rows(packed, x_at, gemm.Panels(y_at, 12 * 64, panels), address(scratch))
    close(y[:, 2:10], np.einsum("rk,pkl->prl", unpack(rows, kind, COLS).astype(np.float64), x), kind)
    assert np.isnan(y[:, [0, 1, 10, 11]]).all()
    del kept


@pytest.mark.parametrize("panels", [1, 3, 5])
@pytest.mark.parametrize("kind", KINDS)
def test_columns(kind: Kind, panels: int) -> None:
    """Six rows of ten: x has panels of ten features, of which the rows take some in the middle."""
    rng = np.random.default_rng(panels)
    rows = pack(rng.standard_normal((6, COLS)).astype(np.float32), kind)
    x = rng.standard_normal((panels, 10, 16)).astype(np.float32)
    kept, x_at = prepared(kind, x)
    x_at += 2 * 64 // (2 if gemm.in_pairs(kind) else 1)
    expected = np.einsum("rk,prl->pkl", unpack(rows, kind, COLS).astype(np.float64), x[:, 2:8])
    before = rng.standard_normal((panels, COLS, 16)).astype(np.float32)
    y, scratch = before.copy(), np.zeros((6, COLS), np.float32)
    stride, step = rows.shape[1], COLS * 64
    next_at = address(scratch)
    for row in (0, 2):  # in two parts
        packed = gemm.Rows(kind, address(rows[row:]), stride, COLS)
        next_at = gemm.gather_columns(packed, 2 + row, 0, next_at, 0, COLS, 1)
    left = gemm.Gathered(kind, address(scratch), 6, COLS)
    gemm.multiply_columns(left, x_at, 10, gemm.Panels(address(y), step, panels))
    close(y, before + expected, kind)
    del kept


@pytest.mark.parametrize(("tokens", "panels"), [(1, 1), (16, 1), (17, 2), (128, 8)])
def test_panels_of(tokens: int, panels: int) -> None:
    assert gemm.panels_of(tokens) == panels
