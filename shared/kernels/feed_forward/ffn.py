"""Neurons for a batch of decoded tokens, each computed as if it came alone: what every worker on a CPU does.

    all       gate and up dot, axpy of the down row            `whole_groups` of tiles, else `listed_neurons`
    lowrank,  the same for the neurons of a mask; those whose  `list_masked`, `listed_neurons`
    lowbit    gate (or, with dReLU, up) does not fire end there
    exact     the gate of every neuron, then up and down of    `open_gates`, `open_neurons`
              those whose gate fires (`activation.fires`);
              with dReLU, down only where up fires too
    prefill   a prompt's tokens                                `prefill.dense_groups`

A list of slots says where the groups are; neuron i of the list is neuron i % 32 of slot i // 32. Who computes some
neuron of a group computes all that are wanted of it, and adds their sum to exact sums (`exact_sums.py`) that belong to
one thread: the bits of a layer's output do not depend on how its groups are shared out.

A neuron without a gate has its up row where gates are, and is computed as one whose up is 1: by `exact` all up rows are
read, and the down rows of those that fire.

The neurons listed are those that any token of the batch wants: a neuron comes from memory once, and each token that
wants it takes it in turn. The steps of a token's sums do not depend on the tokens beside it, so neither do its bits.
"""

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from numba import carray

from warmfront.shared.kernels.activation import activate_times, factor, fires, up_fires
from warmfront.shared.kernels.atomics import floats_at, longs_at
from warmfront.shared.kernels.feed_forward.bundles import (
    Bundles,
    add_biases,
    bias_of,
    bundle_at,
    gate_bias_of,
    group_at,
)
from warmfront.shared.kernels.feed_forward.down_rows import AHEAD_AT, FACTORS_AT, LIST_BYTES, add_down_rows
from warmfront.shared.kernels.feed_forward.down_tiles import add_down_tile, add_down_tiles
from warmfront.shared.kernels.feed_forward.neuron_lists import set_bit
from warmfront.shared.kernels.gemm import Panels
from warmfront.shared.kernels.jit import apart, kernel
from warmfront.shared.kernels.rows import Pair, dot, dot_two, prefetch
from warmfront.shared.kernels.tiles import TILE, in_tiles, multiply_tile, multiply_tiles
from warmfront.shared.model.bundle import GROUP
from warmfront.shared.model.panels import BATCH

__all__ = [
    "Batch",
    "Selection",
    "batch_scratch_bytes",
    "listed_neurons",
    "open_gates",
    "open_neurons",
    "open_ups",
    "whole_groups",
]

Floats = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int32]


class Batch(NamedTuple):
    """Addresses of what a job of 1 to 16 tokens reads and of what one thread writes."""

    tokens: int
    # float32 [tokens, hidden].
    x: int
    # What `quantise_batch` made of it, and bytes of a token's.
    quantised: int
    quantised_row: int
    # float32 [tokens]: 1 / unit of each token's sums.
    inverse: int
    # int64 [tokens, hidden]: the outputs are added here, in units.
    sums: int
    # [batch_scratch_bytes(hidden)].
    scratch: int


class Selection(NamedTuple):
    """Which neurons the tokens want: uint32 [tokens, slots], bit i of a word = neuron i of the slot."""

    words: Any
    # Whether a neuron is left out whose gate or up does not fire.
    skip: bool
    # The same, where the neurons that were computed get their bit.
    computed: Any


def batch_scratch_bytes(hidden: int) -> int:
    """Bytes that a thread needs for a batch beside its sums: a list of down rows for each token."""
    return BATCH * (LIST_BYTES + 4 * hidden)


@kernel
def _multiply_rows(b: Bundles, at: Pair, batch: Batch, out_at: int, other_out: int, ahead: int) -> None:
    """16 gate or up rows one behind the other, or their tile, at both places (0: there is no second one) times each
    token's input: float32 [tokens, 32] from `out_at` and from `other_out` on."""
    first, second = at
    if in_tiles(b.gate_kind):
        inputs = Panels(batch.quantised, batch.quantised_row, batch.tokens)
        out = Panels(out_at, GROUP * 4, batch.tokens)
        if second != 0:
            multiply_tiles(b.gate_kind, at, b.hidden, inputs, out, other_out, ahead)
        else:
            multiply_tile(b.gate_kind, first, b.hidden, inputs, out, ahead)
        return
    for row in range(TILE):
        for token in range(batch.tokens):
            start, place, own_ahead = row * b.row_bytes, 4 * (token * GROUP + row), ahead if token == 0 else 0
            if second != 0:
                rows, outs = (first + start, second + start), (out_at + place, other_out + place)
                x_at, q_at = batch.x + token * b.hidden * 4, batch.quantised + token * batch.quantised_row
                dot_two(b.gate_kind, rows, x_at, q_at, b.hidden, outs, own_ahead)
            else:
                carray(floats_at(out_at + place), (1,))[0] = _dot(b, first + start, batch, token, own_ahead)


@apart
def _whole_factors(b: Bundles, at: Pair, batch: Batch, gates_at: int) -> None:
    """What the down rows of two groups, or of one, are multiplied with: float32 [2, tokens, 32], with as much scratch
    behind them."""
    tokens, size = batch.tokens, batch.tokens * GROUP * 4
    ups_at = gates_at + 2 * size
    gates = carray(floats_at(gates_at), (2, tokens, GROUP))
    ups = carray(floats_at(ups_at), (2 * tokens * GROUP,))
    inverse = carray(floats_at(batch.inverse), (tokens,))
    ups[:] = 1
    for part in range(b.rows):
        out_at = ups_at if part else gates_at
        for row in range(0, GROUP, TILE):
            start, out = (part * GROUP + row) * b.row_bytes, out_at + row * 4
            rows = at[0] + start, at[1] + start if at[1] != 0 else 0
            _multiply_rows(b, rows, batch, out, out + size, b.ahead)
    for place in range(2 if at[1] != 0 else 1):
        for part in range(b.rows):
            out_at, bias = (ups_at, b.up_bias) if part else (gates_at, b.gate_bias)
            add_biases(b, at[place], bias, out_at + place * size, tokens, 1)
        for token in range(tokens):
            offset = place * size + token * GROUP * 4
            activate_times(b.activation, gates_at + offset, ups_at + offset, GROUP)
            for neuron in range(GROUP):
                gates[place, token, neuron] *= inverse[token]


@apart
def whole_groups(b: Bundles, slots: Ints, low: int, high: int, batch: Batch) -> None:
    """Add the outputs of all neurons of slots low..high, which are in tiles.

    Two groups at a time, one from each half: memory is read faster in two places at once (docs/log.md).
    """
    half, down = (high - low + 1) // 2, GROUP * b.down_offset
    sums, factors = Panels(batch.sums, b.hidden * 8, batch.tokens), Panels(batch.scratch, GROUP * 4, batch.tokens)
    for i in range(low, low + half):
        at = group_at(b, slots, i), group_at(b, slots, i + half) if i + half < high else 0
        _whole_factors(b, at, batch, batch.scratch)
        first, second, tail = at[0] + down, at[1] + down, b.tail_offset - down
        if at[1] != 0:
            add_down_tiles(b.down_kind, (first, second), tail, factors, sums, b.hidden, b.ahead)
        else:
            add_down_tile(b.down_kind, first, tail, factors, sums, b.hidden, b.ahead)


@kernel
def _later(b: Bundles, slots: Ints, listed: Ints, i: int, high: int) -> tuple[int, int]:
    """How many bytes behind that of entry i the bundles lie whose gate and up rows, and whose down row, are fetched.

    An even later one is announced. Scattered bundles come at two thirds of the bandwidth of contiguous ones: with a
    line of each KB their addresses are translated, and the hardware's own fetching starts.
    """
    if b.announced != 0:
        later = bundle_at(b, slots, listed[min(i + b.announced, high - 1)])
        prefetch(later + (b.row_bytes if b.apart else 0), b.bundle_bytes, 1024)
    at, last = bundle_at(b, slots, listed[i]), high - 1
    down = bundle_at(b, slots, listed[min(i + b.down_ahead, last)]) - at
    return bundle_at(b, slots, listed[min(i + b.ahead, last)]) - at, down


@kernel
def _dot(b: Bundles, row_at: int, batch: Batch, token: int, ahead: int) -> Any:
    """A gate or up row times a token's input."""
    quantised_at = batch.quantised + token * batch.quantised_row
    return dot(b.gate_kind, row_at, batch.x + token * b.hidden * 4, quantised_at, b.hidden, ahead)


@kernel
def _gate(b: Bundles, at: int, batch: Batch, token: int, ahead: int) -> Any:
    """The gate of the neuron at `at`."""
    return _dot(b, at, batch, token, ahead) + bias_of(at, b.gate_bias)


@kernel
def _up(b: Bundles, at: int, batch: Batch, token: int, ahead: int) -> Any:
    """The up of the neuron at `at`."""
    if b.rows == 1:
        return np.float32(1)
    return _dot(b, at + b.row_bytes, batch, token, ahead) + bias_of(at, b.up_bias)


@kernel
def _list_at(b: Bundles, batch: Batch, token: int) -> int:
    """Where a token's list of down rows is."""
    return batch.scratch + token * (LIST_BYTES + 4 * b.hidden)


@kernel
def _note_neuron(
    b: Bundles, at: int, ahead: tuple[int, int], gate: Any, batch: Batch, token: int, count: int, skip: bool
) -> bool:
    """Put the neuron at `at`, whose gate is known, behind `count` others of its group on the token's list of down rows.

    `ahead`: from `_later`. Returns False, if it may `skip` it, for one whose up does not fire.
    """
    list_at = _list_at(b, batch, token)
    up = _up(b, at, batch, token, ahead[0])
    if skip and not up_fires(b.activation, up):
        return False
    rows, aheads = carray(longs_at(list_at), (GROUP,)), carray(longs_at(list_at + AHEAD_AT), (GROUP,))
    factors = carray(floats_at(list_at + FACTORS_AT), (GROUP + 1,))
    own = factor(b.activation, gate, up) * carray(floats_at(batch.inverse), (batch.tokens,))[token]
    rows[count], aheads[count], factors[count] = at + b.down_offset, ahead[1], own
    factors[GROUP] = own + (factors[GROUP] if count > 0 else np.float32(0))
    return True


@kernel
def _add_group(b: Bundles, slots: Ints, neuron: int, batch: Batch, found: Any) -> None:
    """Add the down rows on the tokens' lists, of the group of `neuron`, to the sums; empties the lists."""
    tail_at = group_at(b, slots, neuron // GROUP) + b.tail_offset
    for token in range(batch.tokens):
        if found[token] > 0:
            sums_at = batch.sums + token * b.hidden * 8
            add_down_rows(b.down_kind, _list_at(b, batch, token), found[token], tail_at, sums_at, b.hidden)
            found[token] = 0


@kernel
def _ends_group(listed: Ints, i: int, high: int) -> bool:
    """Whether entry i of an ascending list that ends at `high` is the last of its group."""
    return i == high - 1 or listed[i + 1] // GROUP != listed[i] // GROUP


@apart
def listed_neurons(
    b: Bundles, slots: Ints, listed: Ints, low: int, high: int, selection: Selection, batch: Batch
) -> int:
    """Add the outputs of entries low..high, whole groups, of a list of neurons in ascending order.

    Returns how many were computed, for each token that wanted them.
    """
    count, found = 0, np.zeros(batch.tokens, np.int64)
    for i in range(low, high):
        neuron = listed[i]
        slot, bit = neuron // GROUP, np.uint32(1) << np.uint32(neuron % GROUP)
        at = bundle_at(b, slots, neuron)
        ahead = _later(b, slots, listed, i, high)
        for token in range(batch.tokens):
            if selection.words[token, slot] & bit == 0:
                continue
            # Whichever tokens want it: what is fetched twice comes from the cache.
            gate = _gate(b, at, batch, token, ahead[0])
            if selection.skip and not fires(b.activation, gate):
                continue
            if _note_neuron(b, at, ahead, gate, batch, token, found[token], selection.skip):
                set_bit(selection.computed[token], neuron)
                found[token] += 1
                count += 1
        if _ends_group(listed, i, high):
            _add_group(b, slots, neuron, batch, found)
    return count


@apart
def open_gates(
    b: Bundles, slots: Ints, low: int, high: int, batch: Batch, words: Any, gates: Floats, opened: Ints
) -> int:
    """List those neurons of slots low..high whose gate fires for any token, with their gates [listed, tokens].

    A token whose word [tokens, slots] of a slot is 0 has only closed gates there. Returns how many neurons are listed;
    `gates` and `opened` have room for all.
    """
    count, closed = 0, np.float32(-np.inf)
    products = carray(floats_at(batch.scratch), (batch.tokens, GROUP))
    for i in range(low, high):
        at = group_at(b, slots, i)
        if b.apart:
            # The next group's meanwhile.
            ahead = group_at(b, slots, min(i + 1, high - 1)) - at if b.gates_ahead else 0
            tiles = at, at + TILE * b.row_bytes
            _multiply_rows(b, tiles, batch, batch.scratch, batch.scratch + TILE * 4, ahead)
        else:
            for neuron in range(GROUP):
                for token in range(batch.tokens):
                    products[token, neuron] = _dot(b, at + neuron * b.bundle_bytes, batch, token, 0)
        for neuron in range(GROUP):
            bias = gate_bias_of(b, at, neuron)
            fired = False
            for token in range(batch.tokens):
                gate = products[token, neuron] + bias if words[token, i] != 0 else closed
                gates[count * batch.tokens + token] = gate
                fired |= fires(b.activation, gate)
            if fired:
                opened[count] = i * GROUP + neuron
                count += 1
    return count


@apart
def open_neurons(
    b: Bundles, slots: Ints, gates: Floats, opened: Ints, low: int, high: int, batch: Batch, computed: Any
) -> int:
    """Add the outputs of entries low..high, whole groups, of a list that `open_gates` made, where their gates fire.

    Those whose up fires too get their bit in `computed`, as in `Selection`; returns how many they are, for each token.
    """
    count, found = 0, np.zeros(batch.tokens, np.int64)
    for i in range(low, high):
        at = bundle_at(b, slots, opened[i])
        ahead = _later(b, slots, opened, i, high)
        for token in range(batch.tokens):
            gate = gates[i * batch.tokens + token]
            if fires(b.activation, gate) and _note_neuron(b, at, ahead, gate, batch, token, found[token], True):
                set_bit(computed[token], opened[i])
                found[token] += 1
                count += 1
        if _ends_group(opened, i, high):
            _add_group(b, slots, opened[i], batch, found)
    return count


@kernel
def open_ups(b: Bundles, slots: Ints, opened: Ints, count: int, batch: Batch) -> int:
    """How many neurons of a list that `open_gates` made for one token have an up that fires too."""
    found = 0
    for i in range(count):
        found += up_fires(b.activation, _up(b, bundle_at(b, slots, opened[i]), batch, 0, 0))
    return found
