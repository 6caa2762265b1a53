"""Low-bit copies of gate rows, for guessing which gates open: 1 or 2 bits a weight and a scale for 32 of them.

    row   cols (padded to 64) * bits / 8 bytes, then cols/32 x float16 scale
          2 bits: w = (q - 1.5) * scale, q in 0..3; byte j of 64 weights holds in its bits 0-1, 2-3, 4-5, 6-7 one of
                  weights 0-15, 32-47, 16-31, 48-63 each: the order of `byte_dot.quantise_input`
          1 bit:  w = (q - 0.5) * scale; 64 bits in that order
    4 bits: a row of Q4 (`shared/model/formats.py`)

The scale is the one of least squares: for normal weights 2 bits correlate to 0.94 with them, 1 bit to 0.80, 4 bits
to 0.995 (Max 1960, "Quantizing for minimum distortion").
"""

from typing import Any

import numpy as np
import numpy.typing as npt
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from warmfront.shared.kernels import rows, simd
from warmfront.shared.kernels.byte_dot import byte_dot, multiplies_bytes
from warmfront.shared.kernels.fp16 import widened
from warmfront.shared.kernels.jit import kernel
from warmfront.shared.kernels.simd import I8, I16, I32, I64, V16, constants, fma, load, long, splat, vector
from warmfront.shared.model.formats import BLOCK, Kind, pack, row_bytes, unpack
from warmfront.shared.model.panels import LANES

__all__ = ["lowbit_bytes", "lowbit_dot", "pack_lowbit", "unpack_lowbit"]

_PAIR = 2 * BLOCK
# Of 64 weights, in this order.
_ORDER = np.r_[0:16, 32:48, 16:32, 48:64]
_Q4 = int(Kind.Q4)
# Rows packed at a time, so that what lies between stays in the cache.
_ROWS = 64

Bytes = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.float32]


def lowbit_bytes(bits: int, cols: int) -> int:
    """Bytes of a row of `cols` weights, a multiple of 32."""
    if bits == 4:
        return row_bytes(Kind.Q4, cols)
    return -(-cols // _PAIR) * _PAIR * bits // 8 + cols // BLOCK * 2


def pack_lowbit(values: Floats, bits: int) -> Bytes:
    """Round float32 [rows, cols] to `bits` bits a weight: uint8 [rows, lowbit_bytes]."""
    if bits == 4:
        return pack(values, Kind.Q4)
    parts = (_pack(values[first : first + _ROWS], bits) for first in range(0, len(values), _ROWS))
    return np.concatenate([np.empty((0, lowbit_bytes(bits, values.shape[1])), np.uint8), *parts])


def _pack(values: Floats, bits: int) -> Bytes:
    rows, cols = values.shape
    blocks = np.asarray(values, np.float32).reshape(rows, -1, BLOCK)
    scale = np.sqrt(np.square(blocks).mean(2)) if bits == 2 else 2 * np.abs(blocks).mean(2)
    # Least squares by turns: levels from the scale, the scale from the levels (1 bit has no levels to
    # choose but the sign).
    for _ in range(3 if bits == 2 else 0):
        levels = _levels(blocks, scale, bits) - (2**bits - 1) / 2
        scale = (blocks * levels).sum(2) / np.square(levels).sum(2)
    scale = scale.astype(np.float16)
    q = np.zeros((rows, -(-cols // _PAIR) * _PAIR), np.uint8)
    q[:, :cols] = _levels(blocks, scale.astype(np.float32), bits).reshape(rows, cols)
    ordered = q.reshape(rows, -1, _PAIR)[:, :, _ORDER]
    if bits == 1:
        numbers: Bytes = np.packbits(ordered, axis=2, bitorder="little")
    else:
        quarters = ordered.reshape(rows, -1, 4, 16)
        numbers = np.bitwise_or.reduce(quarters << np.array([0, 2, 4, 6], np.uint8)[:, None], axis=2)
    return np.concatenate((numbers.reshape(rows, -1), scale.view(np.uint8).reshape(rows, -1)), axis=1)


def _levels(blocks: Floats, scale: Floats, bits: int) -> Bytes:
    inverse = np.divide(1, scale, out=np.zeros_like(scale), where=scale > 0)
    q = np.floor(blocks * inverse[:, :, None]) + 2 ** (bits - 1)
    return np.asarray(np.clip(q, 0, 2**bits - 1), np.uint8)


def unpack_lowbit(data: Bytes, bits: int, cols: int) -> Floats:
    """Widen uint8 [rows, lowbit_bytes] to float32 [rows, cols]."""
    if bits == 4:
        return unpack(data, Kind.Q4, cols)
    rows, size = len(data), lowbit_bytes(bits, cols) - cols // BLOCK * 2
    numbers = np.ascontiguousarray(data[:, :size])
    scale = np.ascontiguousarray(data[:, size:]).view(np.float16).astype(np.float32)
    q = np.empty((rows, size * 8 // bits // _PAIR, _PAIR), np.uint8)
    if bits == 1:
        q[:, :, _ORDER] = np.unpackbits(numbers, axis=1, bitorder="little").reshape(q.shape)
    else:
        sixteen = numbers.reshape(rows, -1, 1, 16)
        q[:, :, _ORDER] = (sixteen >> np.array([0, 2, 4, 6], np.uint8)[:, None] & 3).reshape(q.shape)
    levels = q.reshape(rows, -1)[:, :cols].astype(np.float32) - np.float32((2**bits - 1) / 2)
    return np.asarray(levels.reshape(rows, -1, BLOCK) * scale[:, :, None], np.float32).reshape(rows, cols)


def _levels_of_pair(b: Any, bits: int, row: Any, pair: Any) -> Any:
    """64 numbers as bytes."""
    if bits == 1:
        mask = b.bitcast(load(b, row, b.mul(pair, long(8)), I64), ir.VectorType(ir.IntType(1), _PAIR))
        return b.zext(mask, vector(I8, _PAIR))
    four = load(b, row, b.mul(pair, long(16)), vector(I32, 4))
    each = b.shuffle_vector(four, four, ir.Constant(vector(I32), list(range(4)) * 4))
    shifts = ir.Constant(vector(I32), [2 * (lane // 4) for lane in range(LANES)])
    quarters = b.and_(b.lshr(each, shifts), constants(0x03030303, vector(I32)))
    return b.bitcast(quarters, vector(I8, _PAIR))


def _make_dot(bits: int) -> Any:
    @intrinsic
    def dot_of_bits(context, row, x, cols):
        def build(context, b, _signature, arguments):
            row, x, cols = arguments
            size = b.mul(b.udiv(b.add(cols, long(_PAIR - 1)), long(_PAIR)), long(_PAIR * bits // 8))
            scales = b.add(row, size)
            if multiplies_bytes(context):

                def halves(at: Any) -> Any:
                    return widened(context, b, load(b, scales, at, vector(I16)))

                def levels(pair: Any) -> Any:
                    return _levels_of_pair(b, bits, row, pair)

                return byte_dot(context, b, x, cols, levels, halves, (2**bits - 1) / 2, 2**bits - 1)
            sums = simd.zeros(b)
            middle = constants((2**bits - 1) / 2)
            with cgutils.for_range(b, b.udiv(cols, long(BLOCK)), intp=I64) as loop:
                numbers = _levels_of_pair(b, bits, row, b.udiv(loop.index, long(2)))
                odd = b.icmp_unsigned("==", b.urem(loop.index, long(2)), long(1))
                scale = widened(context, b, splat(b, load(b, scales, b.mul(loop.index, long(2)), I16)))
                for half in (0, 1):
                    parts = [
                        b.shuffle_vector(numbers, numbers, ir.Constant(vector(I32), list(range(first, first + LANES))))
                        for first in (32 * half, 32 * half + 16)
                    ]
                    levels = b.uitofp(b.select(odd, parts[1], parts[0]), V16)
                    at = b.add(b.mul(loop.index, long(128)), long(64 * half))
                    scaled = b.fmul(load(b, x, at, V16), scale)
                    b.store(fma(b, b.fsub(levels, middle), scaled, b.load(sums)), sums)
            return simd.total(b, b.load(sums))

        return types.float32(types.int64, types.int64, types.int64), build

    return dot_of_bits


_dot_1, _dot_2 = _make_dot(1), _make_dot(2)


@kernel
def lowbit_dot(bits: int, row: int, q: int, cols: int) -> Any:
    """Inner product of a row of 1, 2 or 4 bits with the input at `q` (from `quantise_input`), as `rows.dot`."""
    if bits == 1:
        return _dot_1(row, q, cols)
    if bits == 2:
        return _dot_2(row, q, cols)
    return rows.dot(_Q4, row, q, q, cols, 0)
