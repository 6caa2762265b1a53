"""Several rows at once against float64 numpy.

Run: pytest tests/shared/kernels/test_multi_rows.py
"""

import numpy as np
import pytest

from warmfront.shared.kernels.multi_rows import ROWS, dot_rows
from warmfront.shared.machine.memory import address
from warmfront.shared.model.formats import Kind, pack, row_bytes, unpack

WIDTHS = (32, 96, 128)


def rows_of(kind: Kind, rows: int, cols: int) -> tuple[np.ndarray, np.ndarray]:
    """Packed rows a few bytes apart, the gaps NaN in every type, and what they hold in float64."""
    values = np.random.default_rng(int(kind) + cols).standard_normal((rows, cols)).astype(np.float32)
    packed = pack(values, kind)
    spaced = np.full((rows, packed.shape[1] + 6), 0xFF, np.uint8)
    spaced[:, : packed.shape[1]] = packed
    return spaced, unpack(packed, kind, cols).astype(np.float64)


@pytest.mark.parametrize("cols", WIDTHS)
@pytest.mark.parametrize("kind", [kind for kind in Kind if kind != Kind.Q4C])
def test_dot_rows(kind: Kind, cols: int) -> None:
    packed, values = rows_of(kind, ROWS, cols)
    assert packed.shape[1] == row_bytes(kind, cols) + 6
    x = np.random.default_rng(1).standard_normal(cols).astype(np.float32)
    out = np.full(ROWS + 2, np.nan, np.float32)
    dot_rows(kind, address(packed), packed.shape[1], address(x), cols, address(out[1:]))
    np.testing.assert_allclose(out[1:-1], values @ x.astype(np.float64), rtol=1e-5, atol=1e-5)
    assert np.isnan(out[[0, -1]]).all()
