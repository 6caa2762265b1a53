"""Tiles of the KV cache widened for the matrix products of prefill (`gemm.multiply_columns`)."""

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from warmfront.shared.kernels.attention.kv_tiles import Tile, integers, scale_vectors
from warmfront.shared.kernels.fp16 import widened
from warmfront.shared.kernels.gemm import Rows, gather_columns, in_pairs, multiplies_bfloat, paired
from warmfront.shared.kernels.jit import apart, kernel
from warmfront.shared.kernels.rows import row_stride
from warmfront.shared.kernels.simd import I16, I64, V16, load, long, splat, store
from warmfront.shared.model.formats import BLOCK, Kind
from warmfront.shared.model.kv_layout import TILE

__all__ = ["gather_keys", "gather_values"]

_Q8 = int(Kind.Q8)


def _make_gather(by_row: bool) -> Any:
    @intrinsic
    def gather(context, at, rows, scales, out, pairs):
        """A Q8 strip as float32 [rows][32], or as pairs of bfloat16 [rows / 2][32]; scales of rows or of columns."""

        def build(context, b, _signature, arguments):
            at, rows, scales, out, pairs = arguments
            with cgutils.for_range(b, b.udiv(rows, long(4)), intp=I64) as loop:
                if by_row:
                    starts = (b.add(b.mul(loop.index, long(8)), long(2 * turn)) for turn in range(4))
                    factors = [[widened(context, b, splat(b, load(b, scales, start, I16)))] * 2 for start in starts]
                else:
                    factors = [scale_vectors(context, b, scales, b.udiv(loop.index, long(BLOCK // 4)))] * 4
                for half in (0, 1):
                    numbers = (b.sitofp(row, V16) for row in integers(b, at, loop.index, half, 0 if by_row else 128))
                    weights = [b.fmul(row, factor[half]) for row, factor in zip(numbers, factors, strict=True)]
                    with b.if_else(b.trunc(pairs, ir.IntType(1))) as (then, otherwise):
                        with then:
                            if multiplies_bfloat(context):
                                place = b.add(b.mul(loop.index, long(256)), long(64 * half))
                                store(b, out, place, paired(b, *weights[:2]))
                                store(b, out, b.add(place, long(128)), paired(b, *weights[2:]))
                        with otherwise:
                            place = b.add(b.mul(loop.index, long(512)), long(64 * half))
                            for turn, row in enumerate(weights):
                                store(b, out, b.add(place, long(128 * turn)), row)
            return context.get_dummy_value()

        return types.void(*[types.int64] * 5), build

    return gather


_gather_values, _gather_keys = _make_gather(True), _make_gather(False)


@kernel
def _gather_floats(kind: int, at: int, rows: int, out: int) -> int:
    return int(gather_columns(Rows(kind, at, row_stride(kind, TILE), TILE), rows, 0, out, 0, TILE, 1))


@kernel
def _gathered_bytes(rows: int) -> int:
    return rows * TILE * (2 if in_pairs(_Q8) else 4)


@apart
def gather_keys(tile: Tile, out: int) -> int:
    """Widen a tile's keys for `gemm.multiply_columns`: rows are the head's numbers. Returns where the next belong."""
    if tile.kind != _Q8:
        return _gather_floats(tile.kind, tile.at, tile.numbers, out)
    _gather_keys(tile.at, tile.numbers, tile.at + tile.numbers * TILE, out, 1 if in_pairs(_Q8) else 0)
    return out + _gathered_bytes(tile.numbers)


@apart
def gather_values(tile: Tile, strip: int, out: int) -> int:
    """The same of numbers 32 * `strip` and the next 31 of its values: rows are the positions."""
    if tile.kind != _Q8:
        return _gather_floats(tile.kind, tile.at + strip * TILE * row_stride(tile.kind, TILE), TILE, out)
    scales_at = tile.at + tile.numbers * TILE + strip * TILE * 2
    _gather_values(tile.at + strip * TILE * TILE, TILE, scales_at, out, 1 if in_pairs(_Q8) else 0)
    return out + _gathered_bytes(TILE)
