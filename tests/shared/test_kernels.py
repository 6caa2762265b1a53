"""Compiled row arithmetic against float64 numpy: `pytest tests/shared/test_kernels.py`."""

import numpy as np
import pytest

from warmfront.shared import kernels
from warmfront.shared.memory import address
from warmfront.shared.weights import Kind, pack, unpack

COLS = 96


def rows_of(kind: Kind, rows: int = 8) -> tuple[np.ndarray, np.ndarray]:
    """Packed random rows at an odd address, and what they hold in float64."""
    values = np.random.default_rng(int(kind)).standard_normal((rows, COLS)).astype(np.float32)
    packed = pack(values, kind)
    buffer = np.zeros(packed.size + 1, np.uint8)
    buffer[1:] = packed.ravel()
    return buffer[1:].reshape(packed.shape), unpack(packed, kind, COLS).astype(np.float64)


@pytest.mark.parametrize("kind", list(Kind))
def test_dot_axpy_widen(kind: Kind) -> None:
    packed, values = rows_of(kind)
    x = np.random.default_rng(9).standard_normal(COLS).astype(np.float32)
    assert kernels.row_stride(kind, COLS) == packed.shape[1]
    for row, reference in zip(packed, values, strict=True):
        assert kernels.dot(kind, address(row), address(x), COLS) == pytest.approx(reference @ x, abs=1e-5)
        y = x.copy()
        kernels.axpy(kind, np.float32(0.37), address(row), address(y), COLS)
        np.testing.assert_allclose(y, x + np.float32(0.37) * reference, atol=1e-6)
        wide = np.empty(COLS, np.float32)
        kernels.widen(kind, address(row), address(wide), COLS)
        np.testing.assert_allclose(wide, reference, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("panels", [1, 2, 3, 4, 5, 7])
@pytest.mark.parametrize("adding", [0, 1])
def test_multiply_in_both_orientations(panels: int, adding: int) -> None:
    rng = np.random.default_rng(panels)
    w = rng.standard_normal((8, COLS)).astype(np.float32)
    x = rng.standard_normal((panels, COLS, 16)).astype(np.float32)
    before = rng.standard_normal((panels, 8, 16)).astype(np.float32)
    expected = np.einsum("rk,pkl->prl", w.astype(np.float64), x) + adding * before
    for weights, row_step, k_step in ((w, 4 * COLS, 4), (np.ascontiguousarray(w.T), 4, 32)):
        y = before.copy()
        kernels.multiply(
            address(weights), row_step, k_step, COLS, address(x), COLS * 64, address(y), 8 * 64, panels, adding
        )
        np.testing.assert_allclose(y, expected, atol=1e-4)


def test_to_half_rounds_like_numpy() -> None:
    values = np.random.default_rng(0).standard_normal(1000).astype(np.float32)
    assert [kernels.to_half(v) for v in values] == values.astype(np.float16).view(np.uint16).tolist()


@pytest.mark.parametrize(("total", "unit", "members"), [(10, 1, 3), (96, 8, 5), (7, 8, 2), (0, 1, 2), (33, 8, 4)])
def test_shares_cover_everything_once(total: int, unit: int, members: int) -> None:
    ranges = [kernels.share(total, unit, m, members) for m in range(members)]
    assert [i for low, high in ranges for i in range(low, high)] == list(range(total))
    assert all(low % unit == 0 or low == high for low, high in ranges)
