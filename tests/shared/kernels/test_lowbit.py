"""Low-bit gate copies: layout, rounding, dots.

Run: pytest tests/shared/kernels/test_lowbit.py
"""

import numpy as np
import pytest

from warmfront.shared.config import BITS
from warmfront.shared.kernels.byte_dot import quantise_input, quantised_bytes
from warmfront.shared.kernels.lowbit import lowbit_bytes, lowbit_dot, pack_lowbit, unpack_lowbit
from warmfront.shared.machine.memory import address

COLS = (32, 64, 96, 544, 2048)


def normal(rows: int, cols: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((rows, cols)).astype(np.float32)


@pytest.mark.parametrize(
    ("bits", "cols", "size"), [(1, 64, 8 + 4), (2, 64, 16 + 4), (1, 96, 16 + 6), (2, 96, 32 + 6), (4, 64, 40)]
)
def test_bytes_of_a_row(bits: int, cols: int, size: int) -> None:
    assert lowbit_bytes(bits, cols) == size
    assert pack_lowbit(normal(3, cols), bits).shape == (3, size)


@pytest.mark.parametrize("bits", [1, 2])
def test_layout(bits: int) -> None:
    """Weight by weight, from the description in the module."""
    cols = 96
    packed = pack_lowbit(normal(5, cols), bits)
    wide = unpack_lowbit(packed, bits, cols)
    order = [*range(16), *range(32, 48), *range(16, 32), *range(48, 64)]
    for row, values in zip(packed, wide, strict=True):
        scales = row[128 * bits // 8 :].view(np.float16).astype(np.float32)
        for weight in range(cols):
            place = order.index(weight % 64)
            if bits == 2:
                q = int(row[weight // 64 * 16 + place % 16]) >> place // 16 * 2 & 3
            else:
                q = int(row[weight // 64 * 8 + place // 8]) >> place % 8 & 1
            assert values[weight] == (q - (2**bits - 1) / 2) * scales[weight // 32]


@pytest.mark.parametrize(("bits", "least"), [(1, 0.79), (2, 0.93), (4, 0.99)])
def test_correlates_with_the_weights(bits: int, least: float) -> None:
    values = normal(64, 1024)
    rounded = unpack_lowbit(pack_lowbit(values, bits), bits, 1024)
    assert np.corrcoef(values.ravel(), rounded.ravel())[0, 1] > least


@pytest.mark.parametrize("bits", BITS)
def test_an_outlier_hurts_its_block_only(bits: int) -> None:
    values = normal(1, 128)
    spoilt = values.copy()
    spoilt[0, 40] = 1000
    rounded = [unpack_lowbit(pack_lowbit(rows, bits), bits, 128)[0] for rows in (values, spoilt)]
    same = np.ones(128, bool)
    same[32:64] = False
    np.testing.assert_array_equal(rounded[0][same], rounded[1][same])


@pytest.mark.parametrize("bits", BITS)
def test_zeros_stay_finite(bits: int) -> None:
    assert (unpack_lowbit(pack_lowbit(np.zeros((2, 64), np.float32), bits), bits, 64) == 0).all()


@pytest.mark.parametrize("cols", COLS)
@pytest.mark.parametrize("bits", BITS)
def test_dot(bits: int, cols: int) -> None:
    packed = pack_lowbit(normal(7, cols), bits)
    values = unpack_lowbit(packed, bits, cols).astype(np.float64)
    x = normal(1, cols, seed=1)[0]
    prepared = np.zeros(quantised_bytes(cols), np.uint8)
    q_at = quantise_input(address(x), address(prepared), cols)
    fenced = np.full(packed.shape[1] + 256, 0xFF, np.uint8)  # NaN scales before and after the row
    for row, reference in zip(packed, values, strict=True):
        fenced[128:-128] = row
        row_at = address(fenced) + 128
        got = lowbit_dot(bits, row_at, q_at, cols)
        assert got == pytest.approx(reference @ x, abs=2e-4 * np.sqrt(cols))
