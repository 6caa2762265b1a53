"""Matrix product of the compiled pass, for a batch of decoded tokens and for panels of a prompt's."""

from typing import NamedTuple

import numpy as np
from numba import carray

from warmfront.coordinator.decode.network import BIAS, Network, State
from warmfront.shared.kernels.atomics import address_of, floats_at
from warmfront.shared.kernels.by_address.kernels import call_at, entry_of
from warmfront.shared.kernels.byte_dot import quantise_batch
from warmfront.shared.kernels.fetching import MATRIX_ROWS
from warmfront.shared.kernels.gemm import Panels, Rows
from warmfront.shared.kernels.jit import apart, inlined, kernel
from warmfront.shared.kernels.prefill.matrix import multiply_tokens, pack_tokens
from warmfront.shared.kernels.rows import dot_two, row_stride, takes_quantised, widen
from warmfront.shared.kernels.tiles import TILE, in_tiles, multiply_tile, multiply_tiles, widen_tiled_row
from warmfront.shared.model.panels import LANES

__all__ = ["Input", "Matrix", "add_bias", "entry_of_linear", "layer_matrix", "linear", "packed_input", "widen_row"]


class Matrix(NamedTuple):
    """A packed matrix: rows, or, where `in_tiles(kind)`, tiles and the rows that fill none."""

    kind: int
    # Addresses of the rows and of a float32 bias, 0 if there is none.
    at: int
    bias_at: int
    rows: int
    # Weights of a row.
    cols: int
    # How many bytes ahead it is fetched, 0: not at all.
    ahead: int


class Input(NamedTuple):
    """What a matrix is multiplied with: x [panels, cols, lanes]."""

    at: int
    # The same as rows of the matrix's kind want it: see `packed_input`; of a batch also the bytes of a token.
    packed_at: int
    packed_row: int
    # Of a batch: its tokens, and 1.
    panels: int
    lanes: int


@inlined
def layer_matrix(net: Network, layer: int, part: int, rows: int, cols: int) -> Matrix:
    """Matrix `part` of q, k, v and o of a layer."""
    kind, at, bias_at = net.kinds[layer, part], net.weights[layer, part], net.weights[layer, part + BIAS]
    return Matrix(kind, at, bias_at, rows, cols, net.ahead[MATRIX_ROWS, kind])


@kernel
def _packed(kind: int, x_at: int, out_at: int, cols: int, panels: int, lanes: int) -> tuple[int, int]:
    if lanes > 1:
        return pack_tokens(kind, x_at, out_at, cols, panels), 0
    return quantise_batch(x_at, out_at, cols, panels) if takes_quantised(kind) else (x_at, 0)


@inlined
def packed_input(kind: int, x_at: int, out_at: int, cols: int, panels: int, lanes: int) -> Input:
    """x [panels, cols, lanes] for one matrix of `kind` or several: quantised, or as pairs, in `out_at` if need be."""
    packed_at, packed_row = _packed(kind, x_at, out_at, cols, panels, lanes)
    return Input(x_at, packed_at, packed_row, panels, lanes)


@apart
def _multiply_tiles(matrix: Matrix, low: int, high: int, x: Input, y_at: int, rows: int) -> None:
    """Rows low..high of a matrix in tiles times a batch's quantised inputs into float32 y [tokens, rows]."""
    stride = row_stride(matrix.kind, matrix.cols)
    inputs = Panels(x.packed_at, x.packed_row, x.panels)
    # Two at a time, one from each half of the tiles of which all rows are wanted.
    begin, half = -(-low // TILE) * TILE, max(high // TILE - -(-low // TILE), 0) // 2 * TILE
    for first in range(begin, begin + half, TILE):
        at, y = matrix.at + first * stride, Panels(y_at + first * 4, rows * 4, x.panels)
        multiply_tiles(matrix.kind, (at, at + half * stride), matrix.cols, inputs, y, y.at + half * 4, matrix.ahead)
    part = np.empty((x.panels, TILE), np.float32)
    for first in range(low // TILE * TILE, high, TILE):
        if begin <= first < begin + 2 * half:
            continue
        # Where the threads' ranges cut a tile, both compute all of it and keep what is theirs.
        whole = first >= low and first + TILE <= high
        out = Panels(y_at + first * 4, rows * 4, x.panels) if whole else Panels(address_of(part), TILE * 4, x.panels)
        multiply_tile(matrix.kind, matrix.at + first * stride, matrix.cols, inputs, out, matrix.ahead)
        if not whole:
            for token in range(x.panels):
                y = carray(floats_at(y_at + token * rows * 4), (matrix.rows,))
                for r in range(max(first, low), min(first + TILE, high)):
                    y[r] = part[token, r - first]


@kernel
def add_bias(bias_at: int, low: int, high: int, y_at: int, rows: int, panels: int, lanes: int) -> None:
    """Add the bias of rows low..high to y [panels, rows, lanes]; `bias_at` 0: there is none."""
    if bias_at == 0:
        return
    bias = carray(floats_at(bias_at), (rows,))
    y = carray(floats_at(y_at), (panels * rows * lanes,))
    for p in range(panels):
        for r in range(low, high):
            for lane in range(lanes):
                y[(p * rows + r) * lanes + lane] += bias[r]


@kernel
def _linear(matrix: Matrix, low: int, high: int, x: Input, y_at: int, rows: int, scratch_at: int) -> int:
    kind, cols, lanes = matrix.kind, matrix.cols, x.lanes
    stride = row_stride(kind, cols)
    tiled = matrix.rows // TILE * TILE if in_tiles(kind) else 0
    if lanes == 1:
        middle = min(max(low, tiled), high)
        if low < middle:
            _multiply_tiles(matrix, low, middle, x, y_at, rows)
        # Two at a time, as tiles.
        half = (high - middle) // 2
        for r in range(middle, high - half):
            at, other = matrix.at + r * stride, matrix.at + (r + half) * stride
            # A row comes from memory once for all tokens.
            for token in range(x.panels):
                x_at, packed_at = x.at + token * cols * 4, x.packed_at + token * x.packed_row
                first_at, ahead = y_at + (token * rows + r) * 4, matrix.ahead if token == 0 else 0
                dot_two(kind, (at, other), x_at, packed_at, cols, (first_at, first_at + half * 4), ahead)
    else:
        out = Panels(y_at, rows * LANES * 4, x.panels)
        multiply_tokens(Rows(kind, matrix.at, stride, cols), tiled, low, high, x.packed_at, out, scratch_at)
    add_bias(matrix.bias_at, low, high, y_at, rows, x.panels, lanes)
    return 0


def entry_of_linear() -> int:
    """The address that `State.linear` is to hold."""
    return entry_of(_linear, Matrix(*[0] * len(Matrix._fields)), 0, 0, Input(*[0] * len(Input._fields)), 0, 0, 0)


@inlined
def linear(st: State, matrix: Matrix, low: int, high: int, x: Input, y_at: int, rows: int, scratch_at: int) -> None:
    """Rows low..high of a packed matrix times x into y [panels, rows, lanes], whose row 0 is at y_at.

    `scratch_at`: float32 [8, cols] and `PRODUCT_FLOATS` for several tokens.
    """
    call_at(st.linear[0], matrix, low, high, x, y_at, rows, scratch_at)


@apart
def widen_row(matrix: Matrix, row: int, out_at: int) -> None:
    """Write a row of a packed matrix as float32 [cols] to `out_at`."""
    rows = Rows(matrix.kind, matrix.at, row_stride(matrix.kind, matrix.cols), matrix.cols)
    if in_tiles(matrix.kind) and row < matrix.rows // TILE * TILE:
        widen_tiled_row(rows, row, out_at)
    else:
        widen(rows.kind, rows.at + row * rows.stride, out_at, rows.cols)
