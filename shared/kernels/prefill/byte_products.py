"""Products of prefill by byte instructions: rows of bytes times several tokens, whose features have 8 bits here.

A token by itself keeps 15 bits (`byte_dot.py`), for nothing but memory binds it; of many tokens the arithmetic is what
takes time, and 8 bits halve it (docs/log.md: what they cost). `byte_panels.py` makes the tokens' bytes.

Rows are the lanes: a register holds 4 columns of the 16 rows of a tile, and an instruction multiplies them with the 4
features of a token, spread over a register. The numbers of 32 rows in 32 columns stay in 16 registers while one token
after the other meets them: rows are brought into their order in registers, and a product costs what its tokens do,
however few they are. A block of a product, 32 features, is a sum of whole numbers and becomes a float once.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

from llvmlite import ir
from numba import carray, types
from numba.core import cgutils
from numba.extending import intrinsic

from warmfront.shared.kernels.atomics import floats_at, shorts_at
from warmfront.shared.kernels.byte_dot import Left, Products, adds_in_words, multiplies_bytes
from warmfront.shared.kernels.fp16 import from_half
from warmfront.shared.kernels.gemm import Panels, Rows
from warmfront.shared.kernels.jit import apart, kernel
from warmfront.shared.kernels.prefill.byte_panels import OFFSETS, PANEL_BLOCK, SCALES
from warmfront.shared.kernels.row_formats import TILED, RowFormat, block_bytes, by_kind
from warmfront.shared.kernels.simd import (
    FLOAT,
    I8,
    I32,
    I64,
    V16,
    constants,
    fetch,
    fma,
    load,
    long,
    splat,
    store,
    vector,
)
from warmfront.shared.kernels.tiles import TILE, in_order, numbers_of, scales_of, split_bytes
from warmfront.shared.model.formats import BLOCK, Kind
from warmfront.shared.model.panels import LANES, PRODUCT_TOKENS

__all__ = [
    "each_token",
    "multiplied",
    "multiply_byte_rows",
    "multiply_thirty_two",
    "transposed",
    "turn_tokens",
]

V64, VI32 = vector(I8, 64), vector(I32)
_Q8, _Q4 = int(Kind.Q8), int(Kind.Q4)


def transposed(b: Any, vectors: list[Any]) -> list[Any]:
    """Of n vectors, element k of vector i, and of those n elements further on, becomes element i of vector k."""
    lanes, step = vectors[0].type.count, 1
    while step < len(vectors):
        for i in (i for i in range(len(vectors)) if not i & step):
            low, high = vectors[i], vectors[i | step]
            first = [lane if not lane & step else lanes + (lane ^ step) for lane in range(lanes)]
            second = [lanes + lane if lane & step else lane | step for lane in range(lanes)]
            vectors[i], vectors[i | step] = (
                b.shuffle_vector(low, high, ir.Constant(vector(I32, lanes), order)) for order in (first, second)
            )
        step *= 2
    return vectors


def _joined(b: Any, parts: list[Any]) -> Any:
    """One vector of several short ones, a power of two of them."""
    while len(parts) > 1:
        lanes = list(range(2 * parts[0].type.count))
        parts = [
            b.shuffle_vector(*couple, ir.Constant(vector(I32, len(lanes)), lanes))
            for couple in zip(parts[::2], parts[1::2], strict=True)
        ]
    return parts[0]


def _gathered(context: Any, b: Any, form: RowFormat, halves: tuple[Any, Any], stride: Any, block: Any) -> list[Left]:
    """The numbers of a block of 16 rows, `stride` bytes apart, of which 8 begin at each of `halves`."""
    count = 8 if form.kind == Kind.Q8 else 4
    at = b.mul(block, long(4 * count))
    pieces = [load(b, b.add(half, b.mul(stride, long(r))), at, vector(I32, count)) for half in halves for r in range(8)]
    words = transposed(b, [_joined(b, pieces[i::count]) for i in range(count)])
    if form.kind == Kind.Q8:
        # Of signed bytes unsigned ones: 128 is added, which flips the sign.
        words = [b.xor(each, constants(0x80808080 - (1 << 32), VI32)) for each in words]
    return in_order(split_bytes(context, b, form, (b.bitcast(each, V64) for each in words)))


@contextmanager
def each_token(b: Any, x: Any, step: Any, tokens: Any) -> Iterator[tuple[Any, Any]]:
    """Code for one token after the other: its number, and where its words are in a block of panels `step` bytes apart.

    Two loops: in the inner one the words' place is an addition.
    """
    panels = b.lshr(b.add(tokens, long(LANES - 1)), long(4))
    with cgutils.for_range(b, panels, intp=I64) as panel:
        first, at = b.shl(panel.index, long(4)), b.add(x, b.mul(panel.index, step))
        rest = b.sub(tokens, first)
        some = b.select(b.icmp_signed("<", rest, long(LANES)), rest, long(LANES))
        with cgutils.for_range(b, some, intp=I64) as lane:
            yield b.add(first, lane.index), b.add(at, b.shl(lane.index, long(2)))


def multiplied(
    context: Any, b: Any, form: RowFormat, numbers: Sequence[list[Left]], token: Any, starts: list[Any]
) -> list[Any]:
    """For each of some registers full of rows, from what it starts: plus its numbers times a token's 32 features."""
    # Two sums each: a product of words waits five cycles for its sum, and a core has not enough waiting for one.
    turns = 2 if adds_in_words(context) else 1
    sums = [
        [Products(context, form.largest, start if turn == 0 else None) for turn in range(turns)] for start in starts
    ]
    for word in range(BLOCK // 4):
        four = b.bitcast(splat(b, load(b, token, long(64 * word), I32)), V64)
        for own, rows in zip(sums, numbers, strict=True):
            own[word % turns].add(b, rows[word], four)
    totals = [[each.total(b) for each in own] for own in sums]
    return [own[0] if turns == 1 else b.add(*own) for own in totals]


class _Half(NamedTuple):
    """16 rows in 32 columns: their numbers, scales, and minima, if the type has them."""

    numbers: list[Left]
    scales: Any
    minima: list[Any]


def _add_block(
    context: Any, b: Any, form: RowFormat, halves: list[_Half], x: tuple[Any, Any], tokens: Any, sums: Any
) -> None:
    """32 rows in 32 columns times tokens: sums[token][row] += ...; x: address of the block, step between panels."""
    with each_token(b, *x, tokens) as (number, token):
        offset = splat(b, load(b, token, long(OFFSETS), I32))
        scale = splat(b, load(b, token, long(SCALES), FLOAT))
        starts = [constants(0, VI32) if half.minima else offset for half in halves]
        products = multiplied(context, b, form, [half.numbers for half in halves], token, starts)
        for i, (half, whole) in enumerate(zip(halves, products, strict=True)):
            place = b.add(b.mul(number, long(8 * TILE)), long(4 * TILE * i))
            value = b.fmul(b.sitofp(whole, V16), scale)
            total = fma(b, value, half.scales, load(b, sums, place, V16))
            for minimum in half.minima:
                total = fma(b, b.bitcast(offset, V16), minimum, total)
            store(b, sums, place, total)


@intrinsic
def _products(context, kind, rows, x, tokens, sums):
    """32 rows times tokens: sums[token][row] += ...

    rows: where each 8 of them begin, bytes from row to row, their scales; or, with 0 bytes, two tiles, at the first and
    the third place; then how many columns. x: address, step from panel to panel.
    """

    def build(context, b, _signature, arguments):
        kind, rows, x, tokens, sums = arguments
        *eights, stride, widened, cols = cgutils.unpack_tuple(b, rows)
        x_at, step = cgutils.unpack_tuple(b, x)
        blocks = b.udiv(cols, long(BLOCK))

        def tiled(form: RowFormat, at: Any, block: Any) -> _Half:
            size = TILE * block_bytes(form.kind)
            fetch(b, b.add(at, b.mul(block, long(size))), long(2 * size), size)
            scales, *minima = scales_of(context, b, form, at, block)
            return _Half(in_order(numbers_of(context, b, form, at, block)), scales, minima)

        def apart(form: RowFormat, half: int, block: Any) -> _Half:
            numbers = _gathered(context, b, form, (eights[2 * half], eights[2 * half + 1]), stride, block)
            places = [b.add(b.mul(blocks, long(i)), block) for i in range(1 + (form.kind == Kind.Q4))]
            scales, *minima = (
                load(b, widened, b.add(b.mul(place, long(8 * TILE)), long(4 * TILE * half)), V16) for place in places
            )
            return _Half(numbers, scales, minima)

        def emit(form: RowFormat) -> None:
            with b.if_else(b.icmp_signed("==", stride, long(0))) as (in_tiles, in_rows):
                with in_tiles, cgutils.for_range(b, blocks, intp=I64) as loop:
                    halves = [tiled(form, at, loop.index) for at in (eights[0], eights[2])]
                    place = b.add(x_at, b.mul(loop.index, long(PANEL_BLOCK)))
                    _add_block(context, b, form, halves, (place, step), tokens, sums)
                with in_rows, cgutils.for_range(b, blocks, intp=I64) as loop:
                    halves = [apart(form, half, loop.index) for half in (0, 1)]
                    place = b.add(x_at, b.mul(loop.index, long(PANEL_BLOCK)))
                    _add_block(context, b, form, halves, (place, step), tokens, sums)

        if multiplies_bytes(context):
            by_kind(b, kind, TILED, emit)
        return context.get_dummy_value()

    return types.void(types.int64, rows, x, types.int64, types.int64), build


@kernel
def _widen_scales(rows: Rows, count: int, out: int) -> None:
    """Write the scales of `count` rows, at most 32, as float32 [cols / 32, 32] to `out`, and minima likewise behind."""
    blocks, parts = rows.cols // BLOCK, 2 if rows.kind == _Q4 else 1
    scales = carray(floats_at(out), (parts * blocks, 2 * TILE))
    for r in range(count):
        halves_at = rows.at + r * rows.stride + rows.cols // (1 if rows.kind == _Q8 else 2)
        halves = carray(shorts_at(halves_at), (parts * blocks,))
        for i in range(parts * blocks):
            scales[i, r] = from_half(halves[i])


@apart
def multiply_thirty_two(rows: Rows, tiled: bool, count: int, x: Panels, tokens: int, sums: int, scratch: int) -> None:
    """32 rows times tokens, into float32 [tokens, 32].

    `count`: how many rows there are, 8, 16, 24 or 32; sums of others are anything. `tiled`: they are those of tiles;
    else they lie `rows.stride` apart. `x`: what `quantise_panels` made for rows of this kind; `scratch`: float32
    [2, cols].
    """
    # Rows that are not there are others once more, which nobody asks for.
    second, third = 8 * rows.stride * (count > 8), TILE * rows.stride * (count > TILE)
    fourth = 3 * 8 * rows.stride if count > 3 * 8 else third
    eights = (rows.at, rows.at + second, rows.at + third, rows.at + fourth)
    if not tiled:
        _widen_scales(rows, count, scratch)
    for first in range(0, tokens, PRODUCT_TOKENS):
        some = min(PRODUCT_TOKENS, tokens - first)
        part = carray(floats_at(sums + first * 8 * TILE), (some * 2 * TILE,))
        part[:] = 0
        stride = 0 if tiled else rows.stride
        inputs = (x.at + first // LANES * x.step, x.step)
        _products(rows.kind, (*eights, stride, scratch, rows.cols), inputs, some, sums + first * 8 * TILE)


@intrinsic
def _turn(context, rows, out):
    """From float32 [16 tokens, 32] a panel [32, 16]."""

    def build(context, b, _signature, arguments):
        rows, out = arguments
        for half in range(0, 4 * 2 * TILE, 4 * TILE):
            words = [load(b, rows, long(8 * TILE * token + half), VI32) for token in range(LANES)]
            for row, values in enumerate(transposed(b, words)):
                store(b, out, long(LANES * half + 4 * LANES * row), values)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), build


@apart
def turn_tokens(sums: int, tokens: int, out: int) -> None:
    """From float32 [tokens, 32] panels [32, 16]; the lanes behind the last token are 0.

    There is room for whole panels on both sides.
    """
    padded = (tokens + LANES - 1) // LANES * LANES
    rest = carray(floats_at(sums + tokens * 8 * TILE), ((padded - tokens) * 2 * TILE,))
    rest[:] = 0
    for token in range(0, padded, LANES):
        _turn(sums + token * 8 * TILE, out + token * 8 * TILE)


@apart
def multiply_byte_rows(rows: Rows, tiled: bool, low: int, high: int, x: int, y: Panels, scratch: int) -> None:
    """Rows low..high (multiples of 4) of at most 32 times as many panels as `y` has: y[p][r][lane], from row 0 on.

    `tiled`: they are those of tiles; else they lie `rows.stride` apart, `high` of them. `x`: what `quantise_panels`
    made for rows of this kind; `scratch`: float32 [8, cols] and `PRODUCT_FLOATS`.
    """
    x_step = rows.cols // BLOCK * PANEL_BLOCK
    sums_at = scratch + 8 * rows.cols
    panel_at = sums_at + PRODUCT_TOKENS * 8 * TILE
    for panel in range(0, y.panels, PRODUCT_TOKENS // LANES):
        some = min(PRODUCT_TOKENS // LANES, y.panels - panel)
        inputs = Panels(x + panel * x_step, x_step, some)
        multiply_thirty_two(rows, tiled, high, inputs, some * LANES, sums_at, scratch)
        for p in range(some):
            out_at = y.at + (panel + p) * y.step
            if high - low == 2 * TILE:
                _turn(sums_at + p * LANES * 8 * TILE, out_at)
                continue
            _turn(sums_at + p * LANES * 8 * TILE, panel_at)
            own, out = carray(floats_at(panel_at), (2 * TILE * LANES,)), carray(floats_at(out_at), (2 * TILE * LANES,))
            for i in range(low * LANES, high * LANES):
                out[i] = own[i]
