"""Tiles: 16 rows of a matrix interleaved, for products in which every row is computed, on CPUs that multiply bytes.

A row by itself ends in a sum over the lanes, and loads the whole input for its own use. In a tile each lane is a row:
a register holds 4 columns of 16 rows, an instruction multiplies it with the 4 bytes of the input that all of them
meet, and nothing is summed across lanes. The bytes of a tile are those of its 16 rows in another order, at the same
place, made when the weights are loaded. For each 32 columns, a block of every row, there are

    numbers   for each 32-bit word of a row's block: the words of the 16 rows; those of Q8 with 128 added, for the
              instruction takes one side unsigned
    scales    16 float16; of Q4 then minima likewise

so that a tile is read from its first byte to its last: scales behind all numbers, where rows have them, are a second
stream, which no fetching ahead of the first one meets (measured from memory: 1.1 to 1.3 times slower).

The rows behind the last 16 stay rows.
"""

from collections.abc import Iterable, Iterator, Sequence
from operator import itemgetter
from typing import Any

import numpy as np
from llvmlite import ir
from numba import carray, types
from numba.core import cgutils
from numba.extending import intrinsic

from warmfront.shared.kernels import simd
from warmfront.shared.kernels.atomics import address_of, floats_at, shorts_at, words_at
from warmfront.shared.kernels.byte_dot import (
    Left,
    Products,
    block_offset,
    inputs_at_once,
    left,
    most_inputs,
    multiplies_bytes,
    quantised_parts,
    signed,
)
from warmfront.shared.kernels.fp16 import from_half, widened
from warmfront.shared.kernels.gemm import Panels, Rows
from warmfront.shared.kernels.jit import apart, kernel
from warmfront.shared.kernels.row_formats import FORMATS, TILED, RowFormat, block_bytes, by_kind
from warmfront.shared.kernels.rows import Pair, row_stride
from warmfront.shared.kernels.simd import (
    I8,
    I16,
    I32,
    I64,
    V16,
    constants,
    fma,
    load,
    long,
    splat,
    store,
    vector,
)
from warmfront.shared.model.formats import BLOCK, Kind
from warmfront.shared.model.panels import LANES

__all__ = [
    "TILE",
    "in_order",
    "in_tiles",
    "interleave",
    "multiply_tile",
    "multiply_tiles",
    "numbers_of",
    "scales_of",
    "split_bytes",
    "widen_tiled_row",
    "zero_number",
]

# Rows of a tile: one for each lane.
TILE = LANES
V64 = vector(I8, 64)
_Q8, _Q4 = int(Kind.Q8), int(Kind.Q4)


@intrinsic
def _in_tiles(context, kind):
    def build(context, b, _signature, arguments):
        def emit(form: RowFormat) -> Any:
            return ir.Constant(ir.IntType(1), int(form in TILED and multiplies_bytes(context)))

        return by_kind(b, arguments[0], FORMATS, emit)

    return types.boolean(types.int64), build


@kernel
def in_tiles(kind: int) -> bool:
    """Whether matrices of this weight type are held in tiles on this machine."""
    return _in_tiles(kind)


@kernel
def _block_parts(kind: int) -> tuple[int, int]:
    """What a row has in a block: 32-bit words of numbers, and float16 of scale and minimum."""
    return (8, 1) if kind == _Q8 else (4, 2 if kind == _Q4 else 1)


@apart
def interleave(kind: int, at: int, rows: int, cols: int) -> None:
    """Turn `rows` packed rows at `at`, a multiple of 16, into tiles in their place."""
    stride, blocks = row_stride(kind, cols), cols // BLOCK
    words, halves = _block_parts(kind)
    flip = np.uint32(0x80808080) if kind == _Q8 else np.uint32(0)
    kept = np.empty(TILE * stride // 4, np.uint32)
    for first in range(0, rows, TILE):
        tile_at = at + first * stride
        old = carray(words_at(tile_at), (len(kept),))
        for i in range(len(kept)):
            kept[i] = old[i]
        for r in range(TILE):
            # Asked for anew each time: an address alone does not keep an array's memory.
            row_at = address_of(kept) + r * stride
            numbers = carray(words_at(row_at), (blocks, words))
            scales = carray(shorts_at(row_at + 4 * words * blocks), (halves, blocks))
            for block in range(blocks):
                block_at = tile_at + block * TILE * (4 * words + 2 * halves)
                new = carray(words_at(block_at), (words, TILE))
                new_scales = carray(shorts_at(block_at + 4 * words * TILE), (halves, TILE))
                for i in range(words):
                    new[i, r] = numbers[block, i] ^ flip
                for i in range(halves):
                    new_scales[i, r] = scales[i, block]


def _block_at(b: Any, form: RowFormat, tile: Any, block: Any) -> Any:
    return b.add(tile, b.mul(block, long(TILE * block_bytes(form.kind))))


def numbers_of(context: Any, b: Any, form: RowFormat, tile: Any, block: Any) -> Iterator[tuple[int, Left]]:
    """The numbers of 32 columns: 8 vectors of 64 bytes, each 4 columns of the 16 rows; i: columns 4 * i to 4 * i + 3.

    Each is loaded when it is asked for: AVX2 has not the registers for all.
    """
    count = 8 if form.kind == Kind.Q8 else 4
    at = _block_at(b, form, tile, block)
    return split_bytes(context, b, form, (load(b, at, long(64 * i), V64) for i in range(count)))


def split_bytes(context: Any, b: Any, form: RowFormat, loaded: Iterable[Any]) -> Iterator[tuple[int, Left]]:
    """The numbers of 32 columns, as `numbers_of`, from the 8 vectors of Q8, or the 4 of the other types."""
    for i, each in enumerate(loaded):
        if form.kind == Kind.Q8:
            yield i, left(context, b, each, form.largest)
        else:
            # A byte holds columns j and j + 16 of its row's block.
            yield i, Left(b.and_(each, constants(15, V64)))
            yield i + 4, Left(b.lshr(each, constants(4, V64)))


def in_order(numbers: Iterator[tuple[int, Left]]) -> list[Left]:
    """All that `numbers_of` gives."""
    return [each for _, each in sorted(numbers, key=itemgetter(0))]


def zero_number(context: Any, form: RowFormat) -> int | None:
    """The number that stands for weight 0 in products; None for rows that have minima."""
    if form.bytes is None or callable(form.bytes.zero):
        return None
    return 0 if signed(context, form.largest) else form.bytes.zero


def scales_of(context: Any, b: Any, form: RowFormat, tile: Any, block: Any) -> list[Any]:
    """Scales of the 16 rows in a block as float32, and minima if the type has them."""
    count = 2 if form.kind == Kind.Q4 else 1
    first = TILE * (block_bytes(form.kind) - 2 * count)
    at = _block_at(b, form, tile, block)
    return [widened(context, b, load(b, at, long(first + 2 * TILE * i), vector(I16))) for i in range(count)]


def _tile_dot(
    context: Any,
    b: Any,
    form: RowFormat,
    tiles: Sequence[Any],
    cols: Any,
    inputs: list[Any],
    outs: list[Any],
    ahead: Any,
) -> None:
    """Tiles times quantised inputs; `outs`: for each tile the addresses of each input's 16 sums.

    The numbers of a block are loaded and unpacked once for all inputs. A row has a sum of its own for each input, made
    in the same steps however many tiles and inputs there are.
    """
    parts = [(q, *quantised_parts(b, q, cols)) for q in inputs]
    sums = [[simd.zeros(b) for _ in inputs] for _ in tiles]
    with cgutils.for_range(b, b.udiv(cols, long(BLOCK)), intp=I64) as loop:
        for tile, totals in zip(tiles, sums, strict=True):
            _add_block(context, b, form, (tile, loop.index), parts, totals, ahead)
    for places, totals in zip(outs, sums, strict=True):
        for y, total in zip(places, totals, strict=True):
            store(b, y, long(0), b.load(total))


def _add_block(
    context: Any, b: Any, form: RowFormat, place: tuple[Any, Any], inputs: list[Any], totals: list[Any], ahead: Any
) -> None:
    """Add what a block, place: tile and number, gives for each input."""
    tile, block = place
    next_at = b.add(_block_at(b, form, tile, block), ahead)
    start, four_bytes = block_offset(b, block), b.mul(block, long(4))
    parts = [[Products(context, form.largest) for _ in (0, 1)] for _ in inputs]
    for turn, (i, numbers) in enumerate(numbers_of(context, b, form, tile, block)):
        simd.fetch_part(b, next_at, TILE * block_bytes(form.kind), turn, 8)
        # The 4 bytes of the input that these columns meet; the second half of a block is 32 bytes on.
        at = b.add(start, long(4 * i if i < 4 else 32 + 4 * (i - 4)))
        for (*halves, _, _), products in zip(inputs, parts, strict=True):
            for half, half_at in enumerate(halves):
                four = b.bitcast(splat(b, load(b, half_at, at, I32)), V64)
                products[half].add(b, numbers, four)
    row_scale, *row_minima = scales_of(context, b, form, tile, block)
    for (*_, input_scales, input_sums), products, total_at in zip(inputs, parts, totals, strict=True):
        high, low = (each.total(b) for each in products)
        whole = b.add(b.shl(high, constants(7, vector(I32))), low)
        scale = splat(b, load(b, input_scales, four_bytes, simd.FLOAT))
        block_sum = splat(b, load(b, input_sums, four_bytes, I32))
        if zero := zero_number(context, form):
            # What the numbers' offset has added, exactly: number - zero is the weight.
            whole = b.sub(whole, b.mul(block_sum, constants(zero, vector(I32))))
        total = fma(b, b.fmul(b.sitofp(whole, V16), scale), row_scale, b.load(total_at))
        for minimum in row_minima:
            total = fma(b, b.fmul(b.sitofp(block_sum, V16), scale), minimum, total)
        b.store(total, total_at)


def _make_tile(count: int) -> Any:
    @intrinsic
    def tile_dot(context, kind, tiles, cols, x, y, ahead):
        """`count` inputs. `tiles`: addresses; `x`: address of the first input, bytes to the next; `y`: for each tile
        the address of the first's sums, then bytes to the next's."""

        def build(context, b, _signature, arguments):
            kind, tiles, cols, x, y, ahead = arguments
            tiles, (x_at, x_step), (*outs, y_step) = (cgutils.unpack_tuple(b, each) for each in (tiles, x, y))
            inputs = [b.add(x_at, b.mul(x_step, long(i))) for i in range(count)]
            places = [[b.add(at, b.mul(y_step, long(i))) for i in range(count)] for at in outs]

            def emit(form: RowFormat) -> None:
                if multiplies_bytes(context) and count <= most_inputs(context):
                    _tile_dot(context, b, form, tiles, cols, inputs, places, ahead)

            by_kind(b, kind, TILED, emit)
            return context.get_dummy_value()

        return types.void(types.int64, tiles, types.int64, x, y, types.int64), build

    return tile_dot


_tile_1, _tile_2, _tile_4 = (_make_tile(count) for count in (1, 2, 4))


@apart
def multiply_tile(kind: int, tile: int, cols: int, x: Panels, y: Panels, ahead: int) -> None:
    """The 16 rows of a tile times the quantised inputs of a batch's tokens, into float32 [16] of each.

    A token's sums have the same bits whatever tokens are beside it. `ahead`: how many bytes ahead to fetch, 0: not at
    all.
    """
    most = inputs_at_once()
    for token in range(0, y.panels, most):
        some = min(y.panels - token, most)
        x_at, y_at = x.at + token * x.step, y.at + token * y.step
        if some == 4:
            _tile_4(kind, (tile,), cols, (x_at, x.step), (y_at, y.step), ahead)
        elif some > 1:
            _tile_2(kind, (tile,), cols, (x_at, x.step), (y_at, y.step), ahead)
        if some % 2 == 1:
            last = some - 1
            last_ahead = ahead if some == 1 else 0
            _tile_1(kind, (tile,), cols, (x_at + last * x.step, x.step), (y_at + last * y.step, y.step), last_ahead)
        ahead = 0


@apart
def multiply_tiles(kind: int, tiles: Pair, cols: int, x: Panels, y: Panels, other_y: int, ahead: int) -> None:
    """`multiply_tile` for two tiles; the second one's sums go to `other_y`, as far apart as the first's.

    For one token block by block in turns: memory is read faster in two places at once (docs/log.md), and several tokens
    have enough to compute.
    """
    if y.panels == 1:
        _tile_1(kind, tiles, cols, (x.at, x.step), (y.at, other_y, y.step), ahead)
        return
    multiply_tile(kind, tiles[0], cols, x, y, ahead)
    multiply_tile(kind, tiles[1], cols, x, Panels(other_y, y.step, y.panels), ahead)


@apart
def widen_tiled_row(rows: Rows, row: int, out: int) -> None:
    """Write one row of a matrix in tiles as float32 [cols] to `out`."""
    kind, cols = rows.kind, rows.cols
    tile_at, lane = rows.at + row // TILE * TILE * rows.stride, row % TILE
    words, parts = _block_parts(kind)
    weights = carray(floats_at(out), (cols,))
    for block in range(cols // BLOCK):
        block_at = tile_at + block * TILE * (4 * words + 2 * parts)
        numbers = carray(words_at(block_at), (words, TILE))
        halves = carray(shorts_at(block_at + 4 * words * TILE), (parts, TILE))
        scale = from_half(halves[0, lane])
        minimum = from_half(halves[1, lane]) if kind == _Q4 else scale * np.float32(-128 if kind == _Q8 else -8)
        for k in range(BLOCK):
            # A word of Q8 holds four columns, of 4 bits four in its low and four in its high nibbles.
            if kind == _Q8:
                number = numbers[k // 4, lane] >> np.uint32(k % 4 * 8) & np.uint32(255)
            else:
                shift = k % 4 * 8 + k // 16 * 4
                number = numbers[k % 16 // 4, lane] >> np.uint32(shift) & np.uint32(15)
            weights[block * BLOCK + k] = np.float32(number) * scale + minimum
