"""GGUF's weight blocks: which weight type holds each, and how blocks are repacked without rounding.

    F32, F16, BF16             as they are
    Q4_0, Q4_1, Q8_0           the same numbers in another order; Q4_0 as Q4S or, beside Q4_1, as Q4
    Q4_K                       the same 4-bit numbers; scale * sub-scale rounded to float16
    MXFP4                      exactly, as Q8
    Q5_0, Q5_1, Q5_K, Q6_K     rounded to Q8
    the rest                   rounded to Q4

The layouts are those of ggml's `ggml-common.h`; each function names the bytes of one block.
"""

from collections.abc import Callable

import gguf
import numpy as np
import numpy.typing as npt
from gguf import GGMLQuantizationType as Type

from warmfront.coordinator.models.gguf.mxfp4 import as_q8
from warmfront.shared.model.formats import BLOCK, Kind, join_q4, row_bytes
from warmfront.shared.model.formats import FLOATS as FLOAT_KINDS

__all__ = ["FLOATS", "ROUNDED_TO_Q8", "blocks_of", "kind_of", "repack", "type_of"]

Bytes = npt.NDArray[np.uint8]

FLOATS = {Type.F32: Kind.F32, Type.F16: Kind.F16, Type.BF16: Kind.BF16}
ROUNDED_TO_Q8 = frozenset((Type.Q5_0, Type.Q5_1, Type.Q5_K, Type.Q6_K))


def kind_of(block: Type) -> Kind | None:
    """The weight type that holds a GGUF type; None if the gguf package cannot read such blocks."""
    if block in FLOATS:
        return FLOATS[block]
    try:
        gguf.dequantize(np.zeros((1, gguf.GGML_QUANT_SIZES[block][1]), np.uint8), block)
    except NotImplementedError:
        return None
    if block == Type.Q4_0:
        return Kind.Q4S
    return Kind.Q8 if block in ROUNDED_TO_Q8 or block in (Type.Q8_0, Type.MXFP4) else Kind.Q4


def repack(block: Type, kind: Kind) -> Callable[[Bytes], Bytes] | None:
    """The function that turns rows of such blocks into packed rows of `kind`; None if values must be rounded."""
    return _REPACK.get((block, kind))


def type_of(kind: Kind) -> Type:
    """The GGUF type that holds what rows of `kind`, any but Q4C, hold."""
    return _TYPES[kind]


def blocks_of(rows: Bytes, kind: Kind, cols: int) -> Bytes:
    """Packed rows of `cols` weights as the rows of a GGUF file in `type_of(kind)`: the way back of `repack`."""
    if kind in FLOAT_KINDS:
        return rows[:, : row_bytes(kind, BLOCK) // BLOCK * cols]
    blocks = cols // BLOCK
    numbers = cols if kind == Kind.Q8 else cols // 2
    parts = [rows[:, numbers + at : numbers + at + 2 * blocks] for at in range(0, rows.shape[1] - numbers, 2 * blocks)]
    parts.append(rows[:, :numbers])
    return np.concatenate([part.reshape(len(rows), blocks, -1) for part in parts], axis=2).reshape(len(rows), -1)


def _q4_0(rows: Bytes) -> Bytes:
    """float16 d, 16 bytes of nibbles; w = d * (q - 8)."""
    blocks = rows.reshape(len(rows), -1, 18)
    return _columns(blocks[:, :, 2:], blocks[:, :, :2])


def _q4_0_with_minima(rows: Bytes) -> Bytes:
    blocks = rows.reshape(len(rows), -1, 18)
    d = _halves(blocks[:, :, :2])
    return _columns(blocks[:, :, 2:], d, np.float16(-8) * d)


def _q4_1(rows: Bytes) -> Bytes:
    """float16 d, float16 m, 16 bytes of nibbles; w = d * q + m."""
    blocks = rows.reshape(len(rows), -1, 20)
    return _columns(blocks[:, :, 4:], blocks[:, :, :2], blocks[:, :, 2:4])


def _q8_0(rows: Bytes) -> Bytes:
    """float16 d, 32 int8; w = d * q."""
    blocks = rows.reshape(len(rows), -1, 34)
    return _columns(blocks[:, :, 2:], blocks[:, :, :2])


def _mxfp4(rows: Bytes) -> Bytes:
    """An exponent, 16 bytes of nibbles: codes j and j + 16."""
    blocks = rows.reshape(len(rows), -1, 17)
    nibbles = blocks[:, :, 1:]
    return as_q8(np.concatenate((nibbles & 15, nibbles >> 4), axis=2), blocks[:, :, 0])


def _q4_k(rows: Bytes) -> Bytes:
    """float16 d, float16 dmin, 12 bytes of eight 6-bit sub-scales and eight 6-bit sub-minima, 128 bytes of nibbles.

    w = d * sc * q - dmin * m. The nibbles of sub-blocks 2i and 2i + 1 are the low and high halves of 32 bytes.
    """
    blocks = rows.reshape(len(rows), -1, 144)
    low, high, mixed = blocks[:, :, 4:8], blocks[:, :, 8:12], blocks[:, :, 12:16]
    scales = np.concatenate((low & 63, (mixed & 15) | ((low >> 2) & 48)), axis=2)
    minima = np.concatenate((high & 63, (mixed >> 4) | ((high >> 2) & 48)), axis=2)
    d, dmin = (_halves(blocks[:, :, at : at + 2]).astype(np.float32) for at in (0, 2))
    pairs = blocks[:, :, 16:].reshape(len(rows), -1, 1, BLOCK)
    q = np.concatenate((pairs & 15, pairs >> 4), axis=2).reshape(len(rows), -1, BLOCK)
    scale = (d * scales).astype(np.float16).reshape(len(rows), -1)
    minimum = (-dmin * minima).astype(np.float16).reshape(len(rows), -1)
    return join_q4(q, scale, minimum)


def _halves(pair: Bytes) -> npt.NDArray[np.float16]:
    """uint8 [rows, blocks, 2] as float16 [rows, blocks, 1]."""
    return np.ascontiguousarray(pair).view(np.float16)


def _columns(*parts: npt.NDArray[np.uint8 | np.float16]) -> Bytes:
    """The bytes of each part, row by row, one part after another."""
    return np.concatenate([np.ascontiguousarray(p).view(np.uint8).reshape(len(p), -1) for p in parts], axis=1)


_REPACK: dict[tuple[Type, Kind], Callable[[Bytes], Bytes]] = {
    (Type.Q4_0, Kind.Q4S): _q4_0,
    (Type.Q4_0, Kind.Q4): _q4_0_with_minima,
    (Type.Q4_1, Kind.Q4): _q4_1,
    (Type.Q4_K, Kind.Q4): _q4_k,
    (Type.Q8_0, Kind.Q8): _q8_0,
    (Type.MXFP4, Kind.Q8): _mxfp4,
}
_TYPES = {
    Kind.F32: Type.F32,
    Kind.F16: Type.F16,
    Kind.BF16: Type.BF16,
    Kind.Q8: Type.Q8_0,
    Kind.Q4: Type.Q4_1,
    Kind.Q4S: Type.Q4_0,
}
