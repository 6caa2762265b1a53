"""Groups of the branches of a feed-forward, for a batch of which not all tokens use every branch.

A branch's weight is multiplied into the unit of the token's sums: so every kernel computes a branch as it does all
else, and knows nothing of weights.
"""

from typing import Any

import numpy as np
import numpy.typing as npt
from numba import carray

from warmfront.shared.kernels.atomics import address_of, floats_at
from warmfront.shared.kernels.feed_forward.bundles import Bundles
from warmfront.shared.kernels.feed_forward.ffn import Batch, whole_groups
from warmfront.shared.kernels.jit import inlined, kernel
from warmfront.shared.model.bundle import GROUP

__all__ = ["branch_end", "listed_end", "users_groups", "uses_branch", "weighed"]

Ints = npt.NDArray[np.int32]


@kernel
def uses_branch(routing: Any, branch: int, tokens: int) -> bool:
    """Whether any of the first tokens of `routing` [tokens, branches] uses a branch."""
    token = 0
    while branch > 0 and token < tokens and routing[token, branch] == 0:
        token += 1
    return token < tokens


@kernel
def branch_end(branches: Ints, start: int, high: int) -> int:
    """The end of the slots from `start` on, up to `high`, that are of one branch; `branches` are theirs, rising."""
    branch, end = branches[start], start + 1
    while end < high and branches[end] == branch:
        end += 1
    return end


@kernel
def listed_end(branches: Ints, listed: Ints, start: int, high: int) -> int:
    """The end of the entries from `start` on, up to `high`, of an ascending list of neurons that are of one branch;
    `branches` are those of the list's slots."""
    branch, end = branches[listed[start] // GROUP], start + 1
    while end < high and branches[listed[end] // GROUP] == branch:
        end += 1
    return end


@kernel
def weighed(batch: Batch, routing: Any, branch: int, factors: Any) -> Batch:
    """A batch whose outputs are weighed as those of a branch; `factors` [tokens] keeps what they are multiplied by."""
    if branch == 0:
        return batch
    inverse = carray(floats_at(batch.inverse), (batch.tokens,))
    for token in range(batch.tokens):
        factors[token] = inverse[token] * routing[token, branch]
    x, quantised, row = batch.x, batch.quantised, batch.quantised_row
    return Batch(batch.tokens, x, quantised, row, address_of(factors), batch.sums, batch.scratch)


@kernel
def _part(batch: Batch, first: int, last: int, hidden: int) -> Batch:
    """Tokens first..last of a batch."""
    x, sums = batch.x + first * hidden * 4, batch.sums + first * hidden * 8
    quantised, row = batch.quantised + first * batch.quantised_row, batch.quantised_row
    return Batch(last - first, x, quantised, row, batch.inverse + first * 4, sums, batch.scratch)


@inlined
def users_groups(b: Bundles, slots: Ints, low: int, high: int, batch: Batch, words: Any, computed: Any) -> int:
    """`whole_groups`, of one branch, for those tokens whose word [tokens, slots] of slot `low` is not 0.

    A run of such tokens shares what is read of a group, and the next run follows while that is in the cache. Sets the
    words of `computed`; returns the groups times the tokens.
    """
    users = 0
    for token in range(batch.tokens):
        users += words[token, low] != 0
    step = high - low if users == batch.tokens else 1
    for slot in range(low, high, step):
        first = 0
        while first < batch.tokens:
            last = first
            while last < batch.tokens and words[last, low] != 0:
                last += 1
            if last > first:
                whole_groups(b, slots, slot, slot + step, _part(batch, first, last, b.hidden))
                computed[first:last, slot : slot + step] = 0xFFFFFFFF
            first = last + 1
    return users * (high - low)
