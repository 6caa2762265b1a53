"""Panels of a prompt's tokens in bytes: what `byte_products.py` multiplies rows with, features of 8 bits.

A token's features are rounded in blocks of 32, by themselves: what a token comes to does not depend on those beside it.
`quantise_panels` makes of 32 features of a panel of 16 tokens a block of 640 bytes:

    numbers   for each 4 features: 4 signed bytes of each of the 16 tokens
    scales    float32 [16]
    offsets   of rows with minima: float32 [16], the sums of the features; else int32 [16], what the product starts
              from: minus the sum of the numbers times the row's number for zero
"""

from typing import Any, NamedTuple

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from warmfront.shared.kernels.byte_dot import Left, Products, adds_in_words, multiplies_bytes
from warmfront.shared.kernels.jit import kernel
from warmfront.shared.kernels.row_formats import TILED, RowFormat, by_kind
from warmfront.shared.kernels.simd import (
    I8,
    I16,
    I32,
    I64,
    V16,
    call,
    constants,
    load,
    long,
    splat,
    store,
    vector,
)
from warmfront.shared.kernels.tiles import zero_number
from warmfront.shared.model.formats import BLOCK

__all__ = [
    "OFFSETS",
    "PANEL_BLOCK",
    "SCALES",
    "Quantised",
    "quantise_panels",
    "quantised",
    "store_block",
    "zero_of",
]

V64, VI32 = vector(I8, 64), vector(I32)
# A panel's block: numbers, scales, offsets.
SCALES, OFFSETS, PANEL_BLOCK = 16 * BLOCK, 16 * BLOCK + 64, 16 * BLOCK + 128


@intrinsic
def zero_of(context, kind):
    """The number that stands for weight 0 in products with rows of `kind`; -1 for rows with minima."""

    def build(context, b, _signature, arguments):
        def emit(form: RowFormat) -> Any:
            zero = zero_number(context, form)
            return long(-1 if zero is None else zero)

        return by_kind(b, arguments[0], TILED, emit)

    return types.int64(types.int64), build


def _largest(b: Any, values: list[Any]) -> Any:
    """Lane by lane the largest magnitude, NaN if there is one: as integers, whose order is that of such floats."""
    mask, top = constants(0x7FFFFFFF, VI32), constants(0, VI32)
    for each in values:
        top = call(b, "llvm.smax.v16i32", VI32, top, b.and_(b.bitcast(each, VI32), mask))
    return b.bitcast(top, V16)


def _bytes_of(context: Any, b: Any, values: list[Any]) -> Any:
    """Four vectors of floats, rounded to signed bytes: 32-bit lanes that hold one of each.

    NaN and what is too large become some number: the scale says that it is NaN.
    """
    if not adds_in_words(context):
        whole = [b.fptosi(call(b, "llvm.rint.v16f32", V16, each), VI32) for each in values]
        low = [b.and_(each, constants(255, VI32)) for each in whole[:3]]
        shifted = [b.shl(each, constants(8 * i, VI32)) for i, each in enumerate([*low, whole[3]])]
        return b.or_(b.or_(*shifted[:2]), b.or_(*shifted[2:]))
    none, all_lanes, current = constants(0, VI32), ir.Constant(I16, -1), ir.Constant(I32, 4)
    round_ = "llvm.x86.avx512.mask.cvtps2dq.512"
    first, second, third, fourth = (call(b, round_, VI32, each, none, all_lanes, current) for each in values)
    half = "llvm.x86.avx512.packssdw.512"
    low, high = (call(b, half, vector(I16, 32), *couple) for couple in ((first, second), (third, fourth)))
    packed = call(b, "llvm.x86.avx512.packsswb.512", V64, low, high)
    # Of each 4 tokens the first numbers, the second ones, ...: by token.
    order = [16 * four + 4 * each + token for four in range(4) for token in range(4) for each in range(4)]
    return b.bitcast(b.shuffle_vector(packed, packed, ir.Constant(vector(I32, 64), order)), VI32)


class Quantised(NamedTuple):
    """32 numbers of each of 16 tokens."""

    # 8 vectors: 4 signed bytes of each token.
    words: list[Any]
    # float32, and the sums of the bytes: a lane for each token.
    scale: Any
    total: Any


def quantised(context: Any, b: Any, values: list[Any]) -> Quantised:
    """32 vectors of floats in 8 bits a number, with one scale for each lane."""
    largest = _largest(b, values)
    # A block of zeros has scale 0, whose inverse would make NaN of it.
    not_zero = b.fcmp_unordered("!=", largest, constants(0.0))
    inverse = b.select(not_zero, b.fdiv(constants(127.0), largest), constants(0.0))
    words, total = [], Products(context, 1)
    for k in range(0, BLOCK, 4):
        words.append(_bytes_of(context, b, [b.fmul(each, inverse) for each in values[k : k + 4]]))
        total.add(b, Left(constants(1, V64)), b.bitcast(words[-1], V64))
    return Quantised(words, b.fmul(largest, constants(1 / 127)), total.total(b))


def store_block(b: Any, out: Any, numbers: Quantised, offsets: Any) -> None:
    """Write a panel's block."""
    for i, word in enumerate(numbers.words):
        store(b, out, long(64 * i), word)
    store(b, out, long(SCALES), numbers.scale)
    store(b, out, long(OFFSETS), offsets)


def _quantise_block(context: Any, b: Any, x: Any, out: Any, zero: Any) -> None:
    numbers = quantised(context, b, [load(b, x, long(64 * k), V16) for k in range(BLOCK)])
    start = b.sub(constants(0, VI32), b.mul(numbers.total, splat(b, b.trunc(zero, I32))))
    feature_sum = b.bitcast(b.fmul(b.sitofp(numbers.total, V16), numbers.scale), VI32)
    minima = b.icmp_signed("==", zero, long(-1))
    store_block(b, out, numbers, b.select(minima, feature_sum, start))


@intrinsic
def _quantise(context, x, out, blocks, zero):
    def build(context, b, _signature, arguments):
        x, out, blocks, zero = arguments
        if multiplies_bytes(context):
            with cgutils.for_range(b, blocks, intp=I64) as loop:
                x_at = b.add(x, b.mul(loop.index, long(64 * BLOCK)))
                _quantise_block(context, b, x_at, b.add(out, b.mul(loop.index, long(PANEL_BLOCK))), zero)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 4), build


@kernel
def quantise_panels(kind: int, x: int, out: int, cols: int, panels: int) -> None:
    """Quantise float32 [panels, cols, 16] for rows of `kind`, into [panels, cols / 32] blocks of 640 bytes."""
    _quantise(x, out, cols // BLOCK * panels, zero_of(kind))
