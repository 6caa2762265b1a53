"""Compiled feed-forward arithmetic over neuron bundles: what every worker on a CPU computes.

    all       gate and up dot, axpy of the down row            `listed_neurons`
    lowrank,  the same for the neurons of a mask; those whose  `list_masked`, `listed_neurons`
    lowbit    gate does not fire end there
    exact     the gate of every neuron, then up and down of    `open_gates`, `open_neurons`
              those whose gate fires (`activation.fires`)
    prefill   several tokens: small GEMMs over whole groups    `dense_groups`

A list of slots says where the groups are; neuron i of the list is neuron i % 32 of slot i // 32. Results are added
to float32 sums that belong to one thread, in the order of the list.
"""

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from llvmlite import ir
from numba import carray, types
from numba.extending import intrinsic

from warmfront.shared.kernels.activation import activate, activate_times, fires
from warmfront.shared.kernels.atomics import floats_at
from warmfront.shared.kernels.gemm import Panels, Rows, gather_columns, multiply_columns, multiply_rows, pack_panels
from warmfront.shared.kernels.jit import kernel
from warmfront.shared.kernels.rows import AHEAD_BYTES, apply_column_scales, axpy, dot, prefetch
from warmfront.shared.kernels.simd import I32, call
from warmfront.shared.model.bundle import GROUP, BundleLayout
from warmfront.shared.model.formats import Kind
from warmfront.shared.model.panels import LANES, whole_panels

__all__ = [
    "Bundles",
    "Vectors",
    "bundles_at",
    "dense_groups",
    "list_masked",
    "listed_neurons",
    "open_gates",
    "open_neurons",
    "scratch_floats",
    "set_bit",
]

_Q4C = int(Kind.Q4C)
# Scattered bundles come at two thirds of the bandwidth of contiguous ones; announced this many neurons before they are
# fetched, 2 to 5 % faster (docs/log.md).
_PREFETCHED = 4
# Groups whose down rows are multiplied at once: the sums, larger than a cache, are read and written once for them all.
_TOGETHER = 4
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
    # Index into `ACTIVATIONS`.
    activation: int


class Vectors(NamedTuple):
    """Addresses of what a job reads and of what one thread writes."""

    # float32 [hidden] for one token, [panels, hidden, 16] for several.
    x: int
    # One token only: what `quantise_input` made of it.
    quantised: int
    # float32, laid out as x: the outputs are added here.
    sums: int
    # float32 [scratch_floats(...)] for several tokens; for one [hidden], used with down rows of Q4C.
    scratch: int


def bundles_at(at: int, layout: BundleLayout, activation: int) -> Bundles:
    """Describe slots at address `at`; `activation` is an index into `ACTIVATIONS`."""
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
    )


def scratch_floats(hidden: int, max_tokens: int) -> int:
    """Floats of scratch for `dense_groups`: widened rows, gate and up of some groups, x and factors as packed."""
    tokens, neurons = whole_panels(max_tokens), _TOGETHER * GROUP
    return neurons * hidden + 2 * neurons * tokens + tokens * hidden // 2 + neurons * tokens // 2


@kernel
def _bundle(b: Bundles, slots: Ints, neuron: int) -> Any:
    return b.at + np.int64(slots[neuron // GROUP]) * b.group_bytes + neuron % GROUP * b.bundle_bytes


@kernel
def _prefetch_later(b: Bundles, slots: Ints, listed: Ints, i: int, high: int) -> None:
    """Announce the bundle of a later entry of the list to the memory system."""
    prefetch(_bundle(b, slots, listed[min(i + _PREFETCHED, high - 1)]), b.bundle_bytes, 1024)


@kernel
def _ahead(b: Bundles) -> int:
    """How many neurons ahead to fetch."""
    return 1 + AHEAD_BYTES // b.bundle_bytes


@kernel
def _add_output(b: Bundles, at: int, ahead_at: int, gate: Any, vectors: Vectors, sums_at: int) -> Any:
    """Add the output of the neuron at `at`, whose gate is known, while fetching the one at `ahead_at`.

    Returns the factor of its down row.
    """
    up = dot(b.gate_kind, at + b.up_offset, vectors.x, vectors.quantised, b.hidden, ahead_at + b.up_offset)
    factor = activate(b.activation, gate) * up
    axpy(b.down_kind, factor, at + b.down_offset, sums_at, b.hidden, ahead_at + b.down_offset)
    return factor


@kernel
def _sums_of_group(b: Bundles, vectors: Vectors) -> Any:
    """Where axpys go: the sums, or for Q4C a group's own, zeroed."""
    if b.down_kind != _Q4C:
        return vectors.sums
    carray(floats_at(vectors.scratch), (b.hidden,))[:] = 0
    return vectors.scratch


@kernel
def _scale_group(b: Bundles, slots: Ints, neuron: int, factors: Any, group_at: int, sums_at: int) -> None:
    """Q4C: add what the group of `neuron` has gathered to the sums."""
    tail_at = _bundle(b, slots, neuron // GROUP * GROUP) + b.tail_offset
    apply_column_scales(tail_at, group_at, factors, sums_at, b.hidden)


@intrinsic
def _lowest_bit(context, word):
    """The number of the lowest bit set in a word that is not 0."""

    def build(context, b, _signature, arguments):
        return call(b, "llvm.cttz.i32", I32, arguments[0], ir.Constant(ir.IntType(1), 1))

    return types.int32(types.uint32), build


@kernel
def set_bit(words: Words, neuron: int) -> None:
    """Set the bit of a neuron, 32 neurons a word."""
    words[neuron // GROUP] |= np.uint32(1) << np.uint32(neuron % GROUP)


@kernel
def list_masked(words: Words, groups: int, listed: Ints) -> int:
    """List the neurons whose bits are set in the first `groups` words, 32 neurons a word; returns their number."""
    count = 0
    for group in range(groups):
        word = words[group]
        while word != 0:
            listed[count] = group * GROUP + _lowest_bit(word)
            count += 1
            word &= word - np.uint32(1)
    return count


@kernel
def listed_neurons(
    b: Bundles,
    slots: Ints,
    listed: Ints,
    low: int,
    high: int,
    skip: bool,
    vectors: Vectors,
    computed: Words,
) -> int:
    """Add the outputs of entries low..high of a list of neurons, in ascending order, for one token.

    `skip`: leave a neuron out whose gate does not fire. The others get their bit in `computed`, a word for each slot of
    the list; returns how many they are.
    """
    ahead = _ahead(b)
    group_at = _sums_of_group(b, vectors)
    factors, count = np.float32(0), 0
    for i in range(low, high):
        neuron = listed[i]
        at = _bundle(b, slots, neuron)
        ahead_at = _bundle(b, slots, listed[min(i + ahead, high - 1)])
        _prefetch_later(b, slots, listed, i, high)
        gate = dot(b.gate_kind, at, vectors.x, vectors.quantised, b.hidden, ahead_at)
        if not skip or fires(gate):
            count += 1
            set_bit(computed, neuron)
            factors += _add_output(b, at, ahead_at, gate, vectors, group_at)
        if b.down_kind == _Q4C and (i == high - 1 or listed[i + 1] // GROUP != neuron // GROUP):
            _scale_group(b, slots, neuron, factors, group_at, vectors.sums)
            factors = np.float32(0)
    return count


@kernel
def open_gates(b: Bundles, slots: Ints, low: int, high: int, vectors: Vectors, gates: Floats, opened: Ints) -> int:
    """List those of neurons low..high whose gate fires, with their gates; returns their number."""
    count = 0
    for neuron in range(low, high):
        # Gates lie a bundle apart, too far for the hardware's own fetching: the fourth from here is fetched.
        ahead_at = _bundle(b, slots, min(neuron + 4, high - 1))
        gate = dot(b.gate_kind, _bundle(b, slots, neuron), vectors.x, vectors.quantised, b.hidden, ahead_at)
        if fires(gate):
            gates[count] = gate
            opened[count] = neuron
            count += 1
    return count


@kernel
def open_neurons(b: Bundles, slots: Ints, gates: Floats, opened: Ints, low: int, high: int, vectors: Vectors) -> None:
    """Add the outputs of entries low..high of a list that `open_gates` made."""
    ahead = _ahead(b)
    group_at = _sums_of_group(b, vectors)
    factors = np.float32(0)
    for i in range(low, high):
        neuron = opened[i]
        ahead_at = _bundle(b, slots, opened[min(i + ahead, high - 1)])
        _prefetch_later(b, slots, opened, i, high)
        factors += _add_output(b, _bundle(b, slots, neuron), ahead_at, gates[i], vectors, group_at)
        if b.down_kind == _Q4C and (i == high - 1 or opened[i + 1] // GROUP != neuron // GROUP):
            _scale_group(b, slots, neuron, factors, group_at, vectors.sums)
            factors = np.float32(0)


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
def dense_groups(
    b: Bundles,
    slots: Ints,
    low: int,
    high: int,
    vectors: Vectors,
    panels: int,
    ids: Ints,
    firing: Any,
) -> None:
    """Add the outputs of slots low..high for all tokens of so many panels.

    `firing`: uint16 [groups, 32, panels], where it notes, at the groups `ids` of the slots, which tokens fire which
    neurons; if it is empty, nothing.
    """
    hidden, scratch_at = b.hidden, vectors.scratch
    # Scratch: widened rows, gates and h in their place, ups, x packed, h packed.
    gate_at = scratch_at + _TOGETHER * GROUP * hidden * 4
    up_at = gate_at + 4 * panels * _TOGETHER * GROUP * LANES
    input_at = up_at + 4 * panels * _TOGETHER * GROUP * LANES
    factors_at = input_at + panels * LANES * hidden * 2
    x_at = pack_panels(b.gate_kind, vectors.x, input_at, hidden, panels)
    sums = Panels(vectors.sums, hidden * LANES * 4, panels)
    for first in range(low, high, _TOGETHER):
        groups = min(_TOGETHER, high - first)
        neurons = groups * GROUP
        step = neurons * LANES * 4
        for row in range(0, neurons, 8):
            at, offset = _bundle(b, slots, first * GROUP + row), row * LANES * 4
            gates, ups = Panels(gate_at + offset, step, panels), Panels(up_at + offset, step, panels)
            multiply_rows(Rows(b.gate_kind, at, b.bundle_bytes, hidden), x_at, gates, scratch_at)
            multiply_rows(Rows(b.gate_kind, at + b.up_offset, b.bundle_bytes, hidden), x_at, ups, scratch_at)
        if firing.size > 0:
            _note_firing(gate_at, panels, neurons, ids[first : first + groups], firing)
        activate_times(b.activation, gate_at, up_at, panels * neurons * LANES)
        h_at = pack_panels(b.down_kind, gate_at, factors_at, neurons, panels)
        next_at = scratch_at
        for slot in range(first, first + groups):
            at = _bundle(b, slots, slot * GROUP)
            rows = Rows(b.down_kind, at + b.down_offset, b.bundle_bytes, hidden)
            next_at = gather_columns(rows, GROUP, at + b.tail_offset, next_at)
        multiply_columns(b.down_kind, scratch_at, neurons, hidden, h_at, neurons, sums)
