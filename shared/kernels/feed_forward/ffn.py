"""Compiled feed-forward arithmetic over neuron bundles: what every worker on a CPU computes.

    all       gate and up dot, axpy of the down row            `whole_groups` of tiles, else `listed_neurons`
    lowrank,  the same for the neurons of a mask; those whose  `list_masked`, `listed_neurons`
    lowbit    gate (or, with dReLU, up) does not fire end there
    exact     the gate of every neuron, then up and down of    `open_gates`, `open_neurons`
              those whose gate fires (`activation.fires`);
              with dReLU, down only where up fires too
    prefill   several tokens                                   `prefill.dense_groups`

A list of slots says where the groups are; neuron i of the list is neuron i % 32 of slot i // 32. Who computes some
neuron of a group computes all that are wanted of it, and adds their sum to exact sums (`exact_sums.py`) that belong to
one thread: the bits of a layer's output do not depend on how its groups are shared out.
"""

from typing import Any

import numpy as np
import numpy.typing as npt
from numba import carray

from warmfront.shared.kernels.activation import activate_times, factor, fires, up_fires
from warmfront.shared.kernels.atomics import floats_at, longs_at
from warmfront.shared.kernels.feed_forward.bundles import Bundles, Vectors, bundle_at
from warmfront.shared.kernels.feed_forward.down_rows import AHEAD_AT, FACTORS_AT, add_down_rows
from warmfront.shared.kernels.feed_forward.down_tiles import add_down_tile
from warmfront.shared.kernels.feed_forward.neuron_lists import set_bit
from warmfront.shared.kernels.jit import kernel
from warmfront.shared.kernels.rows import dot, prefetch
from warmfront.shared.kernels.tiles import TILE, in_tiles, multiply_tile
from warmfront.shared.model.bundle import GROUP

__all__ = ["listed_neurons", "open_gates", "open_neurons", "open_ups", "whole_groups"]

Floats = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int32]
Words = npt.NDArray[np.uint32]


@kernel
def whole_groups(b: Bundles, slots: Ints, low: int, high: int, vectors: Vectors) -> None:
    """Add the outputs of all neurons of slots low..high, which are in tiles, for one token."""
    gates_at, ups_at = vectors.scratch, vectors.scratch + GROUP * 4
    gates = carray(floats_at(gates_at), (2 * GROUP,))
    for i in range(low, high):
        at = bundle_at(b, slots, i * GROUP)
        if in_tiles(b.gate_kind):
            for row in range(0, 2 * GROUP, TILE):
                tile_at = at + row * b.up_offset
                multiply_tile(b.gate_kind, tile_at, vectors.quantised, b.hidden, gates_at + row * 4, b.ahead)
        else:
            for row in range(2 * GROUP):
                row_at = at + row * b.up_offset
                gates[row] = dot(b.gate_kind, row_at, vectors.x, vectors.quantised, b.hidden, b.ahead)
        activate_times(b.activation, gates_at, ups_at, GROUP)
        inverse = carray(floats_at(vectors.inverse), (1,))[0]
        for neuron in range(GROUP):
            gates[neuron] *= inverse
        add_down_tile(
            b.down_kind, at + GROUP * b.down_offset, gates_at, at + b.tail_offset, vectors.sums, b.hidden, b.ahead
        )


@kernel
def _later(b: Bundles, slots: Ints, listed: Ints, i: int, high: int) -> tuple[int, int]:
    """How many bytes behind that of entry i the bundles lie whose gate and up rows, and whose down row, are fetched.

    An even later one is announced. Scattered bundles come at two thirds of the bandwidth of contiguous ones: with a
    line of each KB their addresses are translated, and the hardware's own fetching starts.
    """
    if b.announced != 0:
        prefetch(bundle_at(b, slots, listed[min(i + b.announced, high - 1)]), b.bundle_bytes, 1024)
    at, last = bundle_at(b, slots, listed[i]), high - 1
    down = bundle_at(b, slots, listed[min(i + b.down_ahead, last)]) - at
    return bundle_at(b, slots, listed[min(i + b.ahead, last)]) - at, down


@kernel
def _note_neuron(
    b: Bundles, at: int, ahead: tuple[int, int], gate: Any, vectors: Vectors, count: int, skip: bool
) -> bool:
    """Put the neuron at `at`, whose gate is known, behind `count` others of its group on the list of down rows.

    `ahead`: from `_later`. Returns False, if it may `skip` it, for one whose up does not fire.
    """
    up = dot(b.gate_kind, at + b.up_offset, vectors.x, vectors.quantised, b.hidden, ahead[0])
    if skip and not up_fires(b.activation, up):
        return False
    rows, aheads = carray(longs_at(vectors.scratch), (GROUP,)), carray(longs_at(vectors.scratch + AHEAD_AT), (GROUP,))
    factors = carray(floats_at(vectors.scratch + FACTORS_AT), (GROUP + 1,))
    own = factor(b.activation, gate, up) * carray(floats_at(vectors.inverse), (1,))[0]
    rows[count], aheads[count], factors[count] = at + b.down_offset, ahead[1], own
    factors[GROUP] = own + (factors[GROUP] if count > 0 else np.float32(0))
    return True


@kernel
def _add_group(b: Bundles, slots: Ints, neuron: int, vectors: Vectors, count: int) -> None:
    """Add the down rows on the list, of the group of `neuron`, to the sums."""
    tail_at = bundle_at(b, slots, neuron // GROUP * GROUP) + b.tail_offset
    add_down_rows(b.down_kind, vectors.scratch, count, tail_at, vectors.sums, b.hidden)


@kernel
def listed_neurons(
    b: Bundles, slots: Ints, listed: Ints, low: int, high: int, skip: bool, vectors: Vectors, computed: Words
) -> int:
    """Add the outputs of entries low..high, whole groups, of a list of neurons in ascending order, for one token.

    `skip`: leave a neuron out whose gate or up does not fire. The others get their bit in `computed`, a word for each
    slot of the list; returns how many they are.
    """
    count, found = 0, 0
    for i in range(low, high):
        neuron = listed[i]
        at = bundle_at(b, slots, neuron)
        ahead = _later(b, slots, listed, i, high)
        gate = dot(b.gate_kind, at, vectors.x, vectors.quantised, b.hidden, ahead[0])
        if (not skip or fires(b.activation, gate)) and _note_neuron(b, at, ahead, gate, vectors, found, skip):
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
        # Gates lie a bundle apart: on some machines too far for the hardware's own fetching.
        at = bundle_at(b, slots, neuron)
        ahead = bundle_at(b, slots, min(neuron + b.gates_ahead, high - 1)) - at
        gate = dot(b.gate_kind, at, vectors.x, vectors.quantised, b.hidden, ahead)
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
    count, found = 0, 0
    for i in range(low, high):
        neuron = opened[i]
        ahead = _later(b, slots, opened, i, high)
        if _note_neuron(b, bundle_at(b, slots, neuron), ahead, gates[i], vectors, found, True):
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
        up_at = bundle_at(b, slots, opened[i]) + b.up_offset
        found += up_fires(b.activation, dot(b.gate_kind, up_at, vectors.x, vectors.quantised, b.hidden, 0))
    return found
