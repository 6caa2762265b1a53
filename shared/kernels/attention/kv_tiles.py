"""Compiled arithmetic on tiles of the KV cache, whose layout is that of `shared/model/kv_layout.py`.

Keys and values are the same product, sums over the rows of a strip, for all query heads that share it: what comes from
memory is converted once for all of them. 8-bit tiles are multiplied as bytes where the CPU can. The other side has 15
or 16 bits then, in two bytes, so that little more is lost than by the rounding of the cache.
"""

from typing import Any, NamedTuple

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from warmfront.shared.kernels import simd
from warmfront.shared.kernels.byte_dot import adds_in_words, split_block
from warmfront.shared.kernels.fp16 import widened
from warmfront.shared.kernels.jit import apart, kernel
from warmfront.shared.kernels.row_formats import FORMATS, RowFormat, by_kind
from warmfront.shared.kernels.rows import row_stride
from warmfront.shared.kernels.simd import (
    FLOAT,
    I8,
    I16,
    I32,
    I64,
    V16,
    call,
    constants,
    fetch,
    fma,
    load,
    long,
    splat,
    store,
    vector,
)
from warmfront.shared.model.formats import BLOCK, Kind, row_bytes
from warmfront.shared.model.kv_layout import TILE

__all__ = ["Heads", "Tile", "add_values", "integers", "multiply_keys", "quantise_heads", "scale_vectors"]

_Q8 = int(Kind.Q8)
_CACHED = [form for form in FORMATS if form.kind in (Kind.F32, Kind.F16, Kind.Q8)]
_MULTIPLY_BYTES = "llvm.x86.avx512.vpdpbusd.512"
_STEPS = 65535.0  # the largest of what values are multiplied with, in two unsigned bytes
# Heads of a product: 16 sums of integers, two parts of the other side and two vectors of a strip stay in registers.
_HEADS = 4


class Tile(NamedTuple):
    """The keys or the values of a head in 32 positions."""

    # Weight type.
    kind: int
    at: int
    # Of the head, a multiple of 32.
    numbers: int
    # Fetch meanwhile the tile that lies so many bytes behind this one; 0: none.
    ahead: int


class Heads(NamedTuple):
    """Where a vector of each query head lies: addresses `at`, `at` + `step`, ..."""

    at: int
    step: int


def integers(b: Any, at: Any, four: Any, half: int, zero: int) -> list[Any]:
    """Rows 4 * `four` and the next three of half the columns of a Q8 strip, whose bytes mean `zero` less: int32."""
    words = load(b, at, b.add(b.mul(four, long(128)), long(64 * half)), vector(I32))
    if zero:
        words = b.xor(words, constants(0x80808080 - (1 << 32), vector(I32)))
    high = constants(24, vector(I32))
    return [b.ashr(b.shl(words, constants(24 - 8 * turn, vector(I32))), high) for turn in range(4)]


def scale_vectors(context: Any, b: Any, at: Any, block: Any) -> list[Any]:
    """32 float16 scales of a block, as two float vectors."""
    starts = (b.add(b.mul(block, long(64)), long(32 * half)) for half in (0, 1))
    return [widened(context, b, load(b, at, start, vector(I16))) for start in starts]


def _float_sums(context: Any, b: Any, form: RowFormat, strip: Any, x: list[Any], sums: list[list[Any]]) -> None:
    """Of a strip of floats."""
    at, rows, ahead = strip
    size = row_bytes(form.kind, TILE)
    # A multiply-add takes four cycles, and two of them a cycle need eight sums: with few heads two rows at a time.
    turns = 2 if len(x) <= 2 else 1
    others = [[simd.zeros(b) for _ in pair] for pair in sums] if turns == 2 else []
    with cgutils.for_range(b, b.udiv(rows, long(turns)), intp=I64) as loop:
        for turn, totals in enumerate((sums, others)[:turns]):
            row = b.add(b.mul(loop.index, long(turns)), long(turn))
            offset = b.mul(row, long(size))
            fetch(b, b.add(at, offset), ahead, size)
            halves = form.weights(context, b, b.add(at, offset), long(TILE), long(0))
            for head, pair in zip(x, totals, strict=True):
                factor = splat(b, load(b, head, b.mul(row, long(4)), FLOAT))
                for weights, total in zip(halves, pair, strict=True):
                    b.store(fma(b, weights, factor, b.load(total)), total)
    for pair, more in zip(sums, others, strict=False):
        for total, other in zip(pair, more, strict=True):
            b.store(b.fadd(b.load(total), b.load(other)), total)


def _byte_sums(context: Any, b: Any, strip: Any, x: list[Any], sums: list[list[Any]]) -> None:
    """Of Q8 keys, with what `quantise_heads` made: integers within 32 rows, exact, then floats."""
    at, rows, ahead = strip
    scales_at = b.add(at, b.mul(rows, long(TILE)))
    nothing = constants(0, vector(I32))
    with cgutils.for_range(b, b.udiv(rows, long(BLOCK)), intp=I64) as loop:
        # 127 * 255 * 32 of the high parts times 128, and as much of the low ones, stay below 2^31.
        parts = [[[nothing, nothing] for _ in (0, 1)] for _ in x]
        for four in range(BLOCK // 4):
            offset = b.add(b.mul(loop.index, long(TILE * BLOCK)), long(128 * four))
            fetch(b, b.add(at, offset), ahead, 128)
            numbers = [load(b, at, b.add(offset, long(64 * half)), vector(I8, 64)) for half in (0, 1)]
            for head, products in zip(x, parts, strict=True):
                first = b.add(b.mul(loop.index, long(BLOCK)), long(4 * four))
                for part, start in enumerate((first, b.add(rows, first))):
                    bytes_ = b.bitcast(splat(b, load(b, head, start, I32)), vector(I8, 64))
                    for half in (0, 1):
                        products[half][part] = call(
                            b, _MULTIPLY_BYTES, vector(I32), products[half][part], numbers[half], bytes_
                        )
        factors = scale_vectors(context, b, scales_at, loop.index)
        word = b.mul(loop.index, long(4))
        for head, products, pair in zip(x, parts, sums, strict=True):
            scale_at = b.add(head, b.mul(rows, long(2)))
            scale = splat(b, load(b, scale_at, word, FLOAT))
            # The bytes are the numbers + 128.
            above = load(b, b.add(scale_at, b.udiv(rows, long(8))), word, I32)
            above = splat(b, b.shl(above, ir.Constant(I32, 7)))
            for (high, low), factor, total in zip(products, factors, pair, strict=True):
                whole = b.sub(b.add(b.shl(high, constants(7, vector(I32))), low), above)
                b.store(fma(b, b.sitofp(whole, V16), b.fmul(factor, scale), b.load(total)), total)


def _wide_sums(context: Any, b: Any, strip: Any, x: list[Any], sums: list[list[Any]]) -> None:
    """Of Q8 keys where the CPU does not multiply bytes."""
    at, rows, ahead = strip
    scales_at = b.add(at, b.mul(rows, long(TILE)))
    with cgutils.for_range(b, b.udiv(rows, long(BLOCK)), intp=I64) as loop:
        blocks = [[simd.zeros(b) for _ in pair] for pair in sums]
        offset = b.mul(loop.index, long(TILE * BLOCK))
        inputs = [b.add(head, b.mul(loop.index, long(4 * BLOCK))) for head in x]
        _wide_rows(b, b.add(at, offset), 128, inputs, blocks)
        fetch(b, b.add(at, offset), ahead, TILE * BLOCK)
        factors = scale_vectors(context, b, scales_at, loop.index)
        for pair, totals in zip(blocks, sums, strict=True):
            for block, factor, total in zip(pair, factors, totals, strict=True):
                b.store(fma(b, b.load(block), factor, b.load(total)), total)


def _wide_rows(b: Any, at: Any, zero: int, x: list[Any], sums: list[list[Any]]) -> None:
    """Add 32 rows of bytes at `at` times the floats of each head, which lie at `x`."""
    with cgutils.for_range(b, long(BLOCK // 4), intp=I64) as loop:
        halves = [[b.sitofp(row, V16) for row in integers(b, at, loop.index, half, zero)] for half in (0, 1)]
        for turn in range(4):
            place = b.add(b.mul(loop.index, long(16)), long(4 * turn))
            for head, pair in zip(x, sums, strict=True):
                factor = splat(b, load(b, head, place, FLOAT))
                for half, total in zip(halves, pair, strict=True):
                    b.store(fma(b, half[turn], factor, b.load(total)), total)


def _make_product(heads: int) -> Any:
    @intrinsic
    def product(context, strip, x, x_step, y, y_step, adding):
        """y[h][:] (+)= sum over the rows of x[h][row] * row[:] for `heads` heads; Q8: of keys only."""

        def build(context, b, _signature, arguments):
            strip, x, x_step, y, y_step, adding = arguments
            kind, *where = cgutils.unpack_tuple(b, strip, 4)
            inputs = [b.add(x, b.mul(x_step, long(h))) for h in range(heads)]
            sums = [[simd.zeros(b) for _ in (0, 1)] for _ in range(heads)]
            cells = [
                (sums[h][half], b.add(b.mul(y_step, long(h)), long(64 * half))) for h in range(heads) for half in (0, 1)
            ]
            with b.if_then(b.icmp_signed("!=", adding, long(0))):
                for cell, at in cells:
                    b.store(load(b, y, at, V16), cell)

            def emit(form: RowFormat) -> None:
                if form.kind != Kind.Q8:
                    _float_sums(context, b, form, where, inputs, sums)
                elif adds_in_words(context):
                    _byte_sums(context, b, where, inputs, sums)
                else:
                    _wide_sums(context, b, where, inputs, sums)

            by_kind(b, kind, _CACHED, emit)
            for cell, at in cells:
                store(b, y, at, b.load(cell))
            return context.get_dummy_value()

        return types.void(strip, *[types.int64] * 5), build

    return product


_product_1, _product_2, _product_3, _product_4 = (_make_product(heads) for heads in range(1, _HEADS + 1))


def _largest(b: Any, halves: list[Any]) -> Any:
    """Of 32 floats that are not negative; at least 1e-30, so that 65535 times its inverse is finite."""
    largest, least = simd.largest(b, halves), ir.Constant(FLOAT, float(np.float32(1e-30)))
    return b.select(b.fcmp_ordered("<", largest, least), least, largest)


def _make_mix(heads: int) -> Any:
    @intrinsic
    def mix(context, tile, x, x_step, y, y_step):
        """y[h][:] += sum over the positions of x[h][position] * value[:] of a tile of Q8 for `heads` heads."""

        def build(context, b, _signature, arguments):
            tile, x, x_step, y, y_step = arguments
            _, at, numbers, ahead = cgutils.unpack_tuple(b, tile, 4)
            whole = adds_in_words(context)
            scales_at = b.add(at, b.mul(numbers, long(TILE)))
            weights = [b.ptrtoint(cgutils.alloca_once(b, vector(FLOAT, 32)), I64) for _ in range(heads)]
            chances, shrunk = [], []
            seen: list[Any] = []
            for h in range(heads):
                own = [load(b, b.add(x, b.mul(x_step, long(h))), long(64 * half), V16) for half in (0, 1)]
                seen = seen or [b.fcmp_unordered("une", half, constants(0.0)) for half in own]
                if whole:
                    # A chance may be tiny beside that of another tile, and there are thousands: each tile has its step.
                    shrunk.append(b.fdiv(_largest(b, own), ir.Constant(FLOAT, _STEPS)))
                    factor = splat(b, b.fdiv(ir.Constant(FLOAT, 1.0), shrunk[h]))
                    own = [b.fmul(half, factor) for half in own]
                chances.append(own)
            with cgutils.for_range(b, b.udiv(numbers, long(BLOCK)), intp=I64) as loop:
                strip = b.mul(loop.index, long(TILE * BLOCK))
                # Of positions without weight the scale must not count: what is there may be of another text.
                found = zip(seen, scale_vectors(context, b, scales_at, loop.index), strict=True)
                scales = [b.select(mask, half, constants(0.0)) for mask, half in found]
                if whole:
                    # An infinite scale makes the result infinite or NaN, as it should be.
                    largest = _largest(b, scales)
                    inverse = splat(b, b.fdiv(ir.Constant(FLOAT, 1.0), largest))
                    scales = [b.fmul(half, inverse) for half in scales]
                for own, out in zip(chances, weights, strict=True):
                    _weigh(context, b, scales, own, out)
                fetch(b, b.add(at, strip), ahead, TILE * BLOCK)
                sums = [[simd.zeros(b) for _ in (0, 1)] for _ in range(heads)]
                if whole:
                    factors = [b.fmul(largest, each) for each in shrunk]
                    _byte_values(b, b.add(at, strip), weights, factors, sums)
                else:
                    _wide_rows(b, b.add(at, strip), 0, weights, sums)
                for h, pair in enumerate(sums):
                    for half, total in enumerate(pair):
                        place = b.add(b.mul(loop.index, long(128)), b.add(b.mul(y_step, long(h)), long(64 * half)))
                        store(b, y, place, b.fadd(load(b, y, place, V16), b.load(total)))
            return context.get_dummy_value()

        return types.void(tile, *[types.int64] * 4), build

    return mix


def _weigh(context: Any, b: Any, scales: list[Any], chances: list[Any], out: Any) -> None:
    """Chances of 32 positions times their scales, at `out`: floats, or for byte products 16 bits, low bytes first."""
    weights = [b.fmul(scale, chance) for scale, chance in zip(scales, chances, strict=True)]
    if not adds_in_words(context):
        for half, values in enumerate(weights):
            store(b, out, long(64 * half), values)
        return
    rounded = (call(b, "llvm.rint.v16f32", V16, values) for values in weights)
    first, second = (b.bitcast(b.fptosi(values, vector(I32)), vector(I8, 64)) for values in rounded)
    order = [4 * position + part for part in (0, 1) for position in range(TILE)]
    store(b, out, long(0), b.shuffle_vector(first, second, ir.Constant(vector(I32, 64), order)))


def _byte_values(b: Any, at: Any, x: list[Any], factors: list[Any], sums: list[list[Any]]) -> None:
    """The 32 rows of a strip of Q8 values times what `_weigh` made for each head, which is not negative."""
    nothing = constants(0, vector(I32))
    # 255 * 127 * 32 of the high parts times 256, and as much of the low ones, stay below 2^31.
    parts = [[[nothing, nothing] for _ in (0, 1)] for _ in x]
    for four in range(BLOCK // 4):
        numbers = [load(b, at, long(128 * four + 64 * half), vector(I8, 64)) for half in (0, 1)]
        for head, products in zip(x, parts, strict=True):
            for part in (0, 1):
                bytes_ = b.bitcast(splat(b, load(b, head, long(32 * part + 4 * four), I32)), vector(I8, 64))
                for half in (0, 1):
                    products[half][part] = call(
                        b, _MULTIPLY_BYTES, vector(I32), products[half][part], bytes_, numbers[half]
                    )
    for products, factor, pair in zip(parts, factors, sums, strict=True):
        for (low, high), total in zip(products, pair, strict=True):
            whole = b.add(b.shl(high, constants(8, vector(I32))), low)
            b.store(b.fmul(b.sitofp(whole, V16), splat(b, factor)), total)


_mix_1, _mix_2, _mix_3, _mix_4 = (_make_mix(heads) for heads in range(1, _HEADS + 1))


class _Strip(NamedTuple):
    """A strip, or all of a tile of keys."""

    kind: int
    at: int
    rows: int
    ahead: int


@kernel
def _multiply(strip: _Strip, x: Heads, y: Heads, heads: int, adding: int) -> None:
    for head in range(0, heads, _HEADS):
        x_at, y_at, rest = x.at + head * x.step, y.at + head * y.step, heads - head
        if rest >= 4:
            _product_4(strip, x_at, x.step, y_at, y.step, adding)
        elif rest == 3:
            _product_3(strip, x_at, x.step, y_at, y.step, adding)
        elif rest == 2:
            _product_2(strip, x_at, x.step, y_at, y.step, adding)
        else:
            _product_1(strip, x_at, x.step, y_at, y.step, adding)


@apart
def multiply_keys(tile: Tile, x: Heads, y: Heads, heads: int) -> None:
    """Scores of the tile's 32 positions: y[h][position] = x[h] . key.

    `x`: float32 [numbers] of each head, from `quantise_heads`; `y`: float32 [32] of each.
    """
    _multiply(_Strip(tile.kind, tile.at, tile.numbers, tile.ahead), x, y, heads, 0)


@apart
def add_values(tile: Tile, x: Heads, y: Heads, heads: int) -> None:
    """y[h] += sum over the tile's 32 positions of x[h][position] * value.

    `x`: float32 [32] of each head, not negative, and 0 of the same positions for all; `y`: float32 [numbers] of each.
    """
    if tile.kind != _Q8:
        size = TILE * row_stride(tile.kind, TILE)
        for strip in range(tile.numbers // TILE):
            values = _Strip(tile.kind, tile.at + strip * size, TILE, tile.ahead)
            _multiply(values, x, Heads(y.at + strip * TILE * 4, y.step), heads, 1)
        return
    for head in range(0, heads, _HEADS):
        x_at, y_at, rest = x.at + head * x.step, y.at + head * y.step, heads - head
        if rest >= 4:
            _mix_4(tile, x_at, x.step, y_at, y.step)
        elif rest == 3:
            _mix_3(tile, x_at, x.step, y_at, y.step)
        elif rest == 2:
            _mix_2(tile, x_at, x.step, y_at, y.step)
        else:
            _mix_1(tile, x_at, x.step, y_at, y.step)


def _split(b: Any, halves: list[Any], out: Any, rows: Any, block: Any) -> None:
    """32 floats as two parts of a byte each at `out`: int8 [rows] twice, float32 [rows / 32] scales, int32 sums."""
    numbers = split_block(b, halves)
    for part, start in ((numbers.high, long(0)), (numbers.low, rows)):
        for half, values in enumerate(part):
            at = b.add(start, b.add(b.mul(block, long(BLOCK)), long(16 * half)))
            store(b, out, at, b.trunc(values, vector(I8)))
    scales_at, word = b.mul(rows, long(2)), b.mul(block, long(4))
    store(b, out, b.add(scales_at, word), numbers.scale)
    store(b, out, b.add(b.add(scales_at, b.udiv(rows, long(8))), word), numbers.total)


@intrinsic
def _quantise_head(context, x, out, rows):
    """Returns where the product finds the head."""

    def build(context, b, _signature, arguments):
        x, out, rows = arguments
        if not adds_in_words(context):
            return x
        with cgutils.for_range(b, b.udiv(rows, long(BLOCK)), intp=I64) as loop:
            at = b.mul(loop.index, long(128))
            _split(b, [load(b, x, b.add(at, long(64 * half)), V16) for half in (0, 1)], out, rows, loop.index)
        return out

    return types.int64(types.int64, types.int64, types.int64), build


@apart
def quantise_heads(kind: int, x: int, out: int, rows: int, heads: int) -> int:
    """float32 [heads, rows] at `x` as `multiply_keys` takes them for tiles of `kind`: returns their address.

    `out`: as much memory, used if need be.
    """
    if kind != _Q8:
        return x
    for head in range(1, heads):
        _quantise_head(x + head * rows * 4, out + head * rows * 4, rows)
    return _quantise_head(x, out, rows)
