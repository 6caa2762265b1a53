"""Weight types: how a row of weights is laid out in memory, packed and unpacked with numpy.

A row holds `cols` weights (a multiple of 32) and is contiguous:

    F32   cols x float32
    F16   cols x float16
    BF16  cols x bfloat16 (upper half of a float32)
    Q8    cols x int8, then cols/32 x float16 scale                w = q * scale
    Q4    cols/2 bytes, then cols/32 x float16 scale, then cols/32 x float16 minimum
                                                                   w = q * scale + minimum, q in 0..15
          byte j of a 32-block holds weight j in its low and weight j + 16 in its high nibble
    Q4S   cols/2 bytes as in Q4, then cols/32 x float16 scale      w = (q - 8) * scale, q in 0..15
    Q4C   cols/2 bytes as in Q4 and no scales: a block is a column of 32 rows, whose scale and minimum lie in the tail
          of the group (`bundle.py`). Only for down rows, of models whose blocks run that way.

Q4S holds GGUF's Q4_0 exactly, Q4 holds Q4_1 and Q4_0 (minimum = -8 * scale), Q8 holds Q8_0; Q4C holds the ffn_down of
Q4_0 and Q4_1.
The compiled counterparts are in `shared/kernels/rows.py`.
"""

from enum import IntEnum

import numpy as np
import numpy.typing as npt

__all__ = [
    "BLOCK",
    "FLOATS",
    "Kind",
    "finite",
    "join_nibbles",
    "join_q4",
    "largest",
    "largest_of_blocks",
    "pack",
    "row_bytes",
    "row_cols",
    "split_q4",
    "unpack",
]

BLOCK = 32

Bytes = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.float32]


class Kind(IntEnum):
    """A weight type, widest first."""

    F32 = 0
    F16 = 1
    BF16 = 2
    Q8 = 3
    Q4 = 4
    Q4S = 5
    Q4C = 6


# Those whose rows are the weights as numbers and nothing else.
FLOATS = (Kind.F32, Kind.F16, Kind.BF16)


def row_bytes(kind: int, cols: int) -> int:
    """Bytes of a row of `cols` weights; raises ValueError if `cols` is not a multiple of 32."""
    if cols % BLOCK:
        raise ValueError(f"rows of {cols} weights: not a multiple of {BLOCK}")
    blocks = cols // BLOCK
    half = cols // 2
    return (4 * cols, 2 * cols, 2 * cols, cols + 2 * blocks, half + 4 * blocks, half + 2 * blocks, half)[kind]


def row_cols(kind: int, size: int) -> int:
    """The inverse of `row_bytes`: weights of a row of `size` bytes."""
    fixed = row_bytes(kind, 0)
    return (size - fixed) * BLOCK // (row_bytes(kind, BLOCK) - fixed)


def pack(values: Floats, kind: int) -> Bytes:
    """Round float32 [rows, cols] to the nearest of `kind`, any but Q4C: uint8 [rows, row_bytes]."""
    if kind == Kind.Q4C:
        raise ValueError("rows of Q4C cannot be packed apart from their group")
    values = np.ascontiguousarray(values, np.float32)
    rows, cols = values.shape
    out = np.empty((rows, row_bytes(kind, cols)), np.uint8)
    if kind == Kind.F32:
        out[:] = values.view(np.uint8)
    elif kind == Kind.F16:
        out[:] = values.astype(np.float16).view(np.uint8)
    elif kind == Kind.BF16:
        out[:] = _round_bf16(values).view(np.uint8)
    elif kind == Kind.Q8:
        blocks = values.reshape(rows, -1, BLOCK)
        # Symmetric as in GGUF's Q8_0: -128 stays unused.
        scale = (np.abs(blocks).max(2) / 127).astype(np.float16)
        inverse = _inverse(scale)
        q = np.clip(np.rint(blocks * inverse[:, :, None]), -127, 127).astype(np.int8)
        out[:, :cols] = q.reshape(rows, cols).view(np.uint8)
        out[:, cols:] = scale.view(np.uint8)
    elif kind == Kind.Q4S:
        blocks = values.reshape(rows, -1, BLOCK)
        high, low = blocks.max(2), blocks.min(2)
        # In 0..15, 0 is farther from 8 than 15 is, so the weight of the largest magnitude is given 0, and the scale its
        # sign: a step of max / 8 instead of max / 7.
        scale = (np.where(high > -low, high, low) / -8).astype(np.float16)
        q = np.clip(np.rint(blocks * _inverse(scale)[:, :, None]) + 8, 0, 15).astype(np.uint8)
        # A block of zeros is all zero bytes, not -0 and eights: padding compares equal whoever wrote it.
        empty = scale == 0
        scale[empty], q[empty] = 0, 0
        out[:] = np.concatenate((join_nibbles(q), scale.view(np.uint8)), axis=1)
    else:
        blocks = values.reshape(rows, -1, BLOCK)
        low = blocks.min(2)
        scale = ((blocks.max(2) - low) / 15).astype(np.float16)
        minimum = low.astype(np.float16)
        # The scale as it is stored, rounded to float16: the numbers then make up for its rounding.
        inverse = _inverse(scale)
        q = np.clip(np.rint((blocks - minimum[:, :, None].astype(np.float32)) * inverse[:, :, None]), 0, 15)
        out[:] = join_q4(q.astype(np.uint8), scale, minimum)
    return out


def join_q4(q: Bytes, scale: npt.NDArray[np.float16], minimum: npt.NDArray[np.float16]) -> Bytes:
    """Assemble Q4 rows from q [rows, blocks, 32] in 0..15 and scale, minimum [rows, blocks]."""
    halves = (np.ascontiguousarray(part).view(np.uint8) for part in (scale, minimum))
    return np.concatenate((join_nibbles(q), *halves), axis=1)


def join_nibbles(q: Bytes) -> Bytes:
    """The 4-bit numbers q [rows, blocks, 32] of rows of Q4, Q4S or Q4C: uint8 [rows, cols / 2]."""
    return np.asarray(q[:, :, :16] | (q[:, :, 16:] << 4), np.uint8).reshape(len(q), -1)


def split_q4(data: Bytes, cols: int) -> tuple[Bytes, npt.NDArray[np.float16], npt.NDArray[np.float16]]:
    """The inverse of `join_q4`: q [rows, cols] in 0..15, scale and minimum [rows, cols / 32]."""
    blocks = cols // BLOCK
    scales = np.ascontiguousarray(data[:, cols // 2 :]).view(np.float16)
    return _split_nibbles(data, cols), scales[:, :blocks], scales[:, blocks:]


def _split_nibbles(data: Bytes, cols: int) -> Bytes:
    nibbles = data[:, : cols // 2].reshape(len(data), -1, 16)
    return np.concatenate((nibbles & 15, nibbles >> 4), axis=2, dtype=np.uint8).reshape(len(data), cols)


def finite(data: Bytes, kind: int, cols: int) -> bool:
    """Whether packed rows hold only finite numbers; of quantised blocks, the scales and minima are looked at."""
    if kind == Kind.F32:
        return bool(np.isfinite(data.view(np.float32)).all())
    if kind == Kind.BF16:
        # An exponent of all ones is infinity or NaN.
        return not bool((data.view(np.uint16) & 0x7F80 == 0x7F80).any())
    start = 0 if kind == Kind.F16 else cols if kind == Kind.Q8 else cols // 2
    return bool(np.isfinite(np.ascontiguousarray(data[:, start:]).view(np.float16)).all())


def largest(data: Bytes, kind: int, cols: int) -> float:
    """No weight of packed rows, not of Q4C, has a larger magnitude; of quantised blocks, what their scales allow."""
    if kind == Kind.F32:
        return float(np.abs(data.view(np.float32)).max(initial=0))
    if kind == Kind.F16:
        return float(np.abs(data.view(np.float16)).max(initial=0))
    if kind == Kind.BF16:
        # Magnitudes are ordered as their bits are.
        bits = np.uint32((data.view(np.uint16) & 0x7FFF).max(initial=0)) << 16
        return float(np.array(bits, np.uint32).view(np.float32))
    if kind == Kind.Q4:
        _, scale, minimum = split_q4(data, cols)
        return largest_of_blocks(scale, minimum)
    start, steps = (cols, 128) if kind == Kind.Q8 else (cols // 2, 8)
    return steps * float(np.abs(np.ascontiguousarray(data[:, start:]).view(np.float16)).max(initial=0))


def largest_of_blocks(scale: npt.NDArray[np.float16], minimum: npt.NDArray[np.float16]) -> float:
    """No 4-bit weight of blocks with these scales and minima has a larger magnitude."""
    low = minimum.astype(np.float32)
    return float(np.maximum(np.abs(low), np.abs(low + 15 * scale.astype(np.float32))).max(initial=0))


def unpack(data: Bytes, kind: int, cols: int) -> Floats:
    """Widen uint8 [rows, row_bytes] of `kind` to float32 [rows, cols]."""
    data = np.ascontiguousarray(data)
    rows = data.shape[0]
    blocks = cols // BLOCK
    if kind == Kind.F32:
        return data.view(np.float32).copy()
    if kind == Kind.F16:
        return data.view(np.float16).astype(np.float32)
    if kind == Kind.BF16:
        return (data.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
    if kind == Kind.Q8:
        q8 = data[:, :cols].view(np.int8).reshape(rows, blocks, BLOCK).astype(np.float32)
        scale = np.ascontiguousarray(data[:, cols:]).view(np.float16).astype(np.float32)
        return np.asarray(q8 * scale[:, :, None], np.float32).reshape(rows, cols)
    if kind == Kind.Q4C:
        raise ValueError("rows of Q4C cannot be unpacked apart from their group")
    if kind == Kind.Q4S:
        centred = _split_nibbles(data, cols).astype(np.float32).reshape(rows, blocks, BLOCK) - 8
        scale = np.ascontiguousarray(data[:, cols // 2 :]).view(np.float16).astype(np.float32)
        return np.asarray(centred * scale[:, :, None], np.float32).reshape(rows, cols)
    q4, *parts = split_q4(data, cols)
    scale4, minimum = (part.astype(np.float32)[:, :, None] for part in parts)
    return np.asarray(q4.reshape(rows, blocks, BLOCK) * scale4 + minimum, np.float32).reshape(rows, cols)


def _round_bf16(values: Floats) -> npt.NDArray[np.uint16]:
    """Round to nearest even. A NaN may come out as infinity: sources are checked before."""
    bits = values.view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def _inverse(scale: npt.NDArray[np.float16]) -> Floats:
    """1 / scale, and 0 for a scale of 0, whose block is all zeros."""
    wide = scale.astype(np.float32)
    return np.divide(1, wide, out=np.zeros_like(wide), where=wide != 0)
