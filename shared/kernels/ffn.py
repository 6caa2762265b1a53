"""Compiled feed-forward arithmetic over neuron bundles: what every worker on a CPU computes.

    all       gate and up dot, axpy of the down row            `listed_neurons`
    lowrank,  the same for the neurons of a mask; those whose  `list_masked`, `listed_neurons`
    lowbit    gate turns out closed end there
    exact     the gate of every neuron, then up and down of    `open_gates`, `open_neurons`
              those whose gate is open
    prefill   several tokens: small GEMMs over whole groups    `dense_groups`

A gate is open unless it is <= 0: one that is NaN passes, so that every selector and prefill show it alike.

A list of slots says where the groups are; neuron i of the list is neuron i % 32 of slot i // 32. Results are added
to float32 sums that belong to one thread, in the order of the list.
"""

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from llvmlite import ir
from numba import carray, types
from numba.extending import intrinsic

from warmfront.shared.kernels.activation import activate, activate_times
from warmfront.shared.kernels.atomics import floats_at
from warmfront.shared.kernels.gemm import LANES, gather_columns, multiply_columns, multiply_rows, prepare
from warmfront.shared.kernels.jit import kernel
from warmfront.shared.kernels.rows import AHEAD_BYTES, axpy, dot, settle, touch
from warmfront.shared.kernels.simd import I32, call
from warmfront.shared.model.bundle import GROUP, BundleLayout
from warmfront.shared.model.formats import Kind

__all__ = [
    "Bundles",
    "bundles_at",
    "dense_groups",
    "list_masked",
    "listed_neurons",
    "mark",
    "open_gates",
    "open_neurons",
    "scratch_floats",
]

_Q4C = int(Kind.Q4C)
# Scattered bundles come at two thirds of the bandwidth of contiguous ones; touched this many neurons before they are
# fetched, 2 to 5 % faster (docs/log.md).
_TOUCH = 4
# Groups whose down rows are multiplied at once: the sums, larger than a cache, are read and written once for them all.
_TOGETHER = 4
Floats = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int32]
Words = npt.NDArray[np.uint32]


class Bundles(NamedTuple):
    """Slots of groups in memory, [slots, group_bytes] at `at`, and how to read and use them."""

    at: int
    bundle_bytes: int
    group_bytes: int
    tail_offset: int
    up_offset: int
    down_offset: int
    gate_kind: int
    down_kind: int
    hidden: int
    activation: int


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
    """Floats of scratch for `dense_groups`: widened rows, gate and up of some groups, x and factors as prepared."""
    tokens, neurons = -(-max_tokens // LANES) * LANES, _TOGETHER * GROUP
    return neurons * hidden + 2 * neurons * tokens + tokens * hidden // 2 + neurons * tokens // 2


@kernel
def _bundle(b: Bundles, slots: Ints, neuron: int) -> Any:
    return b.at + np.int64(slots[neuron // GROUP]) * b.group_bytes + neuron % GROUP * b.bundle_bytes


@kernel
def _touch_later(b: Bundles, slots: Ints, listed: Ints, i: int, high: int) -> None:
    """Announce the bundle of a later entry of the list to the memory system."""
    touch(_bundle(b, slots, listed[min(i + _TOUCH, high - 1)]), b.bundle_bytes, 1024)


@kernel
def _ahead(b: Bundles) -> int:
    """How many neurons ahead to fetch."""
    return 1 + AHEAD_BYTES // b.bundle_bytes


@kernel
def _add_output(b: Bundles, at: int, ahead_at: int, gate: Any, x_at: int, q_at: int, sums_at: int) -> Any:
    """Add the output of the neuron at `at`, whose gate is known, while fetching the one at `ahead_at`.

    Returns the factor of its down row.
    """
    up = dot(b.gate_kind, at + b.up_offset, x_at, q_at, b.hidden, ahead_at + b.up_offset)
    factor = activate(b.activation, gate) * up
    axpy(b.down_kind, factor, at + b.down_offset, sums_at, b.hidden, ahead_at + b.down_offset)
    return factor


@kernel
def _sums_of_group(b: Bundles, sums_at: int, scratch_at: int) -> Any:
    """Where axpys go: the sums, or for Q4C a group's own, zeroed."""
    if b.down_kind != _Q4C:
        return sums_at
    carray(floats_at(scratch_at), (b.hidden,))[:] = 0
    return scratch_at


@kernel
def _settle_group(b: Bundles, slots: Ints, neuron: int, factors: Any, group_at: int, sums_at: int) -> None:
    """Q4C: add what the group of `neuron` has gathered to the sums."""
    tail_at = _bundle(b, slots, neuron // GROUP * GROUP) + b.tail_offset
    settle(tail_at, group_at, factors, sums_at, b.hidden)


@intrinsic
def _lowest_bit(context, word):
    """The number of the lowest bit set in a word that is not 0."""

    def build(context, b, _signature, arguments):
        return call(b, "llvm.cttz.i32", I32, arguments[0], ir.Constant(ir.IntType(1), 1))

    return types.int32(types.uint32), build


@kernel
def mark(words: Words, neuron: int) -> None:
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
    x_at: int,
    q_at: int,
    sums_at: int,
    scratch_at: int,
    fired: Words,
) -> int:
    """Add the outputs of entries low..high of a list of neurons, in ascending order, for the one token at `x_at`.

    `q_at`: what `quantise` made of it; `skip`: leave a neuron whose gate is not positive. Those not left get their bit
    in `fired`, a word for each slot of the list; returns how many they are.
    """
    ahead = _ahead(b)
    group_at = _sums_of_group(b, sums_at, scratch_at)
    factors, computed = np.float32(0), 0
    for i in range(low, high):
        neuron = listed[i]
        at = _bundle(b, slots, neuron)
        ahead_at = _bundle(b, slots, listed[min(i + ahead, high - 1)])
        _touch_later(b, slots, listed, i, high)
        gate = dot(b.gate_kind, at, x_at, q_at, b.hidden, ahead_at)
        if not skip or not gate <= 0:
            computed += 1
            mark(fired, neuron)
            factors += _add_output(b, at, ahead_at, gate, x_at, q_at, group_at)
        if b.down_kind == _Q4C and (i == high - 1 or listed[i + 1] // GROUP != neuron // GROUP):
            _settle_group(b, slots, neuron, factors, group_at, sums_at)
            factors = np.float32(0)
    return computed


@kernel
def open_gates(b: Bundles, slots: Ints, low: int, high: int, x_at: int, q_at: int, gates: Floats, opened: Ints) -> int:
    """List those of neurons low..high whose gate is open, with their gates; returns their number."""
    count = 0
    for neuron in range(low, high):
        ahead_at = _bundle(b, slots, min(neuron + 4, high - 1))
        gate = dot(b.gate_kind, _bundle(b, slots, neuron), x_at, q_at, b.hidden, ahead_at)
        if not gate <= 0:
            gates[count] = gate
            opened[count] = neuron
            count += 1
    return count


@kernel
def open_neurons(
    b: Bundles,
    slots: Ints,
    gates: Floats,
    opened: Ints,
    low: int,
    high: int,
    x_at: int,
    q_at: int,
    sums_at: int,
    scratch_at: int,
) -> None:
    """Add the outputs of entries low..high of a list that `open_gates` made."""
    ahead = _ahead(b)
    group_at = _sums_of_group(b, sums_at, scratch_at)
    factors = np.float32(0)
    for i in range(low, high):
        neuron = opened[i]
        ahead_at = _bundle(b, slots, opened[min(i + ahead, high - 1)])
        _touch_later(b, slots, opened, i, high)
        factors += _add_output(b, _bundle(b, slots, neuron), ahead_at, gates[i], x_at, q_at, group_at)
        if b.down_kind == _Q4C and (i == high - 1 or opened[i + 1] // GROUP != neuron // GROUP):
            _settle_group(b, slots, neuron, factors, group_at, sums_at)
            factors = np.float32(0)


@kernel
def _note_firing(gate_at: int, panels: int, neurons: int, ids: Ints, firing: Any) -> None:
    """Which of the gates [panels, neurons, 16] are open, into `firing` uint16 [groups, 32, panels] at groups `ids`."""
    gates = carray(floats_at(gate_at), (panels, neurons, LANES))
    for panel in range(panels):
        for neuron in range(neurons):
            bits = 0
            for lane in range(LANES):
                if not gates[panel, neuron, lane] <= 0:
                    bits |= 1 << lane
            firing[ids[neuron // GROUP], neuron % GROUP, panel] = bits


@kernel
def dense_groups(
    b: Bundles,
    slots: Ints,
    low: int,
    high: int,
    x_at: int,
    panels: int,
    sums_at: int,
    scratch_at: int,
    ids: Ints,
    firing: Any,
) -> None:
    """Add the outputs of slots low..high for all tokens of x [panels, hidden, 16]; sums are laid out alike.

    `firing`: uint16 [groups, 32, panels] to note in, at the groups `ids` of the slots, which tokens open which gates;
    empty for not.
    """
    hidden = b.hidden
    gate_at = scratch_at + _TOGETHER * GROUP * hidden * 4
    up_at = gate_at + 4 * panels * _TOGETHER * GROUP * LANES
    input_at = up_at + 4 * panels * _TOGETHER * GROUP * LANES
    factors_at = input_at + panels * LANES * hidden * 2
    x_at = prepare(b.gate_kind, x_at, input_at, hidden, panels)
    for first in range(low, high, _TOGETHER):
        groups = min(_TOGETHER, high - first)
        neurons = groups * GROUP
        step = neurons * LANES * 4
        for row in range(0, neurons, 8):
            at, offset = _bundle(b, slots, first * GROUP + row), row * LANES * 4
            multiply_rows(b.gate_kind, at, b.bundle_bytes, hidden, x_at, gate_at + offset, step, panels, scratch_at)
            at += b.up_offset
            multiply_rows(b.gate_kind, at, b.bundle_bytes, hidden, x_at, up_at + offset, step, panels, scratch_at)
        if firing.size > 0:
            _note_firing(gate_at, panels, neurons, ids[first : first + groups], firing)
        activate_times(b.activation, gate_at, up_at, panels * neurons * LANES)
        h_at = prepare(b.down_kind, gate_at, factors_at, neurons, panels)
        next_at = scratch_at
        for slot in range(first, first + groups):
            at = _bundle(b, slots, slot * GROUP)
            next_at = gather_columns(
                b.down_kind, at + b.down_offset, b.bundle_bytes, at + b.tail_offset, GROUP, hidden, next_at
            )
        multiply_columns(b.down_kind, scratch_at, neurons, hidden, h_at, neurons, sums_at, hidden * LANES * 4, panels)
