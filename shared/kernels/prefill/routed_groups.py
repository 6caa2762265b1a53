"""Whole groups of neurons for several tokens of which not all use every branch: products by branch, over its tokens.

The tokens of a branch are brought together, computed by `add_groups`, and their outputs added where they belong.
Nothing is computed for a branch that no token uses. A token's sums have the same bits wherever its lane is.
"""

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from numba import carray

from warmfront.shared.kernels.atomics import address_of, floats_at, longs_at, words_at
from warmfront.shared.kernels.feed_forward.branches import branch_end
from warmfront.shared.kernels.feed_forward.bundles import Bundles, Vectors
from warmfront.shared.kernels.feed_forward.down_tiles import down_in_bytes
from warmfront.shared.kernels.gemm import panels_of
from warmfront.shared.kernels.jit import kernel
from warmfront.shared.kernels.prefill.dense_groups import Chosen, add_groups, all_tokens, begin_job, end_job
from warmfront.shared.kernels.prefill.matrix import packed_words
from warmfront.shared.kernels.prefill.notes import Notes
from warmfront.shared.machine.memory import zeros
from warmfront.shared.model.panels import LANES

__all__ = ["Routed", "RoutedBuffers", "buffers_of", "cut_by_tokens", "list_users", "routed_buffers", "routed_groups"]

# What a group costs beside its tokens, in tokens: its weights come from memory (measured: 36 tokens cost 1.2 times as
# much as with weights from the cache). Only the threads' shares depend on it.
_READING = 8
Ints = npt.NDArray[np.int32]


class RoutedBuffers(NamedTuple):
    """What a thread needs beside the scratch of `dense_groups`; of several threads, arrays with a row for each."""

    # int32 [branches, max_tokens]: the tokens that use each branch; int64 [branches]: how many they are.
    users: Any
    counts: Any
    # Of a branch's tokens: their inputs as `pack_tokens` leaves them; float32 [max_tokens]: 1 / unit of their sums,
    # times the branch's weight; int64 [max_tokens * hidden]: their sums in panels, where these are not strips.
    x: Any
    factors: Any
    sums: Any


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
        x=zeros((threads, size * hidden), np.float32),
        factors=zeros((threads, size), np.float32),
        sums=zeros((threads, size * hidden), np.int64),
    )


@kernel
def buffers_of(buffers: RoutedBuffers, rank: int) -> RoutedBuffers:
    """Those of one thread."""
    return RoutedBuffers(
        buffers.users[rank],
        buffers.counts[rank],
        buffers.x[rank],
        buffers.factors[rank],
        buffers.sums[rank],
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
    """What a slot costs, in tokens: its weights are read whatever their number, which is about what some more cost."""
    return _READING + job.buffers.counts[job.branches[i]]


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
def _gather(job: Routed, branch: int, x_at: int, words: int, inverse_at: int) -> None:
    """The inputs of a branch's tokens, from panels [words, 16] at `x_at`, and their factors."""
    buffers, users, count = job.buffers, job.buffers.users[branch], job.buffers.counts[branch]
    inverse = carray(floats_at(inverse_at), (job.tokens,))
    buffers.factors[: panels_of(count) * LANES] = 0
    for i in range(count):
        buffers.factors[i] = inverse[users[i]] * job.routing[users[i], branch]
    panels = carray(words_at(x_at), (panels_of(job.tokens), words, LANES))
    own = carray(words_at(address_of(buffers.x)), (panels_of(count), words, LANES))
    for first in range(0, count, LANES):
        some = min(LANES, count - first)
        for word in range(words):
            for lane in range(some):
                user = users[first + lane]
                own[first // LANES, word, lane] = panels[user // LANES, word, user % LANES]


@kernel
def _scatter(buffers: RoutedBuffers, branch: int, hidden: int, sums_at: int, tokens: int) -> None:
    """Add the sums of a branch's tokens to those of the job, both in panels [hidden, 16]."""
    users, count = buffers.users[branch], buffers.counts[branch]
    own = carray(longs_at(address_of(buffers.sums)), (panels_of(count), hidden, LANES))
    sums = carray(longs_at(sums_at), (panels_of(tokens), hidden, LANES))
    for first in range(0, count, LANES):
        for k in range(hidden):
            for lane in range(min(LANES, count - first)):
                user = users[first + lane]
                sums[user // LANES, k, user % LANES] += own[first // LANES, k, lane]


@kernel
def routed_groups(
    b: Bundles, slots: Ints, low: int, high: int, vectors: Vectors, job: Routed, ids: Ints, notes: Notes
) -> None:
    """Add the outputs of slots low..high, each for the tokens that use its branch; without notes."""
    buffers, in_strips = job.buffers, down_in_bytes(b.down_kind)
    work = begin_job(b, vectors, job.tokens)
    start = low
    while start < high:
        branch, end = job.branches[start], branch_end(job.branches, start, high)
        count = buffers.counts[branch]
        if branch != 0 and count == 0:
            start = end
            continue
        users = all_tokens(b, vectors, work, job.tokens)
        if branch != 0:
            _gather(job, branch, work.x, packed_words(b.gate_kind, b.hidden), vectors.inverse)
            x_at, factors_at, sums_at = address_of(buffers.x), address_of(buffers.factors), work.strips
            if not in_strips:
                buffers.sums[: panels_of(count) * LANES * b.hidden] = 0
                sums_at = address_of(buffers.sums)
            users = Chosen(count, address_of(buffers.users[branch]), x_at, factors_at, sums_at)
        add_groups(b, slots, start, end, users, work, ids, notes)
        if branch != 0 and not in_strips:
            _scatter(buffers, branch, b.hidden, vectors.sums, job.tokens)
        start = end
    end_job(b, vectors, work)
