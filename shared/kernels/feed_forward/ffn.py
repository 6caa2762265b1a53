"""Compiled feed-forward arithmetic over neuron bundles: what every worker on a CPU computes.

    all       gate and up dot, axpy of the down row            `whole_groups` of tiles, else `listed_neurons`
    lowrank,  the same for the neurons of a mask; those whose  `list_masked`, `listed_neurons`
    lowbit    gate (or, with dReLU, up) does not fire end there
    exact     the gate of every neuron, then up and down of    `open_gates`, `open_neurons`
              those whose gate fires (`activation.fires`);
              with dReLU, down only where up fires too
    prefill   several tokens: small GEMMs over whole groups    `dense_groups`

A list of slots says where the groups are; neuron i of the list is neuron i % 32 of slot i // 32. Who computes some
neuron of a group computes all that are wanted of it, and adds their sum to exact sums (`exact_sums.py`) that belong to
one thread: the bits of a layer's output do not depend on how its groups are shared out.
"""

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from numba import carray

from warmfront.shared.kernels.activation import Activation, activate_times, activation_of, factor, fires, up_fires
from warmfront.shared.kernels.atomics import address_of, bytes_at, floats_at, longs_at
from warmfront.shared.kernels.feed_forward.down_rows import FACTORS_AT, LATER_AT, LIST_BYTES, add_down_rows
from warmfront.shared.kernels.feed_forward.down_tiles import (
    add_down_tile,
    down_in_bytes,
    down_in_tiles,
    interleave_down,
)
from warmfront.shared.kernels.feed_forward.neuron_lists import set_bit
from warmfront.shared.kernels.gemm import (
    Panels,
    Rows,
    gather_columns,
    in_pairs,
    pack_panels,
)
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
from warmfront.shared.kernels.rows import AHEAD_BYTES, dot, prefetch, row_stride
from warmfront.shared.kernels.tiles import TILE, in_tiles, interleave, multiply_tile
from warmfront.shared.model.architecture import FeedForward
from warmfront.shared.model.bundle import GROUP, BundleLayout
from warmfront.shared.model.formats import BLOCK, Kind
from warmfront.shared.model.panels import LANES, whole_panels

__all__ = [
    "Bundles",
    "Vectors",
    "bundles_at",
    "dense_groups",
    "listed_neurons",
    "open_gates",
    "open_neurons",
    "open_ups",
    "scratch_bytes",
    "tile_group",
    "whole_groups",
]

# Scattered bundles come at two thirds of the bandwidth of contiguous ones; announced this many neurons before they are
# fetched, 2 to 5 % faster (docs/log.md).
_PREFETCHED = 4
# Several tokens: groups whose factors are kept until their down rows follow, and columns of them that are widened at a
# time: 12 groups' factors for 48 tokens, 37 KB, and their 8 columns stay in the first cache, 64 columns in the second.
_BATCH, _COLUMNS = 12, 64
_Q4C = int(Kind.Q4C)
Floats = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int32]
Words = npt.NDArray[np.uint32]


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
    activation: Activation
    # Whether the groups are in tiles: see `tile_group`.
    tiled: bool


class Vectors(NamedTuple):
    """Addresses of what a job reads and of what one thread writes."""

    # float32 [hidden] for one token, [panels, hidden, 16] for several.
    x: int
    # One token only: what `quantise_input` made of it.
    quantised: int
    # float32 [tokens]: 1 / unit of each token's sums.
    inverse: int
    # int64, laid out as x: the outputs are added here, in units.
    sums: int
    # [scratch_bytes(...)].
    scratch: int


def bundles_at(at: int, layout: BundleLayout, feed_forward: FeedForward, whole: bool = False) -> Bundles:
    """Describe slots at address `at`.

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
        activation=activation_of(feed_forward),
        tiled=whole and all(bool(down_in_tiles(kind)) for kind in (layout.gate_kind, layout.down_kind)),
    )


def scratch_bytes(hidden: int, groups: int, max_tokens: int) -> int:
    """Bytes that a thread needs beside its sums, for layers of so many groups."""
    tokens = whole_panels(max_tokens)
    single = LIST_BYTES + 4 * hidden
    # 16 rows, or a stretch of a batch's columns, widened; gate and up of a group; x as packed; the factors of a batch.
    several = 4 * max(TILE * hidden, _BATCH * GROUP * _COLUMNS) + 8 * GROUP * tokens + 2 * tokens * hidden
    return max(single, several + min(_BATCH, groups) * (4 * GROUP + PANEL_BLOCK // LANES) * tokens)


@kernel
def _bundle(b: Bundles, slots: Ints, neuron: int) -> Any:
    return b.at + np.int64(slots[neuron // GROUP]) * b.group_bytes + neuron % GROUP * b.bundle_bytes


@kernel
def tile_group(b: Bundles, at: int) -> None:
    """Turn the group at `at` into tiles: two of gate rows, two of up rows, one of down rows; then what was its tail.

    Gate and up rows of floats stay rows, one behind the other.
    """
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
        if in_tiles(b.gate_kind):
            interleave(b.gate_kind, rows_at, GROUP, b.hidden)
    down_at = at + GROUP * b.down_offset
    interleave_down(b.down_kind, kept[b.down_offset :], b.bundle_bytes, b.hidden, down_at)


@kernel
def whole_groups(b: Bundles, slots: Ints, low: int, high: int, vectors: Vectors) -> None:
    """Add the outputs of all neurons of slots low..high, which are in tiles, for one token."""
    gates_at, ups_at = vectors.scratch, vectors.scratch + GROUP * 4
    gates = carray(floats_at(gates_at), (2 * GROUP,))
    for i in range(low, high):
        at = _bundle(b, slots, i * GROUP)
        if in_tiles(b.gate_kind):
            for row in range(0, 2 * GROUP, TILE):
                tile_at = at + row * b.up_offset
                multiply_tile(b.gate_kind, tile_at, vectors.quantised, b.hidden, gates_at + row * 4, AHEAD_BYTES)
        else:
            for row in range(2 * GROUP):
                row_at = at + row * b.up_offset
                gates[row] = dot(b.gate_kind, row_at, vectors.x, vectors.quantised, b.hidden, row_at + AHEAD_BYTES)
        activate_times(b.activation, gates_at, ups_at, GROUP)
        inverse = carray(floats_at(vectors.inverse), (1,))[0]
        for neuron in range(GROUP):
            gates[neuron] *= inverse
        add_down_tile(b.down_kind, at + GROUP * b.down_offset, gates_at, at + b.tail_offset, vectors.sums, b.hidden)


@kernel
def _prefetch_later(b: Bundles, slots: Ints, listed: Ints, i: int, high: int) -> None:
    """Announce the bundle of a later entry of the list to the memory system."""
    prefetch(_bundle(b, slots, listed[min(i + _PREFETCHED, high - 1)]), b.bundle_bytes, 1024)


@kernel
def _ahead(b: Bundles) -> int:
    """How many neurons ahead to fetch."""
    return 1 + AHEAD_BYTES // b.bundle_bytes


@kernel
def _note_neuron(b: Bundles, at: int, ahead_at: int, gate: Any, vectors: Vectors, count: int, skip: bool) -> bool:
    """Put the neuron at `at`, whose gate is known, behind `count` others of its group on the list of down rows.

    Fetches the up row of the one at `ahead_at`. Returns False, if it may `skip` it, for one whose up does not fire.
    """
    up = dot(b.gate_kind, at + b.up_offset, vectors.x, vectors.quantised, b.hidden, ahead_at + b.up_offset)
    if skip and not up_fires(b.activation, up):
        return False
    rows, later = carray(longs_at(vectors.scratch), (GROUP,)), carray(longs_at(vectors.scratch + LATER_AT), (GROUP,))
    factors = carray(floats_at(vectors.scratch + FACTORS_AT), (GROUP + 1,))
    own = factor(b.activation, gate, up) * carray(floats_at(vectors.inverse), (1,))[0]
    rows[count], later[count], factors[count] = at + b.down_offset, ahead_at + b.down_offset, own
    factors[GROUP] = own + (factors[GROUP] if count > 0 else np.float32(0))
    return True


@kernel
def _add_group(b: Bundles, slots: Ints, neuron: int, vectors: Vectors, count: int) -> None:
    """Add the down rows on the list, of the group of `neuron`, to the sums."""
    tail_at = _bundle(b, slots, neuron // GROUP * GROUP) + b.tail_offset
    add_down_rows(b.down_kind, vectors.scratch, count, tail_at, vectors.sums, b.hidden)


@kernel
def listed_neurons(
    b: Bundles, slots: Ints, listed: Ints, low: int, high: int, skip: bool, vectors: Vectors, computed: Words
) -> int:
    """Add the outputs of entries low..high, whole groups, of a list of neurons in ascending order, for one token.

    `skip`: leave a neuron out whose gate or up does not fire. The others get their bit in `computed`, a word for each
    slot of the list; returns how many they are.
    """
    ahead = _ahead(b)
    count, found = 0, 0
    for i in range(low, high):
        neuron = listed[i]
        at = _bundle(b, slots, neuron)
        ahead_at = _bundle(b, slots, listed[min(i + ahead, high - 1)])
        _prefetch_later(b, slots, listed, i, high)
        gate = dot(b.gate_kind, at, vectors.x, vectors.quantised, b.hidden, ahead_at)
        if (not skip or fires(b.activation, gate)) and _note_neuron(b, at, ahead_at, gate, vectors, found, skip):
            set_bit(computed, neuron)
            found += 1
            count += 1
        if found > 0 and (i == high - 1 or listed[i + 1] // GROUP != neuron // GROUP):
            _add_group(b, slots, neuron, vectors, found)
            found = 0
    return count


@kernel
def open_gates(b: Bundles, slots: Ints, low: int, high: int, vectors: Vectors, gates: Floats, opened: Ints) -> int:
    """List those of neurons low..high whose gate fires, with their gates; returns their number."""
    count = 0
    for neuron in range(low, high):
        # Gates lie a bundle apart, too far for the hardware's own fetching: the fourth from here is fetched.
        ahead_at = _bundle(b, slots, min(neuron + 4, high - 1))
        gate = dot(b.gate_kind, _bundle(b, slots, neuron), vectors.x, vectors.quantised, b.hidden, ahead_at)
        if fires(b.activation, gate):
            gates[count] = gate
            opened[count] = neuron
            count += 1
    return count


@kernel
def open_neurons(
    b: Bundles, slots: Ints, gates: Floats, opened: Ints, low: int, high: int, vectors: Vectors, computed: Words
) -> int:
    """Add the outputs of entries low..high, whole groups, of a list that `open_gates` made.

    Those whose up fires get their bit in `computed`, a word for each slot; returns how many they are.
    """
    ahead = _ahead(b)
    count, found = 0, 0
    for i in range(low, high):
        neuron = opened[i]
        ahead_at = _bundle(b, slots, opened[min(i + ahead, high - 1)])
        _prefetch_later(b, slots, opened, i, high)
        if _note_neuron(b, _bundle(b, slots, neuron), ahead_at, gates[i], vectors, found, True):
            set_bit(computed, neuron)
            found += 1
            count += 1
        if found > 0 and (i == high - 1 or opened[i + 1] // GROUP != neuron // GROUP):
            _add_group(b, slots, neuron, vectors, found)
            found = 0
    return count


@kernel
def open_ups(b: Bundles, slots: Ints, opened: Ints, count: int, vectors: Vectors) -> int:
    """How many neurons of a list that `open_gates` made have an up that fires too."""
    found = 0
    for i in range(count):
        up_at = _bundle(b, slots, opened[i]) + b.up_offset
        found += up_fires(b.activation, dot(b.gate_kind, up_at, vectors.x, vectors.quantised, b.hidden, up_at))
    return found


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
def _keep(kind: int, at: int, panels: int, out: int, blocks: int) -> None:
    """Keep a group's factors [panels, 32, 16] for its down rows: at `out`, of Q4C as bytes at `blocks`."""
    if in_pairs(kind) and not down_in_bytes(kind):
        pack_panels(kind, at, out, GROUP, panels)
    elif kind == _Q4C and down_in_bytes(kind):
        ones = np.ones(GROUP, np.float32)
        quantise_factors(kind, at, address_of(ones), panels, blocks)
        ones[0] = 1
    else:
        values = carray(floats_at(at), (panels * GROUP * LANES,))
        kept = carray(floats_at(out), (panels * GROUP * LANES,))
        for i in range(len(values)):
            kept[i] = values[i]


@kernel
def _gates_and_ups(b: Bundles, group_at: int, x_at: int, gates: Panels, up_at: int, scratch_at: int) -> None:
    """The gates of a group's neurons for all tokens, and at `up_at` likewise the ups."""
    for part in range(2):
        out = Panels(up_at if part else gates.at, gates.step, gates.panels)
        if b.tiled:
            rows = Rows(b.gate_kind, group_at + part * GROUP * b.up_offset, b.up_offset, b.hidden)
            multiply_tokens(rows, GROUP, 0, GROUP, x_at, out, scratch_at)
        else:
            rows = Rows(b.gate_kind, group_at + part * b.up_offset, b.bundle_bytes, b.hidden)
            multiply_tokens(rows, 0, 0, GROUP, x_at, out, scratch_at)


@kernel
def _add_widened(b: Bundles, slots: Ints, factors: Factors, sums_at: int, scratch_at: int) -> None:
    """Add the down rows of `slots` times their factors, as floats or pairs."""
    for first in range(0, b.hidden, _COLUMNS):
        columns = min(_COLUMNS, b.hidden - first)
        for i in range(len(slots)):
            at = _bundle(b, slots, i * GROUP)
            rows, apart = Rows(b.down_kind, at + b.down_offset, b.bundle_bytes, b.hidden), 1
            if b.tiled:
                block_bytes, apart = row_stride(b.down_kind, b.hidden) // (b.hidden // BLOCK), GROUP
                rows = Rows(b.down_kind, at + GROUP * b.down_offset, block_bytes, b.hidden)
            out = scratch_at + i * GROUP * columns * 4
            gather_columns(rows, GROUP, at + b.tail_offset, out, first, columns, apart)
        sums = Panels(sums_at + first * LANES * 8, b.hidden * LANES * 8, factors.panels)
        add_columns(Columns(b.down_kind, scratch_at, len(slots), columns), factors, sums)


@kernel
def _add_bytes(b: Bundles, slots: Ints, factors: Factors, blocks_at: int, sums_at: int, scratch_at: int) -> None:
    """Add the down rows of `slots` times their factors, which are at `blocks_at` for Q4C, as bytes."""
    panels = factors.panels
    for block in range(b.hidden // BLOCK):
        for i in range(len(slots)):
            at, columns_at = _bundle(b, slots, i * GROUP), scratch_at + i * COLUMNS_BYTES
            rows_at, stride = at + (GROUP if b.tiled else 1) * b.down_offset, 0 if b.tiled else b.bundle_bytes
            arrange_columns(DownRows(b.down_kind, rows_at, stride, at + b.tail_offset, b.hidden), block, columns_at)
            if b.down_kind != _Q4C:
                own = factors.at + i * panels * GROUP * LANES * 4
                quantise_factors(b.down_kind, own, columns_at, panels, blocks_at + i * panels * PANEL_BLOCK)
        sums = Panels(sums_at + block * BLOCK * LANES * 8, b.hidden * LANES * 8, panels)
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
    for start in range(low, high, _BATCH):
        batch = slots[start : min(start + _BATCH, high)]
        for i in range(len(batch)):
            group_at = _bundle(b, batch, i * GROUP)
            _gates_and_ups(b, group_at, x_at, Panels(gate_at, GROUP * LANES * 4, panels), up_at, scratch_at)
            activate_times(b.activation, gate_at, up_at, panels * GROUP * LANES)
            if firing.size > 0:
                _note_firing(gate_at, panels, GROUP, ids[start + i : start + i + 1], firing)
            _scale_tokens(gate_at, vectors.inverse, panels)
            _keep(b.down_kind, gate_at, panels, factors_at + i * size, blocks_at + i * panels * PANEL_BLOCK)
        if down_in_bytes(b.down_kind):
            _add_bytes(b, batch, Factors(factors_at, panels), blocks_at, vectors.sums, scratch_at)
        else:
            _add_widened(b, batch, Factors(factors_at, panels), vectors.sums, scratch_at)
