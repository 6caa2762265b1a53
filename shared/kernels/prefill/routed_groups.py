"""Whole groups of neurons for several tokens of which not all use every branch: products by branch, over its tokens.

The tokens of a branch are brought together into panels, computed by `dense_groups`, and their outputs added where they
belong. Nothing is computed for a branch that no token uses. A token's sums have the same bits wherever its lane is.
"""

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from numba import carray

from warmfront.shared.kernels.atomics import address_of, floats_at, longs_at
from warmfront.shared.kernels.feed_forward.bundles import Bundles, Vectors
from warmfront.shared.kernels.gemm import panels_of
from warmfront.shared.kernels.jit import kernel
from warmfront.shared.kernels.prefill.dense_groups import dense_groups
from warmfront.shared.machine.memory import zeros
from warmfront.shared.model.panels import LANES

__all__ = ["Routed", "RoutedBuffers", "buffers_of", "cut_by_tokens", "list_users", "routed_buffers", "routed_groups"]

Ints = npt.NDArray[np.int32]


class RoutedBuffers(NamedTuple):
    """What a thread needs beside the scratch of `dense_groups`; of several threads, arrays with a row for each."""

    # int32 [branches, max_tokens]: the tokens that use each branch; int64 [branches]: how many they are.
    users: Any
    counts: Any
    # float32 and int64 [max_tokens, hidden]: x and the sums, token by token.
    rows: Any
    totals: Any
    # The same of a branch's tokens, in panels; float32 [max_tokens]: 1 / unit of their sums, times the branch's weight.
    x: Any
    sums: Any
    factors: Any


class Routed(NamedTuple):
    """The job: what of it is used by which tokens."""

    tokens: int
    # float32 [max_tokens, branches].
    routing: Any
    # int32 [slots]: the branch of each slot of the list, rising.
    branches: Any
    buffers: RoutedBuffers


def routed_buffers(threads: int, hidden: int, branches: int, max_tokens: int) -> RoutedBuffers:
    """Buffers for so many threads; with a single branch, which needs none, empty ones."""
    size = max_tokens if branches > 1 else 0
    return RoutedBuffers(
        users=zeros((threads, branches, size), np.int32),
        counts=zeros((threads, branches), np.int64),
        rows=zeros((threads, size, hidden), np.float32),
        totals=zeros((threads, size, hidden), np.int64),
        x=zeros((threads, size * hidden), np.float32),
        sums=zeros((threads, size * hidden), np.int64),
        factors=zeros((threads, size), np.float32),
    )


@kernel
def buffers_of(buffers: RoutedBuffers, rank: int) -> RoutedBuffers:
    """Those of one thread."""
    return RoutedBuffers(
        buffers.users[rank],
        buffers.counts[rank],
        buffers.rows[rank],
        buffers.totals[rank],
        buffers.x[rank],
        buffers.sums[rank],
        buffers.factors[rank],
    )


@kernel
def list_users(routing: Any, tokens: int, buffers: RoutedBuffers) -> None:
    """Find out which of so many tokens use each branch."""
    buffers.counts[:] = 0
    for token in range(tokens):
        for branch in range(len(buffers.counts)):
            if routing[token, branch] != 0:
                buffers.users[branch, buffers.counts[branch]] = token
                buffers.counts[branch] += 1


@kernel
def _cost(job: Routed, i: int) -> int:
    """What a slot costs, in panels of tokens: its weights are read and widened whatever their number, which is about
    what one panel costs."""
    return 1 + panels_of(job.buffers.counts[job.branches[i]])


@kernel
def cut_by_tokens(job: Routed, count: int, part: int, parts: int) -> int:
    """The slot, of the first `count`, before which `part` of `parts` of the work lies."""
    total, done = 0, 0
    for i in range(count):
        total += _cost(job, i)
    for i in range(count):
        if done * parts >= total * part:
            return i
        done += _cost(job, i)
    return count


@kernel
def _by_token(at: int, rows: Any, tokens: int) -> None:
    """x [panels, hidden, 16] at `at`, token by token."""
    hidden = rows.shape[1]
    x = carray(floats_at(at), (panels_of(tokens), hidden, LANES))
    for token in range(tokens):
        panel, lane, row = x[token // LANES], token % LANES, rows[token]
        for k in range(hidden):
            row[k] = panel[k, lane]


@kernel
def _gather(buffers: RoutedBuffers, branch: int, routing: Any, inverse_at: int, tokens: int) -> None:
    """The inputs of a branch's tokens in panels, and their factors."""
    rows, count = buffers.rows, buffers.counts[branch]
    hidden, inverse = rows.shape[1], carray(floats_at(inverse_at), (tokens,))
    users = buffers.users[branch]
    buffers.factors[: panels_of(count) * LANES] = 0
    for i in range(count):
        buffers.factors[i] = inverse[users[i]] * routing[users[i], branch]
    for first in range(0, count, LANES):
        some = min(LANES, count - first)
        panel = buffers.x[first * hidden : (first + LANES) * hidden]
        for k in range(hidden):
            for lane in range(some):
                panel[k * LANES + lane] = rows[users[first + lane], k]


@kernel
def _scatter(buffers: RoutedBuffers, branch: int) -> None:
    """Add the sums of a branch's tokens to their totals."""
    totals, users = buffers.totals, buffers.users[branch]
    hidden = totals.shape[1]
    for first in range(0, buffers.counts[branch], LANES):
        some = min(LANES, buffers.counts[branch] - first)
        panel = buffers.sums[first * hidden : (first + LANES) * hidden]
        for k in range(hidden):
            for lane in range(some):
                totals[users[first + lane], k] += panel[k * LANES + lane]


@kernel
def _add_totals(totals: Any, at: int, tokens: int) -> None:
    """Add sums by token to sums [panels, hidden, 16] at `at`."""
    hidden = totals.shape[1]
    sums = carray(longs_at(at), (panels_of(tokens), hidden, LANES))
    for token in range(tokens):
        panel, lane, row = sums[token // LANES], token % LANES, totals[token]
        for k in range(hidden):
            panel[k, lane] += row[k]


@kernel
def routed_groups(
    b: Bundles, slots: Ints, low: int, high: int, vectors: Vectors, job: Routed, ids: Ints, firing: Any
) -> None:
    """Add the outputs of slots low..high, each for the tokens that use its branch; `ids`, `firing`: empty."""
    buffers, tokens = job.buffers, job.tokens
    x_at, sums_at = address_of(buffers.x), address_of(buffers.sums)
    apart = False
    start = low
    while start < high:
        branch, end = job.branches[start], start + 1
        while end < high and job.branches[end] == branch:
            end += 1
        count = buffers.counts[branch]
        if branch == 0:
            dense_groups(b, slots, start, end, vectors, panels_of(tokens), ids, firing)
        elif count > 0:
            if not apart:
                _by_token(vectors.x, buffers.rows, tokens)
                buffers.totals[:tokens] = 0
                apart = True
            _gather(buffers, branch, job.routing, vectors.inverse, tokens)
            buffers.sums[: panels_of(count) * LANES * b.hidden] = 0
            own = Vectors(x_at, address_of(buffers.factors), sums_at, vectors.scratch)
            dense_groups(b, slots, start, end, own, panels_of(count), ids, firing)
            _scatter(buffers, branch)
        start = end
    if apart:
        _add_totals(buffers.totals, vectors.sums, tokens)
