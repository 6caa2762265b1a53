"""Products of prefill by byte instructions: rows of bytes times several tokens, whose features have 8 bits here.

A token by itself keeps 15 bits (`byte_dot.py`), for nothing but memory binds it; of many tokens the arithmetic is what
takes time, and 8 bits halve it (docs/log.md: what they cost). A token's features are rounded in blocks of 32, by
themselves: what a token comes to does not depend on those beside it.

Tokens come in panels and stay lanes: an instruction multiplies 4 features of 16 tokens with the 4 weights of a row,
spread over a register, and nothing is summed across lanes. A block of a product, 32 features, is a sum of whole numbers
and becomes a float once. Rows are brought into one order, 16 at a time, for all tokens:

    numbers   for each 32 columns, for each 4 of them: a 32-bit word of 4 unsigned bytes of each of the 16 rows
    scales    for each 32 columns: float32 [16]; of Q4 then minima likewise

`quantise_panels` makes of a panel's 32 features a block of 640 bytes:

    numbers   for each 4 features: 4 signed bytes of each of the 16 tokens
    scales    float32 [16]
    offsets   of rows with minima: float32 [16], the sums of the features; else int32 [16], what the product starts
              from: minus the sum of the numbers times the row's number for zero
"""

from typing import Any, NamedTuple

from llvmlite import ir
from numba import carray, types
from numba.core import cgutils
from numba.extending import intrinsic

from warmfront.shared.kernels import simd
from warmfront.shared.kernels.atomics import floats_at, shorts_at
from warmfront.shared.kernels.byte_dot import multiplies_bytes
from warmfront.shared.kernels.fp16 import from_half
from warmfront.shared.kernels.gemm import PANELS, Panels, Rows, by_panels
from warmfront.shared.kernels.jit import kernel
from warmfront.shared.kernels.row_formats import TILED, RowFormat, by_kind
from warmfront.shared.kernels.simd import (
    FLOAT,
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
from warmfront.shared.kernels.tiles import TILE, numbers_of, scales_of, split_bytes
from warmfront.shared.model.formats import BLOCK, Kind
from warmfront.shared.model.panels import LANES

__all__ = [
    "MULTIPLY",
    "OFFSETS",
    "PANEL_BLOCK",
    "SCALES",
    "STRICT",
    "Quantised",
    "multiply_byte_rows",
    "quantise_panels",
    "quantised",
    "store_block",
]

V64, VI32 = vector(I8, 64), vector(I32)
_Q8, _Q4 = int(Kind.Q8), int(Kind.Q4)
# A panel's block: numbers, scales, offsets.
SCALES, OFFSETS, PANEL_BLOCK = 16 * BLOCK, 16 * BLOCK + 64, 16 * BLOCK + 128
# Bytes of 32 columns of the numbers of 16 rows.
_ROWS_BLOCK = TILE * BLOCK
# Rows of a product: with 3 panels 12 sums of integers and as many of floats in registers, beside 3 vectors of tokens.
_ROWS = 4
# Blocks of a product at a time: of three panels they stay in the first cache while all rows meet them.
_BLOCKS = 12
MULTIPLY = "llvm.x86.avx512.vpdpbusd.512"
# LLVM may not reorder what has its own flags: products of one panel and of three must be the same to the bit.
STRICT = ("nsz",)


class _Sixteen(NamedTuple):
    """Addresses of 16 rows in the order above, from one of the rows on; minima: 0 if there are none."""

    numbers: int
    scales: int
    minima: int


def _zero(form: RowFormat) -> int:
    """The number that stands for weight 0; 0 also for rows with minima."""
    assert form.bytes is not None
    return 0 if callable(form.bytes.zero) else form.bytes.zero


@intrinsic
def _zero_of(context, kind):
    def build(_context, b, _signature, arguments):
        return by_kind(b, arguments[0], TILED, lambda form: long(_zero(form)))

    return types.int64(types.int64), build


def _largest(b: Any, values: list[Any]) -> Any:
    """Lane by lane the largest magnitude, NaN if there is one: as integers, whose order is that of such floats."""
    mask, top = constants(0x7FFFFFFF, VI32), constants(0, VI32)
    for each in values:
        top = call(b, "llvm.smax.v16i32", VI32, top, b.and_(b.bitcast(each, VI32), mask))
    return b.bitcast(top, V16)


def _bytes_of(b: Any, values: list[Any]) -> Any:
    """Four vectors of floats, rounded to signed bytes: 32-bit lanes that hold one of each.

    NaN and what is too large become some number: the scale says that it is NaN.
    """
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


def quantised(b: Any, values: list[Any]) -> Quantised:
    """32 vectors of floats in 8 bits a number, with one scale for each lane."""
    largest = _largest(b, values)
    # A block of zeros has scale 0, whose inverse would make NaN of it.
    not_zero = b.fcmp_unordered("!=", largest, constants(0.0))
    inverse = b.select(not_zero, b.fdiv(constants(127.0), largest, flags=STRICT), constants(0.0))
    words, total = [], constants(0, VI32)
    for k in range(0, BLOCK, 4):
        words.append(_bytes_of(b, [b.fmul(each, inverse, flags=STRICT) for each in values[k : k + 4]]))
        total = call(b, MULTIPLY, VI32, total, constants(0x01010101, VI32), words[-1])
    return Quantised(words, b.fmul(largest, constants(1 / 127), flags=STRICT), total)


def store_block(b: Any, out: Any, numbers: Quantised, offsets: Any) -> None:
    """Write a panel's block."""
    for i, word in enumerate(numbers.words):
        store(b, out, long(64 * i), word)
    store(b, out, long(SCALES), numbers.scale)
    store(b, out, long(OFFSETS), offsets)


def _quantise_block(b: Any, x: Any, out: Any, zero: Any) -> None:
    numbers = quantised(b, [load(b, x, long(64 * k), V16) for k in range(BLOCK)])
    start = b.sub(constants(0, VI32), b.mul(numbers.total, splat(b, b.trunc(zero, I32))))
    feature_sum = b.bitcast(b.fmul(b.sitofp(numbers.total, V16), numbers.scale, flags=STRICT), VI32)
    minima = b.icmp_signed("==", zero, long(0))
    store_block(b, out, numbers, b.select(minima, feature_sum, start))


@intrinsic
def _quantise(context, x, out, blocks, zero):
    def build(context, b, _signature, arguments):
        x, out, blocks, zero = arguments
        if multiplies_bytes(context):
            with cgutils.for_range(b, blocks, intp=I64) as loop:
                x_at = b.add(x, b.mul(loop.index, long(64 * BLOCK)))
                _quantise_block(b, x_at, b.add(out, b.mul(loop.index, long(PANEL_BLOCK))), zero)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 4), build


@kernel
def quantise_panels(kind: int, x: int, out: int, cols: int, panels: int) -> None:
    """Quantise float32 [panels, cols, 16] for rows of `kind`, into [panels, cols / 32] blocks of 640 bytes."""
    _quantise(x, out, cols // BLOCK * panels, _zero_of(kind))


@intrinsic
def _products(context, rows, x, y, blocks, panels):
    """4 rows times 1 to 3 panels: y[p][r][:] = or +=.

    x, y: address, step from panel to panel; `blocks`: how many, whether they are a row's first.
    """

    def build(context, b, _signature, arguments):
        *tuples, panels = arguments
        rows, (x, x_step), y, blocks = (cgutils.unpack_tuple(b, each) for each in tuples)

        def emit(minima: bool, count: int) -> None:
            _product(b, rows, [b.add(x, b.mul(x_step, long(p))) for p in range(count)], y, blocks, minima)

        if multiplies_bytes(context):
            by_panels(b, b.icmp_signed("!=", rows[2], long(0)), panels, emit)
        return context.get_dummy_value()

    return types.void(rows, x, y, blocks, types.int64), build


def _product(
    b: Any, rows: tuple[Any, ...], xs: list[Any], y: tuple[Any, Any], blocks: tuple[Any, Any], minima: bool
) -> None:
    numbers_at, scales_at, minima_at = rows
    count, begins = blocks
    cells = [(r, p) for r in range(_ROWS) for p in range(len(xs))]
    places = [b.add(b.mul(y[1], long(p)), long(64 * r)) for r, p in cells]
    sums = [simd.zeros(b) for _ in cells]
    with b.if_then(b.not_(begins)):
        for cell, place in zip(sums, places, strict=True):
            b.store(load(b, y[0], place, V16), cell)
    with cgutils.for_range(b, count, intp=I64) as loop:
        at, scales = b.mul(loop.index, long(PANEL_BLOCK)), b.mul(loop.index, long(4 * TILE))
        numbers = b.mul(loop.index, long(_ROWS_BLOCK))
        offsets = [load(b, x, b.add(at, long(OFFSETS)), VI32) for x in xs]
        products = [constants(0, VI32) if minima else offsets[p] for _, p in cells]
        for word in range(BLOCK // 4):
            tokens = [load(b, x, b.add(at, long(64 * word)), VI32) for x in xs]
            for r in range(_ROWS):
                four = splat(b, load(b, numbers_at, b.add(numbers, long(4 * (TILE * word + r))), I32))
                for p, features in enumerate(tokens):
                    cell = r * len(xs) + p
                    products[cell] = call(b, MULTIPLY, VI32, products[cell], four, features)
        token_scales = [load(b, x, b.add(at, long(SCALES)), V16) for x in xs]
        for i, (r, p) in enumerate(cells):
            scale = splat(b, load(b, scales_at, b.add(scales, long(4 * r)), FLOAT))
            value = b.fmul(b.sitofp(products[i], V16), token_scales[p], flags=STRICT)
            total = call(b, "llvm.fma.v16f32", V16, value, scale, b.load(sums[i]))
            if minima:
                minimum = splat(b, load(b, minima_at, b.add(scales, long(4 * r)), FLOAT))
                total = call(b, "llvm.fma.v16f32", V16, b.bitcast(offsets[p], V16), minimum, total)
            b.store(total, sums[i])
    for cell, place in zip(sums, places, strict=True):
        store(b, y[0], place, b.load(cell))


# A kernel of its own, or LLVM would unroll the loops that call it.
@kernel
def _multiply(rows: _Sixteen, x: Panels, y: Panels, blocks: int, begins: bool) -> None:
    """4 rows times up to 3 panels, in so many blocks; `begins`: these are the first blocks of the rows."""
    at = (rows.numbers, rows.scales, rows.minima)
    _products(at, (x.at, x.step), (y.at, y.step), (blocks, begins), x.panels)


def _transposed(b: Any, words: list[Any]) -> list[Any]:
    """Of vectors of 16 words, word k of vector i, and of those whole vectors further on, becomes word i of vector k."""
    step = 1
    while step < len(words):
        for i in (i for i in range(len(words)) if not i & step):
            low, high = words[i], words[i | step]
            first = [lane if not lane & step else LANES + (lane ^ step) for lane in range(LANES)]
            second = [LANES + lane if lane & step else lane | step for lane in range(LANES)]
            words[i], words[i | step] = (
                b.shuffle_vector(low, high, ir.Constant(vector(I32), order)) for order in (first, second)
            )
        step *= 2
    return words


def _joined(b: Any, parts: list[Any]) -> Any:
    """One vector of several short ones, a power of two of them."""
    while len(parts) > 1:
        lanes = list(range(2 * parts[0].type.count))
        parts = [
            b.shuffle_vector(*couple, ir.Constant(vector(I32, len(lanes)), lanes))
            for couple in zip(parts[::2], parts[1::2], strict=True)
        ]
    return parts[0]


def _gathered(b: Any, form: RowFormat, halves: tuple[Any, Any], stride: Any, block: Any) -> list[Any]:
    """The numbers of a block of 16 rows, `stride` bytes apart, of which 8 begin at each of `halves`."""
    count = 8 if form.kind == Kind.Q8 else 4
    at = b.mul(block, long(4 * count))
    pieces = [load(b, b.add(half, b.mul(stride, long(r))), at, vector(I32, count)) for half in halves for r in range(8)]
    words = _transposed(b, [_joined(b, pieces[i::count]) for i in range(count)])
    if form.kind == Kind.Q8:
        # Of signed bytes unsigned ones: 128 is added, which flips the sign.
        words = [b.xor(each, constants(0x80808080 - (1 << 32), VI32)) for each in words]
    return split_bytes(b, form, [b.bitcast(each, V64) for each in words])


@intrinsic
def _arrange(context, kind, halves, stride, out, blocks):
    """Write the numbers of rows, 8 at each of `halves`, in the order above; `stride` 0: of the tile at the first."""

    def build(context, b, _signature, arguments):
        kind, halves, stride, out, blocks = arguments
        halves = cgutils.unpack_tuple(b, halves, 2)

        def write(block: Any, numbers: list[Any]) -> None:
            for i, each in enumerate(numbers):
                store(b, out, b.add(b.mul(block, long(_ROWS_BLOCK)), long(64 * i)), each)

        def emit(form: RowFormat) -> None:
            with b.if_else(b.icmp_signed("==", stride, long(0))) as (tile, apart):
                with tile, cgutils.for_range(b, blocks, intp=I64) as loop:
                    write(loop.index, numbers_of(b, form, halves[0], loop.index))
                with apart, cgutils.for_range(b, blocks, intp=I64) as loop:
                    write(loop.index, _gathered(b, form, halves, stride, loop.index))

        if multiplies_bytes(context):
            by_kind(b, kind, TILED, emit)
        return context.get_dummy_value()

    return types.void(types.int64, halves, *[types.int64] * 3), build


@intrinsic
def _widen_scales(context, kind, tile, cols, out):
    """Write a tile's scales as float32 [cols / 32, 16] to `out`, and minima likewise behind them."""

    def build(context, b, _signature, arguments):
        kind, tile, cols, out = arguments

        def emit(form: RowFormat) -> None:
            blocks = b.udiv(cols, long(BLOCK))
            with cgutils.for_range(b, blocks, intp=I64) as loop:
                for i, each in enumerate(scales_of(context, b, form, tile, loop.index)):
                    place = b.add(b.mul(blocks, long(i)), loop.index)
                    store(b, out, b.mul(place, long(4 * TILE)), each)

        if multiplies_bytes(context):
            by_kind(b, kind, TILED, emit)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 4), build


@kernel
def _prepare(rows: Rows, tiled: bool, count: int, scratch: int) -> _Sixteen:
    """A tile, or `count` rows, at most 16, in the order of products, in `scratch`."""
    blocks = rows.cols // BLOCK
    scales_at = scratch + blocks * _ROWS_BLOCK
    minima_at = scales_at + blocks * TILE * 4 if rows.kind == _Q4 else 0
    if tiled:
        _widen_scales(rows.kind, rows.at, rows.cols, scales_at)
        _arrange(rows.kind, (rows.at, 0), 0, scratch, blocks)
        return _Sixteen(scratch, scales_at, minima_at)
    # Where there are but 8 rows they stand for the next 8, too, which nobody asks for.
    half = 8 * rows.stride if count > 8 else 0
    _arrange(rows.kind, (rows.at, rows.at + half), rows.stride, scratch, blocks)
    parts = 2 if rows.kind == _Q4 else 1
    scales = carray(floats_at(scales_at), (parts * blocks, TILE))
    for r in range(count):
        halves_at = rows.at + r * rows.stride + rows.cols // (1 if rows.kind == _Q8 else 2)
        halves = carray(shorts_at(halves_at), (parts * blocks,))
        for i in range(parts * blocks):
            scales[i, r] = from_half(halves[i])
    return _Sixteen(scratch, scales_at, minima_at)


@kernel
def multiply_byte_rows(rows: Rows, tiled: bool, low: int, high: int, x: int, y: Panels, scratch: int) -> None:
    """Rows low..high (multiples of 4) of at most 16 times as many panels as `y` has: y[p][r][lane], from row 0 on.

    `tiled`: they are those of a tile; else they lie `rows.stride` apart, 8 or 16 of them. `x`: what `quantise_panels`
    made for rows of this kind; `scratch`: room for 16 rows of float32.
    """
    sixteen, blocks = _prepare(rows, tiled, high, scratch), rows.cols // BLOCK
    x_step = blocks * PANEL_BLOCK
    panel = 0
    while panel < y.panels:
        rest = y.panels - panel
        # Two and two, not three and one, which is slower.
        count = 2 if rest == 4 else min(rest, PANELS)
        for first in range(0, blocks, _BLOCKS):
            some = Panels(x + panel * x_step + first * PANEL_BLOCK, x_step, count)
            for row in range(low, high, _ROWS):
                four = _Sixteen(
                    sixteen.numbers + first * _ROWS_BLOCK + 4 * row,
                    sixteen.scales + (first * TILE + row) * 4,
                    sixteen.minima + (first * TILE + row) * 4 if sixteen.minima else 0,
                )
                out = Panels(y.at + panel * y.step + row * LANES * 4, y.step, count)
                _multiply(four, some, out, min(_BLOCKS, blocks - first), first == 0)
        panel += count
