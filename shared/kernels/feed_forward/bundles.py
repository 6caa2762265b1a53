"""Slots of groups in memory, how they are read and used, and the vectors that a prompt's job reads and writes."""

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from numba import carray

from warmfront.shared.kernels.activation import Activation, activation_of
from warmfront.shared.kernels.atomics import bytes_at, floats_at
from warmfront.shared.kernels.by_address.records import by_address
from warmfront.shared.kernels.feed_forward.down_rows import TOGETHER
from warmfront.shared.kernels.feed_forward.down_tiles import down_in_tiles, interleave_down
from warmfront.shared.kernels.fetching import ANNOUNCED, BUNDLES, GATE_ROWS, SCATTERED, Distances, usual_distances
from warmfront.shared.kernels.jit import inlined, kernel
from warmfront.shared.kernels.tiles import in_tiles, interleave
from warmfront.shared.model.architecture import FeedForward
from warmfront.shared.model.bundle import GROUP, BundleLayout

__all__ = [
    "Bundles",
    "Vectors",
    "add_biases",
    "arrange_group",
    "bias_of",
    "bundle_at",
    "bundles_at",
    "gate_bias_of",
    "group_at",
    "part_gates",
    "tile_group",
]

Ints = npt.NDArray[np.int32]


class Bundles(NamedTuple):
    """Slots of groups in memory, and how to read and use them."""

    # Address of [slots, group_bytes].
    at: int
    # As in `BundleLayout`; without its gate row where the gates are apart.
    bundle_bytes: int
    group_bytes: int
    tail_offset: int
    # Rows before the down row, 2, or 1 without a gate; their length; where their biases are, 0: nowhere.
    rows: int
    row_bytes: int
    gate_bias: int
    up_bias: int
    down_offset: int
    gate_kind: int
    down_kind: int
    hidden: int
    activation: Activation
    # Whether the groups are in tiles: see `tile_group`; or their gate rows are apart: see `part_gates`.
    tiled: bool
    apart: bool
    # Where in a group its first bundle is, or would be if it had its gate row.
    first: int
    # Where in a group the biases of its gates lie apart too, float32 [32]; 0: only in the bundles.
    gate_biases: int
    # How far ahead is fetched: of tiles in bytes, else in neurons; in neurons down rows, and by `listed_neurons` a line
    # of each KB; of gates that are apart the next 16. 0: not at all.
    ahead: int
    down_ahead: int
    gates_ahead: int
    announced: int


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


def bundles_at(
    at: int,
    layout: BundleLayout,
    feed_forward: FeedForward,
    whole: bool = False,
    distances: Distances | None = None,
    apart: bool = False,
) -> Bundles:
    """Describe slots at address `at`.

    `whole`: all neurons of a group are always computed, so its slot is in tiles where the machine is faster with them;
    `apart`: all gates are, so that they lie one behind the other. `distances`: how far ahead to fetch, by default the
    usual.
    """
    kind, table = layout.gate_kind, usual_distances() if distances is None else distances
    tiled = whole and all(bool(down_in_tiles(kind)) for kind in (layout.gate_kind, layout.down_kind))
    distance = int(table[BUNDLES if whole else SCATTERED, kind])
    neurons = -(-distance // layout.bundle_bytes)
    return by_address(
        Bundles(
            at=at,
            bundle_bytes=layout.bundle_bytes - layout.gate_row_bytes * apart,
            group_bytes=layout.group_bytes,
            tail_offset=layout.tail_offset,
            rows=2 if layout.gated else 1,
            row_bytes=layout.gate_row_bytes,
            gate_bias=layout.gate_bias_offset,
            up_bias=layout.up_bias_offset,
            down_offset=layout.down_offset,
            gate_kind=int(layout.gate_kind),
            down_kind=int(layout.down_kind),
            hidden=layout.hidden,
            activation=activation_of(feed_forward),
            tiled=tiled,
            apart=apart,
            first=(GROUP - 1) * layout.gate_row_bytes * apart,
            gate_biases=0,
            ahead=distance if tiled else neurons,
            # So many are read side by side: the next one is being read already.
            down_ahead=max(neurons, TOGETHER) if neurons else 0,
            gates_ahead=int(table[GATE_ROWS, kind]),
            announced=0 if whole else int(table[ANNOUNCED, kind]),
        )
    )


@kernel
def group_at(b: Bundles, slots: Ints, i: int) -> Any:
    """Where the group of slot `i` of a list lies."""
    return b.at + np.int64(slots[i]) * b.group_bytes


@kernel
def bundle_at(b: Bundles, slots: Ints, neuron: int) -> Any:
    """Where neuron `neuron` of a list of slots lies; if its gate row is apart, where it would lie with it."""
    return group_at(b, slots, neuron // GROUP) + b.first + neuron % GROUP * b.bundle_bytes


@inlined
def bias_of(at: int, offset: int) -> Any:
    """The bias at `offset` of the bundle at `at`; with offset 0, which says that there is none, 0."""
    return carray(floats_at(at + offset), (1,))[0] if offset != 0 else np.float32(0)


@kernel
def gate_bias_of(b: Bundles, at: int, neuron: int) -> Any:
    """The bias of the gate of a neuron of the group at `at`."""
    if b.gate_biases != 0:
        return bias_of(at + 4 * neuron, b.gate_biases)
    return bias_of(at + b.first + neuron * b.bundle_bytes, b.gate_bias)


@kernel
def add_biases(b: Bundles, at: int, offset: int, out_at: int, panels: int, lanes: int) -> None:
    """Add the biases at `offset` of the bundles of the group at `at` to float32 [panels, 32, lanes]."""
    if offset == 0:
        return
    first, step = (GROUP * offset, 4) if b.tiled else (b.first + offset, b.bundle_bytes)
    out = carray(floats_at(out_at), (panels, GROUP, lanes))
    for neuron in range(GROUP):
        bias = carray(floats_at(at + first + neuron * step), (1,))[0]
        for panel in range(panels):
            for lane in range(lanes):
                out[panel, neuron, lane] += bias


@kernel
def _gather(group: npt.NDArray[np.uint8], step: int, offset: int, size: int, out_at: int) -> None:
    """`size` bytes at `offset` of each bundle of a group, which are `step` bytes apart, one behind the other."""
    out = carray(bytes_at(out_at), (GROUP, size))
    for neuron in range(GROUP):
        for i in range(size):
            out[neuron, i] = group[neuron * step + offset + i]


@inlined
def _copied(at: int, count: int) -> Any:
    """The bytes at `at`. One by one in the source: for an array given to a slice numba compiles, for four seconds, what
    it would say of shapes that differ."""
    group, kept = carray(bytes_at(at), (count,)), np.empty(count, np.uint8)
    for i in range(count):
        kept[i] = group[i]
    return kept


@kernel
def tile_group(b: Bundles, at: int) -> None:
    """Turn the group at `at` into tiles: two of gate rows, two of up rows, one of down rows; then what was its tail.

    What begins at an offset in each bundle begins at 32 times that now: gate and up rows of floats stay rows, one
    behind the other, biases floats.
    """
    kept = _copied(at, b.tail_offset)
    for part in range(b.rows):
        rows_at = at + part * GROUP * b.row_bytes
        _gather(kept, b.bundle_bytes, part * b.row_bytes, b.row_bytes, rows_at)
        if in_tiles(b.gate_kind):
            interleave(b.gate_kind, rows_at, GROUP, b.hidden)
    for offset in (b.gate_bias, b.up_bias):
        if offset != 0:
            _gather(kept, b.bundle_bytes, offset, 4, at + GROUP * offset)
    down_at = at + GROUP * b.down_offset
    interleave_down(b.down_kind, kept[b.down_offset :], b.bundle_bytes, b.hidden, down_at)


@kernel
def part_gates(b: Bundles, at: int) -> None:
    """Bring the gate rows of the group at `at` before its bundles, in tiles if their type has them.

    Gates that are a bundle apart are read at half the speed (AVX-512, 4 bits): rows multiplied one by one, and too far
    from each other for the hardware's own fetching.
    """
    kept = _copied(at, b.tail_offset)
    step = b.bundle_bytes + b.row_bytes
    _gather(kept, step, 0, b.row_bytes, at)
    if in_tiles(b.gate_kind):
        interleave(b.gate_kind, at, GROUP, b.hidden)
    _gather(kept, step, b.row_bytes, b.bundle_bytes, at + GROUP * b.row_bytes)


@kernel
def arrange_group(b: Bundles, at: int) -> None:
    """Lay the group at `at` out as it is computed."""
    if b.tiled:
        tile_group(b, at)
    elif b.apart:
        part_gates(b, at)
