"""Bundles of neurons in memory, and the feed-forward arithmetic of a prompt's tokens: small GEMMs over whole groups.

What decoded tokens take is in `batches.py`. Whose groups' outputs are added to which sums is said there, too: all are
exact, so a layer's output has the same bits however its groups are shared out.
"""

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from numba import carray

from warmfront.shared.kernels.activation import activate_times, fires
from warmfront.shared.kernels.atomics import bytes_at, floats_at
from warmfront.shared.kernels.feed_forward.down_tiles import down_in_tiles, gather_down_tile, interleave_down
from warmfront.shared.kernels.gemm import (
    SUM,
    Gathered,
    Panels,
    Rows,
    gather_columns,
    in_pairs,
    multiply_columns,
    multiply_rows,
    pack_panels,
)
from warmfront.shared.kernels.jit import kernel
from warmfront.shared.kernels.tiles import TILE, in_tiles, interleave, multiply_tile_rows
from warmfront.shared.model.bundle import GROUP, BundleLayout
from warmfront.shared.model.panels import LANES, whole_panels

__all__ = [
    "Bundles",
    "Vectors",
    "bundles_at",
    "dense_groups",
    "neuron_at",
    "scratch_bytes",
    "tile_group",
]

# Several tokens: groups whose factors are kept until their down rows follow, for a stretch of columns at a time whose
# sums stay in the cache meanwhile: 128 columns of 288 tokens are 0.3 MB of int64.
_BATCH, _COLUMNS = 64, 128
Ints = npt.NDArray[np.int32]


class Bundles(NamedTuple):
    """Slots of groups in memory, and how to read and use them."""

    # Address of [slots, group_bytes].
    at: int
    # As in `BundleLayout`.
    bundle_bytes: int
    group_bytes: int
    tail_offset: int
    up_offset: int
    down_offset: int
    gate_kind: int
    down_kind: int
    hidden: int
    # Index into `ACTIVATIONS`.
    activation: int
    # Whether the groups are in tiles: see `tile_group`.
    tiled: bool


class Vectors(NamedTuple):
    """Addresses of what a job of a prompt's tokens reads and of what one thread writes."""

    # float32 [panels, hidden, 16].
    x: int
    # float32 [tokens]: 1 / unit of each token's sums.
    inverse: int
    # int64, laid out as x: the outputs are added here, in units.
    sums: int
    # [scratch_bytes(...)].
    scratch: int


def bundles_at(at: int, layout: BundleLayout, activation: int, whole: bool = False) -> Bundles:
    """Describe slots at address `at`; `activation` is an index into `ACTIVATIONS`.

    `whole`: all neurons of a group are always computed, so its slot is in tiles where the machine is faster with them.
    """
    return Bundles(
        at=at,
        bundle_bytes=layout.bundle_bytes,
        group_bytes=layout.group_bytes,
        tail_offset=layout.tail_offset,
        up_offset=layout.up_offset,
        down_offset=layout.down_offset,
        gate_kind=int(layout.gate_kind),
        down_kind=int(layout.down_kind),
        hidden=layout.hidden,
        activation=activation,
        tiled=whole and bool(in_tiles(layout.gate_kind)) and bool(down_in_tiles(layout.down_kind)),
    )


def scratch_bytes(hidden: int, groups: int, max_tokens: int) -> int:
    """Bytes that a thread needs for a prompt beside its sums, for layers of so many groups."""
    tokens = whole_panels(max_tokens)
    # 16 rows, or a stretch of columns, widened; gate and up of a group; x as packed; the factors of a batch.
    several = 4 * max(TILE * hidden, GROUP * _COLUMNS) + 8 * GROUP * tokens + 2 * tokens * hidden
    return several + 4 * min(_BATCH, groups) * GROUP * tokens


@kernel
def neuron_at(b: Bundles, slots: Ints, neuron: int) -> Any:
    """Where a neuron's bundle is; in tiles only a group's first has a place."""
    return b.at + np.int64(slots[neuron // GROUP]) * b.group_bytes + neuron % GROUP * b.bundle_bytes


@kernel
def tile_group(b: Bundles, at: int) -> None:
    """Turn the group at `at` into tiles: two of gate rows, two of up rows, one of down rows; then what was its tail."""
    kept = np.empty(b.tail_offset, np.uint8)
    group = carray(bytes_at(at), (b.tail_offset,))
    kept[:] = group
    for part in range(2):
        rows_at = at + part * GROUP * b.up_offset
        for neuron in range(GROUP):
            source = kept[neuron * b.bundle_bytes + part * b.up_offset :]
            row = carray(bytes_at(rows_at + neuron * b.up_offset), (b.up_offset,))
            for i in range(b.up_offset):
                row[i] = source[i]
        interleave(b.gate_kind, rows_at, GROUP, b.hidden)
    down_at = at + GROUP * b.down_offset
    interleave_down(b.down_kind, kept[b.down_offset :], b.bundle_bytes, b.hidden, down_at)


@kernel
def _note_firing(gate_at: int, panels: int, neurons: int, ids: Ints, firing: Any) -> None:
    """Which of the gates [panels, neurons, 16] fire, into `firing` uint16 [groups, 32, panels] at groups `ids`."""
    gates = carray(floats_at(gate_at), (panels, neurons, LANES))
    for panel in range(panels):
        for neuron in range(neurons):
            bits = 0
            for lane in range(LANES):
                if fires(gates[panel, neuron, lane]):
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
def _keep(kind: int, at: int, out: int, panels: int) -> None:
    """Copy a group's factors [panels, 32, 16] as rows of `kind` want them."""
    if in_pairs(kind):
        pack_panels(kind, at, out, GROUP, panels)
        return
    values, kept = carray(floats_at(at), (panels * GROUP * LANES,)), carray(floats_at(out), (panels * GROUP * LANES,))
    for i in range(len(values)):
        kept[i] = values[i]


@kernel
def _gates_and_ups(b: Bundles, group_at: int, x_at: int, gates: Panels, up_at: int, scratch_at: int) -> None:
    """The gates of a group's neurons for all tokens, and at `up_at` likewise the ups."""
    for part in range(2):
        out_at = up_at if part else gates.at
        if b.tiled:
            rows = Rows(b.gate_kind, group_at + part * GROUP * b.up_offset, b.up_offset, b.hidden)
            multiply_tile_rows(rows, 0, GROUP, x_at, Panels(out_at, gates.step, gates.panels), scratch_at)
        else:
            for row in range(0, GROUP, 8):
                at = group_at + row * b.bundle_bytes + part * b.up_offset
                eight = Panels(out_at + row * LANES * 4, gates.step, gates.panels)
                multiply_rows(Rows(b.gate_kind, at, b.bundle_bytes, b.hidden), x_at, eight, scratch_at)


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
    gate_at = scratch_at + 4 * max(TILE * hidden, GROUP * _COLUMNS)
    up_at = gate_at + size
    input_at = up_at + size
    factors_at = input_at + 2 * panels * LANES * hidden
    x_at = pack_panels(b.gate_kind, vectors.x, input_at, hidden, panels)
    for start in range(low, high, _BATCH):
        groups = min(_BATCH, high - start)
        for i in range(groups):
            group_at = neuron_at(b, slots, (start + i) * GROUP)
            _gates_and_ups(b, group_at, x_at, Panels(gate_at, GROUP * LANES * 4, panels), up_at, scratch_at)
            if firing.size > 0:
                _note_firing(gate_at, panels, GROUP, ids[start + i : start + i + 1], firing)
            activate_times(b.activation, gate_at, up_at, panels * GROUP * LANES)
            _scale_tokens(gate_at, vectors.inverse, panels)
            _keep(b.down_kind, gate_at, factors_at + i * size, panels)
        for first in range(0, hidden, _COLUMNS):
            columns = min(_COLUMNS, hidden - first)
            sums = Panels(vectors.sums + first * LANES * 8, hidden * LANES * 8, panels)
            for i in range(groups):
                at = neuron_at(b, slots, (start + i) * GROUP)
                tail_at = at + b.tail_offset
                if b.tiled:
                    tile_at = at + GROUP * b.down_offset
                    gather_down_tile(b.down_kind, tile_at, tail_at, hidden, scratch_at, first, columns)
                else:
                    rows = Rows(b.down_kind, at + b.down_offset, b.bundle_bytes, hidden)
                    gather_columns(rows, GROUP, tail_at, scratch_at, first, columns)
                left = Gathered(b.down_kind, scratch_at, GROUP, columns)
                multiply_columns(left, factors_at + i * size, GROUP, sums, SUM)
