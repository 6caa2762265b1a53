"""Whole groups of neurons for several tokens: small matrix products, then the down rows of some groups together."""

from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from numba import carray
from numba.extending import register_jitable

from warmfront.shared.kernels.activation import activate_times
from warmfront.shared.kernels.atomics import address_of, floats_at, longs_at, words_at
from warmfront.shared.kernels.feed_forward.bundles import Bundles, Vectors, add_biases, group_at
from warmfront.shared.kernels.feed_forward.down_rows import LIST_BYTES
from warmfront.shared.kernels.feed_forward.down_tiles import down_in_bytes
from warmfront.shared.kernels.gemm import Panels, Rows, gather_columns, pack_panels, panels_of
from warmfront.shared.kernels.jit import inlined, kernel
from warmfront.shared.kernels.prefill.byte_panels import PANEL_BLOCK
from warmfront.shared.kernels.prefill.byte_products import multiply_thirty_two, turn_tokens
from warmfront.shared.kernels.prefill.down_bytes import (
    SUMS_BYTES,
    DownRows,
    add_down_bytes,
    add_strips,
    quantise_factors,
    widen_neuron_scales,
)
from warmfront.shared.kernels.prefill.group_sums import Columns, Factors, add_columns
from warmfront.shared.kernels.prefill.matrix import multiply_tokens, pack_tokens, packed_words
from warmfront.shared.kernels.prefill.notes import Notes, note_group
from warmfront.shared.kernels.rows import row_stride
from warmfront.shared.kernels.tiles import in_tiles
from warmfront.shared.model.bundle import GROUP
from warmfront.shared.model.formats import BLOCK, Kind
from warmfront.shared.model.panels import LANES, whole_panels

__all__ = [
    "Chosen",
    "Work",
    "add_dense_groups",
    "add_groups",
    "all_tokens",
    "begin_job",
    "dense_groups",
    "end_job",
    "scratch_bytes",
]

# Groups whose factors are kept until their down rows follow, and columns of floats that are widened at a time: 12
# groups' factors for 48 tokens, 37 KB, and their 8 columns stay in the first cache, 64 columns in the second.
_BATCH, _COLUMNS = 12, 64
# Tokens to which the down rows of a batch, as bytes, are added at a time: in 32 columns their sums are 12 KB.
_TOKENS = 3 * LANES
_Q4C = int(Kind.Q4C)
# The scales of the rows of Q4C, which has none.
_ONES = np.ones(GROUP, np.float32)
Ints = npt.NDArray[np.int32]


class Chosen(NamedTuple):
    """The tokens that some groups are computed for."""

    # How many, and where among the job's: address of int32 [tokens].
    tokens: int
    places: int
    # Addresses: their panels, from `pack_tokens`; float32 [tokens]: 1 / unit of each token's sums, times what the
    # groups' outputs are weighed with. Lanes behind the last token hold anything.
    x: int
    inverse: int
    # Where the groups add: the job's strips, or panels of these tokens, of down rows that are not multiplied as bytes.
    sums: int


class Work(NamedTuple):
    """Addresses of what a job needs: scratch memory of one thread."""

    # Of down rows as bytes: int64 [hidden / 32, tokens, 32].
    strips: int
    # int32: 0, 1, 2, ...
    places: int
    # The inputs as `pack_tokens` leaves them.
    x: int
    # Rows, or a stretch of a batch's columns, widened; gates and ups of a group; the factors of a batch, as floats and
    # as bytes.
    widened: int
    gates: int
    ups: int
    factors: int
    # Tokens of the job, in whole panels.
    tokens: int


def scratch_bytes(hidden: int, groups: int, max_tokens: int) -> int:
    """Bytes that a thread needs beside its sums, for layers of so many groups."""
    tokens = whole_panels(max_tokens)
    single = LIST_BYTES + 4 * hidden
    fixed = tokens * (8 * hidden + 4 + 2 * hidden + 8 * GROUP) + _widened_bytes(hidden)
    return max(single, fixed + min(_BATCH, groups) * (4 * GROUP + PANEL_BLOCK // LANES) * tokens)


@register_jitable
def _widened_bytes(hidden: int) -> int:
    """Eight rows, or a stretch of a batch's columns, widened."""
    return 4 * max(8 * hidden, _BATCH * GROUP * _COLUMNS)


@kernel
def begin_job(b: Bundles, vectors: Vectors, tokens: int) -> Work:
    """Lay out the scratch memory for a job of so many tokens, and bring its inputs into their order."""
    panels = panels_of(tokens)
    padded = panels * LANES
    places = vectors.scratch + 8 * b.hidden * padded
    x = places + 4 * padded
    widened = x + 2 * b.hidden * padded
    gates = widened + _widened_bytes(b.hidden)
    ups = gates + 4 * GROUP * padded
    numbers = carray(words_at(places), (padded,))
    for i in range(padded):
        numbers[i] = i
    if down_in_bytes(b.down_kind):
        strips = carray(longs_at(vectors.scratch), (b.hidden * padded,))
        strips[:] = 0
    x = pack_tokens(b.gate_kind, vectors.x, x, b.hidden, panels)
    return Work(vectors.scratch, places, x, widened, gates, ups, ups + 4 * GROUP * padded, padded)


@kernel
def end_job(b: Bundles, vectors: Vectors, work: Work) -> None:
    """Add what has come together to the job's sums."""
    if down_in_bytes(b.down_kind):
        add_strips(work.strips, work.tokens // LANES, b.hidden, vectors.sums)


@kernel
def _scale_tokens(at: int, inverse_at: int, panels: int) -> None:
    """Multiply float32 [panels, 32, 16] by each token's inverse [panels, 16]."""
    values, inverse = carray(floats_at(at), (panels, GROUP, LANES)), carray(floats_at(inverse_at), (panels, LANES))
    for panel in range(panels):
        for neuron in range(GROUP):
            for lane in range(LANES):
                values[panel, neuron, lane] *= inverse[panel, lane]


@inlined
def _keep(kind: int, factors: int, inverse: int, panels: int, blocks: int) -> None:
    """Make of a group's factors [panels, 32, 16] what its down rows want, in place; of Q4C as bytes to `blocks`."""
    if not down_in_bytes(kind):
        _scale_tokens(factors, inverse, panels)
        pack_panels(kind, factors, factors, GROUP, panels)
    elif kind == _Q4C:
        quantise_factors(kind, factors, inverse, address_of(_ONES), panels, blocks)


@inlined
def _factors(b: Bundles, at: int, some: Chosen, work: Work, out: int) -> None:
    """The factors of the neurons of the group at `at` for some tokens, in panels [32, 16] at `out`."""
    in_bytes = in_tiles(b.gate_kind)
    panels = panels_of(some.tokens)
    x = Panels(some.x, packed_words(b.gate_kind, b.hidden) * LANES * 4, panels)
    for part in range(b.rows):
        rows = Rows(b.gate_kind, at + b.first + part * b.row_bytes, b.bundle_bytes, b.hidden)
        tiled = b.tiled or (b.apart and part == 0)
        if tiled:
            rows = Rows(b.gate_kind, at + part * GROUP * b.row_bytes, b.row_bytes, b.hidden)
        to = work.ups if part else work.gates
        bias = b.up_bias if part else b.gate_bias
        if in_bytes:
            multiply_thirty_two(rows, tiled, GROUP, x, some.tokens, to, work.widened)
            add_biases(b, at, bias, to, some.tokens, 1)
        else:
            multiply_tokens(rows, 0, 0, GROUP, some.x, Panels(to, GROUP * LANES * 4, panels), work.widened)
            add_biases(b, at, bias, to, panels, LANES)
    activate_times(b.activation, work.gates, work.ups, panels * GROUP * LANES)
    if in_bytes:
        turn_tokens(work.gates, some.tokens, out)
    else:
        size = panels * GROUP * LANES
        values, kept = carray(floats_at(work.gates), (size,)), carray(floats_at(out), (size,))
        for i in range(size):
            kept[i] = values[i]


@inlined
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
def _down_rows(b: Bundles, slots: Ints, i: int) -> DownRows:
    """Those of group i of `slots`."""
    at = group_at(b, slots, i)
    rows_at, stride = at + b.first + b.down_offset, b.bundle_bytes
    if b.tiled:
        rows_at, stride = at + GROUP * b.down_offset, 0
    return DownRows(b.down_kind, rows_at, stride, at + b.tail_offset, b.hidden)


@inlined
def _add_bytes(b: Bundles, slots: Ints, some: Chosen, work: Work, blocks_at: int) -> None:
    """Add the down rows of `slots` times their factors, which are at `blocks_at` for Q4C, as bytes."""
    panels = panels_of(some.tokens)
    for block in range(b.hidden // BLOCK):
        strip = some.sums + block * work.tokens * SUMS_BYTES
        if b.down_kind != _Q4C:
            for i in range(len(slots)):
                widen_neuron_scales(_down_rows(b, slots, i), block, work.widened)
                own = work.factors + i * panels * GROUP * LANES * 4
                blocks = blocks_at + i * panels * PANEL_BLOCK
                quantise_factors(b.down_kind, own, some.inverse, work.widened, panels, blocks)
        for first in range(0, some.tokens, _TOKENS):
            tokens, places = min(_TOKENS, some.tokens - first), some.places + 4 * first
            for i in range(len(slots)):
                blocks = blocks_at + (i * panels + first // LANES) * PANEL_BLOCK
                add_down_bytes(_down_rows(b, slots, i), block, blocks, places, tokens, strip)


@inlined
def add_groups(b: Bundles, slots: Ints, low: int, high: int, some: Chosen, work: Work, ids: Ints, notes: Notes) -> None:
    """Add the outputs of slots low..high for some tokens of a job; `ids`: their groups' numbers, for the notes."""
    panels = panels_of(some.tokens)
    # Those of neurons without a gate stay so.
    ups = carray(floats_at(work.ups), (panels * GROUP * LANES,))
    ups[:] = 1
    size = 4 * panels * GROUP * LANES
    blocks_at = work.factors + min(_BATCH, high - low) * size
    for start in range(low, high, _BATCH):
        batch = slots[start : min(start + _BATCH, high)]
        for i in range(len(batch)):
            own = work.factors + i * size
            _factors(b, group_at(b, batch, i), some, work, own)
            if notes.by != 0:
                note_group(notes, own, panels, ids[start + i])
            _keep(b.down_kind, own, some.inverse, panels, blocks_at + i * panels * PANEL_BLOCK)
        if down_in_bytes(b.down_kind):
            _add_bytes(b, batch, some, work, blocks_at)
        else:
            _add_widened(b, batch, Factors(work.factors, panels), some.sums, work.widened)


@inlined
def all_tokens(b: Bundles, vectors: Vectors, work: Work, tokens: int) -> Chosen:
    """All tokens of a job."""
    sums = work.strips if down_in_bytes(b.down_kind) else vectors.sums
    return Chosen(tokens, work.places, work.x, vectors.inverse, sums)


@inlined
def add_dense_groups(
    b: Bundles, slots: Ints, low: int, high: int, vectors: Vectors, tokens: int, ids: Ints, notes: Notes
) -> None:
    """Add the outputs of slots low..high for so many tokens; `ids`, `notes`: as in `add_groups`."""
    work = begin_job(b, vectors, tokens)
    add_groups(b, slots, low, high, all_tokens(b, vectors, work, tokens), work, ids, notes)
    end_job(b, vectors, work)


@kernel
def dense_groups(
    b: Bundles, slots: Ints, low: int, high: int, vectors: Vectors, tokens: int, ids: Ints, notes: Notes
) -> None:
    """`add_dense_groups`, where Python calls it."""
    add_dense_groups(b, slots, low, high, vectors, tokens, ids, notes)
