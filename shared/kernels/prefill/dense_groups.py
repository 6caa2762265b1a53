"""Whole groups of neurons for several tokens: small matrix products, then the down rows of some groups together."""

from typing import Any

import numpy as np
import numpy.typing as npt
from numba import carray

from warmfront.shared.kernels.activation import activate_times
from warmfront.shared.kernels.atomics import address_of, floats_at
from warmfront.shared.kernels.feed_forward.bundles import Bundles, Vectors, add_biases, group_at
from warmfront.shared.kernels.feed_forward.down_rows import LIST_BYTES
from warmfront.shared.kernels.feed_forward.down_tiles import down_in_bytes
from warmfront.shared.kernels.gemm import Panels, Rows, gather_columns, in_pairs, pack_panels
from warmfront.shared.kernels.jit import kernel
from warmfront.shared.kernels.prefill.byte_products import PANEL_BLOCK
from warmfront.shared.kernels.prefill.down_bytes import (
    COLUMNS_BYTES,
    DownRows,
    add_down_bytes,
    arrange_columns,
    quantise_factors,
)
from warmfront.shared.kernels.prefill.group_sums import Columns, Factors, add_columns
from warmfront.shared.kernels.prefill.matrix import multiply_tokens, pack_tokens
from warmfront.shared.kernels.rows import row_stride
from warmfront.shared.kernels.tiles import TILE
from warmfront.shared.model.bundle import GROUP
from warmfront.shared.model.formats import BLOCK, Kind
from warmfront.shared.model.panels import LANES, whole_panels

__all__ = ["dense_groups", "scratch_bytes"]

# Groups whose factors are kept until their down rows follow, and columns of them that are widened at a time: 12 groups'
# factors for 48 tokens, 37 KB, and their 8 columns stay in the first cache, 64 columns in the second.
_BATCH, _COLUMNS = 12, 64
_Q4C = int(Kind.Q4C)
# The scales of the rows of Q4C, which has none.
_ONES = np.ones(GROUP, np.float32)
Ints = npt.NDArray[np.int32]


def scratch_bytes(hidden: int, groups: int, max_tokens: int) -> int:
    """Bytes that a thread needs beside its sums, for layers of so many groups."""
    tokens = whole_panels(max_tokens)
    single = LIST_BYTES + 4 * hidden
    # 16 rows, or a stretch of a batch's columns, widened; gate and up of a group; x as packed; the factors of a batch.
    several = 4 * max(TILE * hidden, _BATCH * GROUP * _COLUMNS) + 8 * GROUP * tokens + 2 * tokens * hidden
    return max(single, several + min(_BATCH, groups) * (4 * GROUP + PANEL_BLOCK // LANES) * tokens)


@kernel
def _note_firing(factor_at: int, panels: int, neurons: int, ids: Ints, firing: Any) -> None:
    """Which factors [panels, neurons, 16] are not 0, into `firing` uint16 [groups, 32, panels] at groups `ids`."""
    factors = carray(floats_at(factor_at), (panels, neurons, LANES))
    for panel in range(panels):
        for neuron in range(neurons):
            bits = 0
            for lane in range(LANES):
                if factors[panel, neuron, lane] != 0:
                    bits |= 1 << lane
            firing[ids[neuron // GROUP], neuron % GROUP, panel] = bits


@kernel
def _scale_tokens(at: int, inverse_at: int, panels: int) -> None:
    """Multiply float32 [panels, 32, 16] by each token's inverse [panels, 16]."""
    values, inverse = carray(floats_at(at), (panels, GROUP, LANES)), carray(floats_at(inverse_at), (panels, LANES))
    for panel in range(panels):
        for neuron in range(GROUP):
            for lane in range(LANES):
                values[panel, neuron, lane] *= inverse[panel, lane]


@kernel
def _keep(kind: int, at: int, inverse: int, panels: int, out: int, blocks: int) -> None:
    """Keep a group's factors [panels, 32, 16] for its down rows: at `out`, of Q4C as bytes at `blocks`."""
    if not down_in_bytes(kind):
        _scale_tokens(at, inverse, panels)
        if in_pairs(kind):
            pack_panels(kind, at, out, GROUP, panels)
            return
    elif kind == _Q4C:
        quantise_factors(kind, at, inverse, address_of(_ONES), panels, blocks)
        return
    values, kept = carray(floats_at(at), (panels * GROUP * LANES,)), carray(floats_at(out), (panels * GROUP * LANES,))
    for i in range(len(values)):
        kept[i] = values[i]


@kernel
def _gates_and_ups(b: Bundles, at: int, x_at: int, gates: Panels, up_at: int, scratch_at: int) -> None:
    """The gates of the group at `at` for all tokens, and at `up_at` likewise the ups, if its neurons have any."""
    for part in range(b.rows):
        out = Panels(up_at if part else gates.at, gates.step, gates.panels)
        if b.tiled or (b.apart and part == 0):
            rows = Rows(b.gate_kind, at + part * GROUP * b.row_bytes, b.row_bytes, b.hidden)
            multiply_tokens(rows, GROUP, 0, GROUP, x_at, out, scratch_at)
        else:
            rows = Rows(b.gate_kind, at + b.first + part * b.row_bytes, b.bundle_bytes, b.hidden)
            multiply_tokens(rows, 0, 0, GROUP, x_at, out, scratch_at)
        add_biases(b, at, b.up_bias if part else b.gate_bias, out.at, out.panels, LANES)


@kernel
def _add_widened(b: Bundles, slots: Ints, factors: Factors, sums_at: int, scratch_at: int) -> None:
    """Add the down rows of `slots` times their factors, as floats or pairs."""
    for first in range(0, b.hidden, _COLUMNS):
        columns = min(_COLUMNS, b.hidden - first)
        for i in range(len(slots)):
            at = group_at(b, slots, i)
            rows, apart = Rows(b.down_kind, at + b.first + b.down_offset, b.bundle_bytes, b.hidden), 1
            if b.tiled:
                block_bytes, apart = row_stride(b.down_kind, b.hidden) // (b.hidden // BLOCK), GROUP
                rows = Rows(b.down_kind, at + GROUP * b.down_offset, block_bytes, b.hidden)
            out = scratch_at + i * GROUP * columns * 4
            gather_columns(rows, GROUP, at + b.tail_offset, out, first, columns, apart)
        sums = Panels(sums_at + first * LANES * 8, b.hidden * LANES * 8, factors.panels)
        add_columns(Columns(b.down_kind, scratch_at, len(slots), columns), factors, sums)


@kernel
def _add_bytes(b: Bundles, slots: Ints, factors: Factors, blocks_at: int, vectors: Vectors) -> None:
    """Add the down rows of `slots` times their factors, which are at `blocks_at` for Q4C, as bytes."""
    panels, scratch_at = factors.panels, vectors.scratch
    for block in range(b.hidden // BLOCK):
        for i in range(len(slots)):
            at, columns_at = group_at(b, slots, i), scratch_at + i * COLUMNS_BYTES
            rows_at, stride = at + b.first + b.down_offset, b.bundle_bytes
            if b.tiled:
                rows_at, stride = at + GROUP * b.down_offset, 0
            arrange_columns(DownRows(b.down_kind, rows_at, stride, at + b.tail_offset, b.hidden), block, columns_at)
            if b.down_kind != _Q4C:
                own = factors.at + i * panels * GROUP * LANES * 4
                blocks = blocks_at + i * panels * PANEL_BLOCK
                quantise_factors(b.down_kind, own, vectors.inverse, columns_at, panels, blocks)
        sums = Panels(vectors.sums + block * BLOCK * LANES * 8, b.hidden * LANES * 8, panels)
        add_down_bytes(b.down_kind, scratch_at, blocks_at, len(slots), sums)


@kernel
def dense_groups(
    b: Bundles, slots: Ints, low: int, high: int, vectors: Vectors, panels: int, ids: Ints, firing: Any
) -> None:
    """Add the outputs of slots low..high for all tokens of so many panels.

    `firing`: uint16 [groups, 32, panels], where it notes, at the groups `ids` of the slots, which tokens fire which
    neurons; if it is empty, nothing.
    """
    hidden, scratch_at = b.hidden, vectors.scratch
    size = 4 * panels * GROUP * LANES
    gate_at = scratch_at + 4 * max(TILE * hidden, _BATCH * GROUP * _COLUMNS)
    up_at = gate_at + size
    input_at = up_at + size
    blocks_at = input_at + 2 * panels * LANES * hidden
    factors_at = blocks_at + min(_BATCH, high - low) * panels * PANEL_BLOCK
    x_at = pack_tokens(b.gate_kind, vectors.x, input_at, hidden, panels)
    # Those of neurons without a gate stay so.
    ups = carray(floats_at(up_at), (panels * GROUP * LANES,))
    ups[:] = 1
    for start in range(low, high, _BATCH):
        batch = slots[start : min(start + _BATCH, high)]
        for i in range(len(batch)):
            at = group_at(b, batch, i)
            _gates_and_ups(b, at, x_at, Panels(gate_at, GROUP * LANES * 4, panels), up_at, scratch_at)
            activate_times(b.activation, gate_at, up_at, panels * GROUP * LANES)
            if firing.size > 0:
                _note_firing(gate_at, panels, GROUP, ids[start + i : start + i + 1], firing)
            own = blocks_at + i * panels * PANEL_BLOCK
            _keep(b.down_kind, gate_at, vectors.inverse, panels, factors_at + i * size, own)
        if down_in_bytes(b.down_kind):
            _add_bytes(b, batch, Factors(factors_at, panels), blocks_at, vectors)
        else:
            _add_widened(b, batch, Factors(factors_at, panels), vectors.sums, scratch_at)
