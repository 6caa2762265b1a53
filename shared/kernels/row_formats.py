"""How compiled code reads a row of each weight type: one record a type, in the table `FORMATS`.

The bytes are specified in `shared/model/formats.py`. A new weight type is its numpy side there, a record here and a
branch of `widen` in `gpu_worker/ffn.cu`; every kernel takes its code from the table (`by_kind`).
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from llvmlite import ir

from warmfront.shared.kernels.fp16 import widened
from warmfront.shared.kernels.simd import (
    I8,
    I16,
    I32,
    V16,
    chosen,
    constants,
    fetch,
    fma,
    load,
    long,
    splat,
    vector,
)
from warmfront.shared.model.formats import BLOCK, Kind, row_bytes

__all__ = [
    "DOWN_TILED",
    "FORMATS",
    "PLAIN",
    "TILED",
    "ByteFormat",
    "RowFormat",
    "block_bytes",
    "by_kind",
    "column_scales",
    "fetch_blocks",
    "stride",
]

V32, V64 = vector(I8, 32), vector(I8, 64)


class ByteFormat(NamedTuple):
    """How a row is read where the CPU multiplies bytes (`byte_dot.py`): w = (number - zero) * scale of its block."""

    # numbers(b, row, pair): the 64 numbers of blocks 2 * pair and 2 * pair + 1, unsigned bytes in the input's order.
    numbers: Callable[[Any, Any, Any], Any]
    # scales(context, b, row, cols, at): float32 scales of 16 blocks, from byte `at` of the float16 scales on.
    scales: Callable[[Any, Any, Any, Any, Any], Any]
    # The number that stands for weight 0, or, called like `scales`, what number 0 stands for.
    zero: int | Callable[[Any, Any, Any, Any, Any], Any]
    # The largest of the numbers.
    largest: int


class RowFormat(NamedTuple):
    """How rows of one weight type are read."""

    kind: Kind
    # weights(context, b, row, cols, block): weights 0..15 and 16..31 of a block of 32, as two float32 vectors.
    weights: Callable[[Any, Any, Any, Any, Any], tuple[Any, Any]]
    # None: inner products take the weights as floats on every CPU.
    bytes: ByteFormat | None = None

    @property
    def largest(self) -> int:
        """Of the numbers of a row, as unsigned bytes."""
        return 15 if self.bytes is None else self.bytes.largest


def _two(b: Any, row: Any, block: Any, type_: Any, size: int) -> tuple[Any, Any]:
    """Both halves of a block, vectors of `type_` of `size` bytes each."""
    first = b.mul(block, long(2 * size))
    return load(b, row, first, type_), load(b, row, b.add(first, long(size)), type_)


def _scale(context: Any, b: Any, row: Any, scales: Any, block: Any) -> Any:
    """The float16 of `block` of those at byte `scales` of the row, as float32 in all lanes.

    Spread before it is widened: a scalar load of 16 bits merges into an old register, and the kernel would wait for its
    own accumulator (measured: half the speed).
    """
    return widened(context, b, splat(b, load(b, row, b.add(scales, b.mul(block, long(2))), I16)))


def _f32(context: Any, b: Any, row: Any, cols: Any, block: Any) -> tuple[Any, Any]:
    return _two(b, row, block, V16, 64)


def _f16(context: Any, b: Any, row: Any, cols: Any, block: Any) -> tuple[Any, Any]:
    low, high = (widened(context, b, half) for half in _two(b, row, block, vector(I16), 32))
    return low, high


def _bf16(context: Any, b: Any, row: Any, cols: Any, block: Any) -> tuple[Any, Any]:
    shift = constants(16, vector(I32))
    longs = (b.zext(half, vector(I32)) for half in _two(b, row, block, vector(I16), 32))
    low, high = (b.bitcast(b.shl(half, shift), V16) for half in longs)
    return low, high


def _q8(context: Any, b: Any, row: Any, cols: Any, block: Any) -> tuple[Any, Any]:
    scale = _scale(context, b, row, cols, block)
    longs = (b.sext(half, vector(I32)) for half in _two(b, row, block, vector(I8), 16))
    low, high = (b.fmul(b.sitofp(half, V16), scale) for half in longs)
    return low, high


def _nibbles(context: Any, b: Any, row: Any, cols: Any, block: Any) -> tuple[Any, Any]:
    """The bare numbers 0..15 of a block; Q4C's weights, whose scales are the columns'."""
    both = b.zext(load(b, row, b.mul(block, long(16)), vector(I8)), vector(I32))
    low, high = b.and_(both, constants(15, vector(I32))), b.lshr(both, constants(4, vector(I32)))
    return b.sitofp(low, V16), b.sitofp(high, V16)


def _q4(context: Any, b: Any, row: Any, cols: Any, block: Any) -> tuple[Any, Any]:
    low, high = _nibbles(context, b, row, cols, block)
    half = b.udiv(cols, long(2))
    scale = _scale(context, b, row, half, block)
    minimum = _scale(context, b, row, b.add(half, b.udiv(cols, long(BLOCK // 2))), block)
    return fma(b, low, scale, minimum), fma(b, high, scale, minimum)


def _q4s(context: Any, b: Any, row: Any, cols: Any, block: Any) -> tuple[Any, Any]:
    low, high = _nibbles(context, b, row, cols, block)
    scale = _scale(context, b, row, b.udiv(cols, long(2)), block)
    # q * scale - 8 * scale: as exact as (q - 8) * scale, for 8 * scale is only a change of the exponent.
    minimum = b.fmul(scale, constants(-8.0))
    return fma(b, low, scale, minimum), fma(b, high, scale, minimum)


def _unsigned_bytes(b: Any, row: Any, pair: Any) -> Any:
    """Of Q8: VNNI takes one side unsigned, so 128 is added, which flips the sign bit."""
    both = load(b, row, b.mul(pair, long(64)), V64)
    order = [*range(16), *range(32, 48), *range(16, 32), *range(48, 64)]
    return b.xor(b.shuffle_vector(both, both, ir.Constant(vector(I32, 64), order)), constants(128, V64))


def _unsigned_nibbles(b: Any, row: Any, pair: Any) -> Any:
    """Of the 4-bit types: low nibbles are the first halves of two blocks, high nibbles the second ones."""
    both = load(b, row, b.mul(pair, long(32)), V32)
    low, high = b.and_(both, constants(15, V32)), b.lshr(both, constants(4, V32))
    return b.shuffle_vector(low, high, ir.Constant(vector(I32, 64), list(range(64))))


def _scales_behind(divisor: int, blocks_before: int = 0) -> Callable[[Any, Any, Any, Any, Any], Any]:
    """Float16 scales of 16 blocks that follow cols / `divisor` bytes of numbers and so many float16 of each block."""

    def scales(context: Any, b: Any, row: Any, cols: Any, at: Any) -> Any:
        start = b.add(b.udiv(cols, long(divisor)), b.mul(b.udiv(cols, long(BLOCK)), long(2 * blocks_before)))
        return widened(context, b, load(b, b.add(row, start), at, vector(I16)))

    return scales


FORMATS = (
    RowFormat(Kind.F32, _f32),
    RowFormat(Kind.F16, _f16),
    RowFormat(Kind.BF16, _bf16),
    RowFormat(Kind.Q8, _q8, ByteFormat(_unsigned_bytes, _scales_behind(1), 128, 255)),
    RowFormat(Kind.Q4, _q4, ByteFormat(_unsigned_nibbles, _scales_behind(2), _scales_behind(2, 1), 15)),
    RowFormat(Kind.Q4S, _q4s, ByteFormat(_unsigned_nibbles, _scales_behind(2), 8, 15)),
    RowFormat(Kind.Q4C, _nibbles),
)
# Those whose rows say all of their weights; a Q4C row needs its group's column scales.
PLAIN = tuple(form for form in FORMATS if form.kind != Kind.Q4C)
# Those that tiles know: numbers of 8 or 4 bits, then a scale for each block. Rows of others stay rows, in products of
# many tokens too, which are of floats then.
TILED = tuple(form for form in FORMATS if form.kind in (Kind.Q8, Kind.Q4, Kind.Q4S))
# The same of down rows, where the scales may be of columns.
DOWN_TILED = tuple(form for form in FORMATS if form in TILED or form.kind == Kind.Q4C)


def by_kind(b: Any, kind: Any, formats: Sequence[RowFormat], emit: Callable[[RowFormat], Any]) -> Any:
    """The code `emit(format)` of each of `formats`, of which the number `kind` chooses one at run time: its value.

    Any other number is taken for the first format's.
    """
    by_code = {int(form.kind): form for form in formats}
    return chosen(b, kind, list(by_code), lambda code: emit(by_code[code]))


def block_bytes(kind: Kind) -> int:
    """By how much a block more lengthens a row."""
    return row_bytes(kind, 2 * BLOCK) - row_bytes(kind, BLOCK)


def stride(b: Any, kind: Kind, cols: Any) -> Any:
    """Bytes of a row, as `formats.row_bytes`, which is linear in the blocks."""
    size = block_bytes(kind)
    return b.add(b.mul(b.udiv(cols, long(BLOCK)), long(size)), long(row_bytes(kind, BLOCK) - size))


def fetch_blocks(b: Any, kind: Kind, row: Any, ahead: Any, block: Any, blocks: int = 1) -> None:
    """Fetch what lies `ahead` bytes behind `blocks` blocks of the row from `block` on; where that is 0, nothing.

    As many lines as the blocks are long, scales included, though these lie at the row's end: over a row that is all.
    """
    size = block_bytes(kind)
    fetch(b, b.add(row, b.mul(block, long(size))), ahead, size * blocks)


def column_scales(context: Any, b: Any, tail: Any, cols: Any, at: Any) -> tuple[Any, Any]:
    """Of Q4C: scale and minimum of 16 columns, the first at byte offset `at` of the scales, from a group's tail."""
    minima = b.add(at, b.mul(cols, long(2)))
    scale, minimum = (widened(context, b, load(b, tail, start, vector(I16))) for start in (at, minima))
    return scale, minimum
