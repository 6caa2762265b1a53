"""Packed rows byte by byte, and what rounding may cost.  pytest tests/shared/model/test_formats.py"""

import struct
from collections.abc import Callable

import numpy as np
import pytest
import torch

from warmfront.shared.model.formats import Kind, finite, largest, largest_of_blocks, pack, row_bytes, row_cols, unpack


def random_rows(rows: int = 40, cols: int = 160) -> np.ndarray:
    """Rows of very different magnitudes."""
    rng = np.random.default_rng(1)
    scales = 10.0 ** rng.uniform(-3, 3, (rows, 1))
    return (rng.standard_normal((rows, cols)) * scales).astype(np.float32)


@pytest.mark.parametrize(
    ("kind", "cols", "size"),
    [
        (Kind.F32, 64, 256),
        (Kind.F16, 64, 128),
        (Kind.BF16, 64, 128),
        (Kind.Q8, 64, 68),
        (Kind.Q4, 64, 40),
        (Kind.Q4S, 64, 36),
    ],
)
def test_row_bytes(kind: Kind, cols: int, size: int) -> None:
    assert row_bytes(kind, cols) == size
    assert row_bytes(kind, 0) == 0
    assert row_cols(kind, size) == cols
    assert pack(np.zeros((3, cols), np.float32), kind).shape == (3, size)


@pytest.mark.parametrize("cols", [1, 31, 33, 48])
def test_rows_are_whole_blocks(cols: int) -> None:
    with pytest.raises(ValueError, match=f"rows of {cols} weights: not a multiple of 32"):
        row_bytes(Kind.Q8, cols)
    with pytest.raises(ValueError, match="not a multiple of 32"):
        pack(np.zeros((1, cols), np.float32), Kind.F32)


def test_the_kinds_are_ordered_from_wide_to_narrow() -> None:
    sizes = [row_bytes(kind, 4096) for kind in sorted(Kind)]
    assert sizes == sorted(sizes, reverse=True)


# Two rows of two blocks that every type but Q8 and Q4S holds exactly: j / 2 - 1 up and down again, so that Q4 has
# scale 1/2 and minimum -1, and that ramp stretched and moved.
RAMP = [j / 2 - 1 for j in (*range(16), *reversed(range(16)))]
ROWS = [[*RAMP, *(4 * w + 2 for w in RAMP)], [*(2 * w for w in RAMP), *RAMP]]


@pytest.mark.parametrize(
    ("kind", "element"), [(Kind.F32, lambda w: struct.pack("<f", w)), (Kind.F16, lambda w: struct.pack("<e", w))]
)
def test_bytes_of_floats(kind: Kind, element: Callable[[float], bytes]) -> None:
    packed = pack(np.array(ROWS, np.float32), kind)
    assert [row.tobytes() for row in packed] == [b"".join(map(element, row)) for row in ROWS]


def test_bytes_of_bf16() -> None:
    row = [1.0, -2.0, 0.5, 0.0, 100.0, -0.0, 3.140625, 1 + 2**-7] * 4
    expected = "803f 00c0 003f 0000 c842 0080 4940 813f"
    assert pack(np.array([row], np.float32), Kind.BF16).tobytes() == bytes.fromhex(expected) * 4


def test_bytes_of_q8() -> None:
    first, second = [127, -127, 1, -1, 0, 64, -64, 5] * 4, [-127, 2, 3, 100] * 8
    row = [q / 128 for q in first] + [q * 4 for q in second]
    expected = struct.pack("<64b", *first, *second) + struct.pack("<2e", 1 / 128, 4)
    packed = pack(np.array([row], np.float32), Kind.Q8)
    assert packed.tobytes() == expected
    np.testing.assert_array_equal(unpack(packed, Kind.Q8, 64), [row])


def test_bytes_of_q4() -> None:
    packed = pack(np.array(ROWS, np.float32), Kind.Q4)
    # Weight j = q is in the low nibble of byte j, weight j + 16 = 15 - q in the high one.
    nibbles = bytes(q | (15 - q) << 4 for q in range(16)) * 2
    assert packed[0].tobytes() == nibbles + struct.pack("<4e", 0.5, 2, -1, -2)
    assert packed[1].tobytes() == nibbles + struct.pack("<4e", 1, 0.5, -2, -1)


def test_bytes_of_q4s() -> None:
    """Eight steps belong to the weight of the largest magnitude, so the scale has the opposite sign; 8 is zero."""
    q = [*range(16), *reversed(range(16))]
    row = [(each - 8) / 2 for each in q] + [8.0 - each for each in q]
    packed = pack(np.array([row], np.float32), Kind.Q4S)
    nibbles = bytes(each | (15 - each) << 4 for each in range(16)) * 2
    assert packed.tobytes() == nibbles + struct.pack("<2e", 0.5, -1)
    np.testing.assert_array_equal(unpack(packed, Kind.Q4S, 64), [row])


def test_q4s_at_the_other_end() -> None:
    """The weight opposite the largest one has seven steps, not eight."""
    values = np.zeros((1, 32), np.float32)
    values[0, :4] = -16, 15.5, 14, 1
    np.testing.assert_array_equal(unpack(pack(values, Kind.Q4S), Kind.Q4S, 32)[0, :5], [-16, 14, 14, 0, 0])


@pytest.mark.parametrize("kind", [Kind.F32, Kind.F16, Kind.BF16, Kind.Q4])
def test_unpack_is_the_inverse(kind: Kind) -> None:
    np.testing.assert_array_equal(unpack(pack(np.array(ROWS, np.float32), kind), kind, 64), ROWS)


def test_error_bounds() -> None:
    """No weight is farther off than half a step of its type allows; float16 scales add a little."""
    values = random_rows()
    wide = values.astype(np.float64)
    blocks = wide.reshape(40, -1, 32)
    largest, low = np.abs(blocks).max(2, keepdims=True), blocks.min(2, keepdims=True)
    step = (blocks.max(2, keepdims=True) - low) / 15
    # Rounding the scale moves the ends of the range, 127 and 15 steps away from zero and from the minimum.
    q8 = largest / 127 * (0.5 + 128 * 2.0**-11)
    q4 = step * (0.5 + 16 * 2.0**-11) + np.abs(low) * 2.0**-11
    # Opposite the largest weight, what is beyond seven and a half steps is lost.
    top = np.where(blocks.max(2, keepdims=True) > -low, 1, -1)
    q4s = largest / 8 * (0.5 + 8 * 2.0**-10) + np.maximum(-blocks * top - largest * 7.5 / 8, 0)
    bounds = {
        Kind.F32: np.zeros_like(blocks),
        Kind.F16: np.abs(blocks) * 2.0**-11 + 2.0**-25,
        Kind.BF16: np.abs(blocks) * 2.0**-8,
        Kind.Q8: np.broadcast_to(q8, blocks.shape),
        Kind.Q4: np.broadcast_to(q4, blocks.shape),
        Kind.Q4S: q4s,
    }
    for kind, bound in bounds.items():
        error = np.abs(unpack(pack(values, kind), kind, 160).astype(np.float64).reshape(blocks.shape) - blocks)
        assert (error <= bound).all(), kind.name
        assert (error > bound / 4).any() == (kind != Kind.F32), f"{kind.name}: the bound says nothing"


def test_bf16_rounds_to_nearest_even_like_torch() -> None:
    rng = np.random.default_rng(2)
    bits = rng.integers(0, 1 << 32, 1 << 18, dtype=np.uint32)
    # Half of them exactly between two neighbours.
    bits[::2] = bits[::2] & 0xFFFF0000 | 0x8000
    bits = bits[(bits & 0x7F800000) != 0x7F800000]
    values = bits[: bits.size // 32 * 32].view(np.float32).reshape(-1, 32)
    expected = torch.from_numpy(values).to(torch.bfloat16)
    packed = pack(values, Kind.BF16)
    np.testing.assert_array_equal(packed.view(np.uint16), expected.view(torch.int16).numpy().view(np.uint16))
    np.testing.assert_array_equal(unpack(packed, Kind.BF16, 32), expected.to(torch.float32).numpy())


@pytest.mark.parametrize("kind", [kind for kind in Kind if kind != Kind.Q4C])
def test_zero_blocks_are_zero_bytes(kind: Kind) -> None:
    """Padding neurons rely on it, both ways."""
    zeros = np.zeros((2, 64), np.float32)
    packed = pack(zeros, kind)
    assert not packed.any()
    np.testing.assert_array_equal(unpack(packed, kind, 64), zeros)


@pytest.mark.parametrize("kind", [Kind.Q8, Kind.Q4, Kind.Q4S])
def test_one_zero_block_among_others(kind: Kind) -> None:
    values = random_rows(1, 96)
    values[0, 32:64] = 0
    out = unpack(pack(values, kind), kind, 96)
    assert not out[0, 32:64].any()
    assert out[0, :32].any()
    assert out[0, 64:].any()


def test_a_constant_block_is_q4s_minimum() -> None:
    values = np.full((1, 32), -0.75, np.float32)
    np.testing.assert_array_equal(unpack(pack(values, Kind.Q4), Kind.Q4, 32), values)


@pytest.mark.parametrize("kind", [Kind.Q8, Kind.Q4, Kind.Q4S])
def test_weights_too_small_for_a_scale_become_zero(kind: Kind) -> None:
    values = np.full((1, 32), 1e-9, np.float32)
    values[0, ::2] *= -1
    assert not unpack(pack(values, kind), kind, 32).any()


@pytest.mark.parametrize("kind", [kind for kind in Kind if kind != Kind.Q4C])
def test_input_need_not_be_contiguous(kind: Kind) -> None:
    values = random_rows(64, 40)
    np.testing.assert_array_equal(pack(values.T, kind), pack(np.ascontiguousarray(values.T), kind))
    packed = pack(random_rows(8, 64), kind)
    np.testing.assert_array_equal(unpack(packed[::2], kind, 64), unpack(packed, kind, 64)[::2])


@pytest.mark.parametrize("kind", [Kind.F32, Kind.F16, Kind.BF16, Kind.Q8, Kind.Q4, Kind.Q4S])
def test_finite(kind: Kind) -> None:
    """One number or scale of all is NaN or infinite; the numbers of blocks may have any bits."""
    rng = np.random.default_rng(2)
    rows = pack(rng.standard_normal((3, 64)).astype(np.float32), kind)
    if kind in (Kind.Q8, Kind.Q4, Kind.Q4S):
        rows[:, : 64 if kind == Kind.Q8 else 32] = 0xFF
    assert finite(rows, kind, 64)
    values = {Kind.F32: np.dtype("<f4"), Kind.BF16: np.dtype("<u2")}.get(kind, np.dtype("<f2"))
    bad = np.array([0x7F80, 0xFFC1], values) if kind == Kind.BF16 else np.array([np.nan, np.inf, -np.inf], values)
    start = {Kind.Q8: 64, Kind.Q4: 32, Kind.Q4S: 32}.get(kind, 0)
    for value in bad:
        for at in range(start, rows.shape[1], values.itemsize):
            spoilt = rows.copy()
            spoilt[1, at : at + values.itemsize] = np.frombuffer(value.tobytes(), np.uint8)
            assert not finite(spoilt, kind, 64), at


@pytest.mark.parametrize("kind", [kind for kind in Kind if kind != Kind.Q4C])
@pytest.mark.parametrize("sign", [1, -1])
def test_largest(kind: Kind, sign: int) -> None:
    """At least the largest magnitude, and no more than the type's steps allow, wherever and of whatever sign it is."""
    # What 128, 8, or 15 and a minimum, steps of a block allow: 128 / 127 of what Q8 has, 16 / 7 of what Q4S may have.
    slack = {Kind.Q8: 129 / 127, Kind.Q4: 2.01, Kind.Q4S: 16 / 7}.get(kind, 1.0)
    for seed in range(20):
        rng = np.random.default_rng(seed)
        values = rng.standard_normal((5, 96)).astype(np.float32)
        values[rng.integers(5), rng.integers(96)] = sign * rng.uniform(5, 50)
        packed = pack(values, kind)
        exact = float(np.abs(unpack(packed, kind, 96)).max())
        assert exact <= largest(packed, kind, 96) <= slack * exact


@pytest.mark.parametrize("kind", [kind for kind in Kind if kind != Kind.Q4C])
def test_largest_of_zeros(kind: Kind) -> None:
    assert largest(pack(np.zeros((3, 64), np.float32), kind), kind, 64) == 0


@pytest.mark.parametrize("kind", [Kind.Q8, Kind.Q4S, Kind.Q4])
def test_largest_holds_whatever_the_numbers_of_blocks_are(kind: Kind) -> None:
    """A published file may hold any bits: -128 of Q8, scales below 0."""
    rng = np.random.default_rng(7)
    for _ in range(20):
        rows = rng.integers(0, 256, (4, row_bytes(kind, 64)), dtype=np.uint8)
        start = 64 if kind == Kind.Q8 else 32
        scales = rng.normal(0, 1, (4, (rows.shape[1] - start) // 2)).astype(np.float16)
        rows[:, start:] = scales.view(np.uint8).reshape(4, -1)
        assert np.abs(unpack(rows, kind, 64)).max() <= largest(rows, kind, 64)


def test_largest_of_blocks() -> None:
    scale, minimum = np.array([0.5, -1, 0, 2], np.float16), np.array([-1, 3, -9, -20], np.float16)
    for i, expected in enumerate((6.5, 12, 9, 20)):
        assert largest_of_blocks(scale[i : i + 1], minimum[i : i + 1]) == expected
    assert largest_of_blocks(scale, minimum) == 20
