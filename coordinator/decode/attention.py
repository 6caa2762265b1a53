"""Causal attention of the compiled pass.

The cache is read tile by tile (`shared/model/kv_layout.py`), each for all query heads that share it. A batch: dots
with the keys, exponentials and sums of the values, some thousand positions at a time; the positions are split into
chunks where the key-value heads do not divide evenly over the threads. A prompt: matrix products, with 16 tokens
in the lanes and the query heads that share a key-value head as panels, some hundred positions at a time. Either way the
softmax is made as the scores come: what was summed so far shrinks when a higher score turns up, so that scratch memory
does not grow with the context. exp(a - top) * exp(top - new top) is exp(a - new top) but for some roundings of float32,
as many as the top rises, ever more rarely.

With a window a token sees no position before it, and tiles before it are not read. A head's sink is a score without a
value: the softmax begins with it.
"""

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from numba import carray

from warmfront.coordinator.decode.footprint import PANELS, SCORES
from warmfront.coordinator.decode.kv.write import cache_head, cache_panels, tile_at
from warmfront.coordinator.decode.network import POSITION, SINKS, TOKENS, Network, State
from warmfront.coordinator.decode.row_split import portion
from warmfront.shared.kernels.activation import exponentials, highest_of, soft_cap, softmax_rows
from warmfront.shared.kernels.atomics import address_of, floats_at
from warmfront.shared.kernels.attention.kv_gather import gather_keys, gather_values
from warmfront.shared.kernels.attention.kv_tiles import Heads, Tile, add_values, multiply_keys, quantise_heads
from warmfront.shared.kernels.gemm import Gathered, Panels, multiply_columns, pack_panels, panels_of
from warmfront.shared.kernels.jit import inlined, kernel
from warmfront.shared.kernels.rows import share
from warmfront.shared.model.formats import BLOCK
from warmfront.shared.model.kv_layout import PAGE, TILE
from warmfront.shared.model.panels import LANES
from warmfront.shared.wire.handoff import DONE, barrier

__all__ = ["attend_batch", "attend_panels", "join"]

# Positions that several tokens attend to at a time: the scores of a panel are 16 KB then.
_WIDTH = SCORES // LANES
# Lower than any score, and the score of what a token does not see.
_LOWEST, _UNSEEN = np.float32(-3e38), np.float32(-1e30)
Floats = npt.NDArray[np.float32]


@kernel
def _first_seen(net: Network, layer: int, position: int) -> int:
    """The first position that the token at `position` attends to."""
    window = net.windows[layer]
    return max(0, position + 1 - window) if window > 0 else 0


class _Run(NamedTuple):
    """`tiles` tiles of a head's keys and, after them, as many of its values, from position `first` on."""

    # Of the table of pages.
    row: int
    head: int
    layer: int
    first: int
    tiles: int
    # Of a head, a multiple of 32.
    numbers: int
    # What is read after these, from which position on; in the head -1: nothing.
    next_row: int
    next_head: int
    next_first: int


@kernel
def _softmax_start(net: Network, layer: int, head: int) -> tuple[Any, Any]:
    """A head's highest score and its sum of exponentials, relative to that, before it has seen any position."""
    sinks_at = net.weights[layer, SINKS]
    if sinks_at == 0:
        return _LOWEST, np.float32(0)
    return carray(floats_at(sinks_at), (net.heads,))[head], np.float32(1)


@kernel
def _tile(st: State, run: _Run, i: int) -> Tile:
    """The tile that is read as number i of a run, and how far away the one is that is fetched meanwhile.

    That is one of those to be read, `cache.ahead` later: at the end of the keys one of the values, at the end of these
    one of the next run. Heads lie apart, so what is behind a run's last tile would be fetched for nothing, 8 KB in
    float16, and the next run would begin with waiting.
    """
    cache = st.cache
    later = i + cache.ahead
    at = tile_at(st, run.row, i // run.tiles, run.head, run.layer, run.first + i % run.tiles * TILE)
    next_position = run.next_first + (later - 2 * run.tiles) * TILE
    nothing = run.next_head < 0 or next_position // PAGE >= st.tables.shape[1]
    if cache.ahead == 0 or (later >= 2 * run.tiles and nothing):
        return Tile(cache.kind, at, run.numbers, 0)
    if later < 2 * run.tiles:
        then = tile_at(st, run.row, later // run.tiles, run.head, run.layer, run.first + later % run.tiles * TILE)
    else:
        then = tile_at(st, run.next_row, 0, run.next_head, run.layer, next_position)
    return Tile(cache.kind, at, run.numbers, then - at)


@kernel
def _chunk(net: Network, st: State, layer: int, token: int, chunk: int) -> tuple[int, int]:
    """The positions that a token of a batch attends to in a chunk: where they begin, at a tile, and end."""
    position = st.positions[token]
    base = _first_seen(net, layer, position) // TILE * TILE
    start, end = share(position + 1 - base, TILE, chunk, chunk + 1, st.chunks)
    return base + start, base + end


@kernel
def attend_batch(net: Network, st: State, layer: int, rank: int) -> int:
    """Causal attention of a batch, token by token: this thread's (key-value head, chunk of the positions) pairs.

    It leaves each query head's mix of the chunk's values, its highest score and its sum of exponentials for `join`. A
    chunk is read by one token of a text after the other, so that it comes from memory once if it fits the cache. Of a
    token that comes alone, whoever has the last chunk of a head writes its key and value: only it reads that tile.
    Positions of the tiles at both ends that a token does not see have no weight, so the sums do not depend on what is
    there. Returns DONE or ABORTED.
    """
    if st.job[TOKENS] > 1:
        result = cache_panels(net, st, layer, rank, st.job[TOKENS], 1)
        if result != DONE:
            return result
    cache, head_dim, group, tokens = st.cache, net.head_dim, net.heads // net.kv_heads, st.job[TOKENS]
    padded = (head_dim + BLOCK - 1) // BLOCK * BLOCK
    queries, mixed = np.zeros((group, padded), np.float32), np.empty((group, padded), np.float32)
    packed = np.empty((group, padded), np.float32)
    scores_at, scores = address_of(st.scores[rank]), st.scores[rank]
    low, high = portion(st.cuts, net.kv_heads * st.chunks, 1, rank)
    for turn in range(low * tokens, high * tokens):
        task, token = turn // tokens, turn % tokens
        kv_head, chunk = task // st.chunks, task % st.chunks
        if tokens == 1 and chunk == st.chunks - 1:
            cache_head(net, st, layer, kv_head, 0, 1)
        seen = _first_seen(net, layer, st.positions[token])
        start, end = _chunk(net, st, layer, token, chunk)
        next_head, next_row, next_start = -1, 0, 0
        if turn + 1 < high * tokens:
            next_head, next_row = (turn + 1) // tokens // st.chunks, (turn + 1) % tokens
            next_start, _ = _chunk(net, st, layer, next_row, (turn + 1) // tokens % st.chunks)
        tops, totals = st.tops[token, chunk], st.totals[token, chunk]
        first_query = (token * (net.heads + 2 * net.kv_heads) + kv_head * group) * head_dim
        for head in range(group):
            number = kv_head * group + head
            tops[number], totals[number] = _LOWEST, 0
            if chunk == 0:
                tops[number], totals[number] = _softmax_start(net, layer, number)
            for i in range(head_dim):
                queries[head, i] = st.qkv[first_query + head * head_dim + i] * net.score_scale
        mixed[:] = 0
        queries_at = quantise_heads(cache.kind, address_of(queries), address_of(packed), padded, group)
        for first in range(start, end, SCORES):
            tiles = (min(end - first, SCORES) + TILE - 1) // TILE
            count = tiles * TILE
            if first + count < end:
                run = _Run(token, kv_head, layer, first, tiles, padded, token, kv_head, first + count)
            else:
                run = _Run(token, kv_head, layer, first, tiles, padded, next_row, next_head, next_start)
            for i in range(tiles):
                scores_of = Heads(scores_at + i * TILE * 4, count * 4)
                multiply_keys(_tile(st, run, i), Heads(queries_at, padded * 4), scores_of, group)
            if net.score_cap > 0:
                soft_cap(scores_at, group * count, net.score_cap)
            for head in range(group):
                own, number = scores[head * count : (head + 1) * count], kv_head * group + head
                hidden_before, hidden_behind = own[: max(seen - first, 0)], own[end - first :]
                hidden_before[:], hidden_behind[:] = -np.float32(np.inf), -np.float32(np.inf)
                at, before = scores_at + head * count * 4, tops[number]
                tops[number] = max(before, highest_of(at, count))
                factor = np.exp(before - tops[number])
                totals[number] = totals[number] * factor + exponentials(at, count, tops[number])
                # exp() has no 0.
                hidden_before[:], hidden_behind[:] = 0, 0
                for i in range(padded):
                    mixed[head, i] *= factor
            for i in range(tiles):
                chances = Heads(scores_at + i * TILE * 4, count * 4)
                add_values(_tile(st, run, tiles + i), chances, Heads(address_of(mixed), padded * 4), group)
        for head in range(group):
            at = (kv_head * group + head) * head_dim
            for i in range(head_dim):
                st.partial[token, chunk, at + i] = mixed[head, i]
    return barrier(st.barrier)


@inlined
def join(net: Network, st: State, token: int, out: Floats) -> None:
    """The attention of one token [heads * head_dim], from the chunks; each thread does all of it for itself.

    A chunk's softmax is relative to its own highest score; exp(own highest - highest of all) puts them on one scale.
    """
    for head in range(net.heads):
        top = np.float32(-np.inf)
        for chunk in range(st.chunks):
            top = max(top, st.tops[token, chunk, head])
        total = np.float32(0)
        for chunk in range(st.chunks):
            total += st.totals[token, chunk, head] * np.exp(st.tops[token, chunk, head] - top)
        result = out[head * net.head_dim : (head + 1) * net.head_dim]
        result[:] = 0
        for chunk in range(st.chunks):
            factor = np.exp(st.tops[token, chunk, head] - top) / total
            part = st.partial[token, chunk, head * net.head_dim : (head + 1) * net.head_dim]
            for i in range(net.head_dim):
                result[i] += factor * part[i]


@kernel
def _hide(own: Floats, start: int, count: int, position: int, window: int) -> None:
    """Scores [count, 16] of the positions from `start` on: hide what the tokens from `position` on do not see."""
    for p in range(max(position + 1 - start, 0), count):
        for lane in range(min(start + p - position, LANES)):
            own[p * LANES + lane] = _UNSEEN
    if window > 0:
        for p in range(min(position + LANES - window - start, count)):
            for lane in range(max(start + p + window - position, 0), LANES):
                own[p * LANES + lane] = _UNSEEN


@kernel
def attend_panels(net: Network, st: State, layer: int, rank: int) -> int:
    """Causal attention of several tokens: this thread's (key-value head, panels) pairs, as matrix products.

    The query heads that share a key-value head are the panels of one product, of as many panels of tokens as it takes
    at a time. Returns DONE or ABORTED.
    """
    panels = panels_of(st.job[TOKENS])
    result = cache_panels(net, st, layer, rank, panels, LANES)
    if result != DONE:
        return result
    cache, head_dim, group, window = st.cache, net.head_dim, net.heads // net.kv_heads, net.windows[layer]
    padded = (head_dim + BLOCK - 1) // BLOCK * BLOCK
    rows, until = (net.heads + 2 * net.kv_heads) * head_dim, st.job[POSITION] + st.job[TOKENS]
    together = max(1, PANELS // group)
    size = padded * LANES
    queries, mixed = np.zeros(together * group * size, np.float32), np.empty(together * group * size, np.float32)
    packed, state = np.empty(together * group * size, np.float32), np.empty((together * group, 3, LANES), np.float32)
    scratch = np.empty(max(padded, _WIDTH) * TILE, np.float32)
    scores, weights_at = st.scores[rank], address_of(st.chances[rank])
    for task in range(rank, net.kv_heads * ((panels + together - 1) // together), st.threads):
        panel, kv_head = task // net.kv_heads * together, task % net.kv_heads
        # Asked for in each turn: an address alone does not keep an array's memory.
        scratch_at = address_of(scratch)
        taken = min(together, panels - panel)
        position, columns = st.job[POSITION] + panel * LANES, taken * group
        end = min(position + taken * LANES, until)
        # The scale goes into the queries, head_dim products a token, instead of into all scores.
        for column in range(columns):
            row = (panel + column // group) * rows + (kv_head * group + column % group) * head_dim
            source, target = st.qkv[row * LANES :], queries[column * size :]
            for i in range(head_dim * LANES):
                target[i] = source[i] * net.score_scale
        queries_at = pack_panels(cache.kind, address_of(queries), address_of(packed), padded, columns)
        mixed[:] = 0
        for column in range(columns):
            state[column, 0, :], state[column, 1, :] = _softmax_start(net, layer, kv_head * group + column % group)
        # The softmax is cut at multiples of its width wherever the job begins: a prompt's tokens are the same bit for
        # bit in one job and in several.
        start = _first_seen(net, layer, position) // TILE * TILE
        while start < end:
            count = (min(end, start // _WIDTH * _WIDTH + _WIDTH) - start + TILE - 1) // TILE * TILE
            scores[: columns * count * LANES] = 0
            for p in range(0, count, TILE):
                gather_keys(Tile(cache.kind, tile_at(st, 0, 0, kv_head, layer, start + p), padded, 0), scratch_at)
                to = Panels(address_of(scores) + p * LANES * 4, count * LANES * 4, columns)
                multiply_columns(Gathered(cache.kind, scratch_at, padded, TILE), queries_at, padded, to)
            if net.score_cap > 0:
                soft_cap(address_of(scores), columns * count * LANES, net.score_cap)
            for column in range(columns):
                own = scores[column * count * LANES : (column + 1) * count * LANES]
                _hide(own, start, count, position + column // group * LANES, window)
                softmax_rows(address_of(own), count, address_of(state[column]))
                for i in range(padded):
                    for lane in range(LANES):
                        mixed[column * size + i * LANES + lane] *= state[column, 2, lane]
            chances_at = pack_panels(cache.kind, address_of(scores), weights_at, count, columns)
            for strip in range(padded // TILE):
                out = scratch_at
                for p in range(0, count, TILE):
                    at = tile_at(st, 0, 1, kv_head, layer, start + p)
                    out = gather_values(Tile(cache.kind, at, padded, 0), strip, out)
                sums = Panels(address_of(mixed) + strip * TILE * LANES * 4, size * 4, columns)
                multiply_columns(Gathered(cache.kind, scratch_at, count, TILE), chances_at, count, sums)
            start += count
        for column in range(columns):
            at = (panel + column // group) * net.heads + kv_head * group + column % group
            target, source = st.att[at * head_dim * LANES :], mixed[column * size :]
            for i in range(head_dim):
                for lane in range(LANES):
                    target[i * LANES + lane] = source[i * LANES + lane] / state[column, 1, lane]
    return barrier(st.barrier)
