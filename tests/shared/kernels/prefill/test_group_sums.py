"""Down rows of groups into exact sums, against float64 numpy.

pytest tests/shared/kernels/prefill/test_group_sums.py
"""

import numpy as np
import pytest

from warmfront.shared.kernels import gemm
from warmfront.shared.kernels.prefill.group_sums import Columns, Factors, add_columns
from warmfront.shared.machine.memory import address
from warmfront.shared.model.formats import Kind, pack, unpack

COLS, GROUPS = 96, 3
KINDS = [kind for kind in Kind if kind != Kind.Q4C]


@pytest.mark.parametrize("panels", [1, 2, 3, 5])
@pytest.mark.parametrize("kind", KINDS)
def test_a_stretch_of_columns_after_the_other(kind: Kind, panels: int) -> None:
    """What is before, behind and between them stays as it is."""
    rng = np.random.default_rng(panels)
    rows = pack(rng.standard_normal((GROUPS * 32, COLS)).astype(np.float32), kind)
    x = rng.standard_normal((GROUPS, panels, 32, 16)).astype(np.float32) * np.float32(2.0**30)
    factors = np.full_like(x, np.nan)
    for group in range(GROUPS):
        if gemm.in_pairs(kind):
            gemm.pack_panels(kind, address(x[group]), address(factors[group]), 32, panels)
        else:
            factors[group] = x[group]
    before = rng.integers(-(1 << 40), 1 << 40, (panels, COLS + 2, 16))
    sums = before.copy()
    for first, columns in ((0, 32), (32, 64)):
        scratch = np.full(GROUPS * 32 * columns + 16, np.nan, np.float32)
        for group in range(GROUPS):
            packed = gemm.Rows(kind, address(rows[group * 32 :]), rows.shape[1], COLS)
            gemm.gather_columns(packed, 32, 0, address(scratch[group * 32 * columns :]), first, columns, 1)
        assert np.isnan(scratch[-16:]).all()
        y = gemm.Panels(address(sums) + (1 + first) * 128, (COLS + 2) * 128, panels)
        add_columns(Columns(kind, address(scratch), GROUPS, columns), Factors(address(factors), panels), y)
    added = (sums - before).astype(np.float64) / 2.0**30
    assert not added[:, [0, -1]].any()
    weights = unpack(rows, kind, COLS).astype(np.float64).reshape(GROUPS, 32, COLS)
    expected = np.einsum("grk,gprl->pkl", weights, x.astype(np.float64) / 2.0**30)
    # The products may be of bfloat16, whose numbers have 8 bits.
    tolerance = 1e-5 if kind == Kind.F32 else 1e-2
    np.testing.assert_allclose(added[:, 1:-1], expected, rtol=tolerance, atol=tolerance * np.abs(expected).max())
