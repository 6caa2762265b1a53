"""Products with tiles of the KV cache against float64 numpy.  pytest tests/shared/kernels/attention/test_kv_tiles.py"""

import numpy as np
import numpy.typing as npt
import pytest

from warmfront.shared.kernels.attention.kv_gather import gather_keys, gather_values
from warmfront.shared.kernels.attention.kv_tiles import Heads, Tile, add_values, multiply_keys, quantise_heads
from warmfront.shared.kernels.gemm import in_pairs
from warmfront.shared.machine.memory import address
from warmfront.shared.model.formats import Kind
from warmfront.shared.model.kv_layout import tile_bytes

RNG = np.random.default_rng(5)
KINDS = [Kind.F32, Kind.F16, Kind.Q8]
Floats = npt.NDArray[np.float64]


def tile_of(kind: Kind, numbers: int, part: str) -> tuple[np.ndarray, Tile, Floats]:
    """A tile of "keys" or "values", and what it holds [32 positions, numbers]."""
    if kind != Kind.Q8:
        dtype = np.float32 if kind == Kind.F32 else np.float16
        values = RNG.standard_normal((32, numbers)).astype(dtype)
        packed = values.T if part == "keys" else values.reshape(32, -1, 32).swapaxes(0, 1)
        data = np.ascontiguousarray(packed).reshape(-1).view(np.uint8)
        wide = values.astype(np.float64)
    else:
        integers = RNG.integers(-127, 128, (32, numbers))
        scales = RNG.uniform(0.001, 0.1, (32, numbers // 32)).astype(np.float16)
        rows = integers.T + 128 if part == "keys" else integers.reshape(32, -1, 32).swapaxes(0, 1).reshape(-1, 32)
        packed = (rows & 255).astype(np.uint8).reshape(-1, 4, 32).swapaxes(1, 2)
        data = np.concatenate((packed.reshape(-1), np.ascontiguousarray(scales.T).reshape(-1).view(np.uint8)))
        wide = integers * np.repeat(scales.astype(np.float64), 32, axis=1)
    assert data.nbytes == tile_bytes(kind, numbers)
    return data, Tile(kind, address(data), numbers, 0), wide


@pytest.mark.parametrize("heads", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("numbers", [32, 96])
@pytest.mark.parametrize("kind", KINDS)
def test_keys(kind: Kind, numbers: int, heads: int) -> None:
    kept, tile, keys = tile_of(kind, numbers, "keys")
    x = RNG.standard_normal((heads, numbers)).astype(np.float32)
    packed, y = np.empty_like(x), np.full((heads, 36), np.nan, np.float32)
    x_at = quantise_heads(kind, address(x), address(packed), numbers, heads)
    multiply_keys(tile, Heads(x_at, numbers * 4), Heads(address(y) + 8, 36 * 4), heads)
    expected = x.astype(np.float64) @ keys.T
    np.testing.assert_allclose(y[:, 2:34], expected, atol=1e-4 * np.abs(expected).max())
    assert np.isnan(y[:, [0, 1, 34, 35]]).all()
    assert kept.any()


@pytest.mark.parametrize("heads", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("numbers", [32, 96])
@pytest.mark.parametrize("kind", KINDS)
def test_values(kind: Kind, numbers: int, heads: int) -> None:
    """Chances of any size: those of 8-bit values are rounded to 16 bits of the tile's largest."""
    kept, tile, values = tile_of(kind, numbers, "values")
    x = RNG.uniform(0, 1, (heads, 40)).astype(np.float32) ** 3 * np.float32(10) ** -np.arange(heads)[:, None]
    x = x.astype(np.float32)
    y = RNG.standard_normal((heads, numbers + 4)).astype(np.float32) * np.float32(1e-6)
    before = y.copy()
    add_values(tile, Heads(address(x), 40 * 4), Heads(address(y) + 8, (numbers + 4) * 4), heads)
    expected = before[:, 2:-2] + x[:, :32].astype(np.float64) @ values
    np.testing.assert_array_less(np.abs(y[:, 2:-2] - expected).max(1), 5e-5 * np.abs(expected).max(1))
    np.testing.assert_array_equal(y[:, [0, 1, -2, -1]], before[:, [0, 1, -2, -1]])
    assert kept.any()


@pytest.mark.parametrize("kind", KINDS)
def test_fetching_ahead_changes_no_bit(kind: Kind) -> None:
    results = set()
    for ahead in (0, 1, 4096, -(1 << 40)):
        data, x, y = np.full(32 * 64 * 4 + 256, 0x3C, np.uint8), np.full((3, 64), 0.5, np.float32), np.zeros((2, 3, 64))
        tile, out = Tile(kind, address(data), 64, ahead), y.astype(np.float32)
        x_at = quantise_heads(kind, address(x), address(packed := np.empty_like(x)), 64, 3)
        multiply_keys(tile, Heads(x_at, 256), Heads(address(out[0]), 256), 3)
        add_values(tile, Heads(address(x), 256), Heads(address(out[1]), 256), 3)
        results.add(out.tobytes())
        assert packed.size == x.size
    assert len(results) == 1


@pytest.mark.parametrize("kind", KINDS)
def test_values_without_weight_change_no_bit(kind: Kind) -> None:
    kept, tile, _ = tile_of(kind, 64, "values")
    x, y = RNG.uniform(0, 1, (3, 32)).astype(np.float32), np.zeros((2, 3, 64), np.float32)
    x[:, 20:] = 0
    for turn in range(2):
        add_values(tile, Heads(address(x), 128), Heads(address(y[turn]), 256), 3)
        if kind == Kind.Q8:
            kept[32 * 64 :].view(np.float16).reshape(2, 32)[:, 20:] = 77
        else:
            dtype = np.float32 if kind == Kind.F32 else np.float16
            kept.view(dtype).reshape(2, 32, 32)[:, 20:] = 77
    np.testing.assert_array_equal(y[0], y[1])


@pytest.mark.parametrize("kind", KINDS)
def test_chances_of_nothing(kind: Kind) -> None:
    """Positions that only fill a tile have 1e-38, which no inverse holds; what was never written is 0."""
    kept, tile, _ = tile_of(kind, 32, "values")
    x, y = np.full((1, 32), 1.6e-38, np.float32), np.zeros((1, 32), np.float32)
    add_values(tile, Heads(address(x), 128), Heads(address(y), 128), 1)
    kept[:] = 0
    x[:] = 1
    add_values(tile, Heads(address(x), 128), Heads(address(y), 128), 1)
    assert np.abs(y).max() < 1e-35


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_not_finite_shows(kind: Kind) -> None:
    kept, tile, _ = tile_of(kind, 64, "keys")
    x, packed, y = np.ones((2, 64), np.float32), np.empty((2, 64), np.float32), np.empty((2, 32), np.float32)
    x[1, 40] = np.nan
    x_at = quantise_heads(kind, address(x), address(packed), 64, 2)
    multiply_keys(tile, Heads(x_at, 64 * 4), Heads(address(y), 32 * 4), 2)
    assert np.isfinite(y[0]).all()
    assert np.isnan(y[1]).all()
    assert kept.any()


@pytest.mark.parametrize("part", ["keys", "values"])
@pytest.mark.parametrize("kind", KINDS)
def test_gathered(kind: Kind, part: str) -> None:
    """As `gemm.multiply_columns` takes them: float32, or pairs of bfloat16 of two rows."""
    kept, tile, held = tile_of(kind, 64, part)
    expected = held.T if part == "keys" else held[:, 32:]
    out = np.zeros(64 * 32 + 1, np.float32)
    end = gather_keys(tile, address(out)) if part == "keys" else gather_values(tile, 1, address(out))
    rows = len(expected)
    if in_pairs(kind):
        assert end == address(out) + rows * 32 * 2
        pairs = out[: rows * 16].view(np.uint16).reshape(rows // 2, 32, 2).swapaxes(1, 2).reshape(rows, 32)
        got, tolerance = (pairs.astype(np.uint32) << 16).view(np.float32), 2.0**-8
    else:
        assert end == address(out) + rows * 32 * 4
        got, tolerance = out[: rows * 32].reshape(rows, 32), 1e-6
    np.testing.assert_allclose(got, expected, rtol=tolerance, atol=1e-6)
    assert out[-1] == 0
    assert kept.any()
