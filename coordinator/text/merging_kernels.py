"""Byte-pair merges, compiled: in each word the pair of the lowest rank is joined, of equal ones the leftmost first."""

from typing import Any

import numpy as np
import numpy.typing as npt

from warmfront.coordinator.models.packed_tokenizer import Tables
from warmfront.shared.kernels.jit import kernel

__all__ = ["merge_words"]

Ids = npt.NDArray[np.int32]
Longs = npt.NDArray[np.int64]


@kernel
def merge_words(symbols: Ids, words: Ids, tables: Tables, whole_words: bool) -> int:
    """Join the `symbols` [n], ids of characters, to tokens; returns how many, which stand at the front of `symbols`.

    `words` [n]: the number of each symbol's word. `whole_words`: a word that is a token is not built by merges.
    """
    size = symbols.size
    before, after = np.empty(size + 1, np.int64), np.empty(size + 1, np.int64)
    heap = np.empty(3 * size, np.int64)  # each merge makes two pairs at most
    count = first = 0
    while first < size:
        last = first + 1
        while last < size and words[last] == words[first]:
            last += 1
        token = _token_of(symbols[first:last], tables) if whole_words and last - first > 1 else -1
        if token >= 0:
            symbols[first], after[first] = token, last
        else:
            _merge(symbols[:last], first, tables, before, after, heap)
        at = first
        while at < last:
            symbols[count] = symbols[at]
            count, at = count + 1, after[at]
        first = last
    return count


@kernel
def _merge(symbols: Ids, first: int, tables: Tables, before: Longs, after: Longs, heap: Longs) -> None:
    """Merge the word from `first` to the end of `symbols`; what is left are the symbols linked by `after`."""
    last, waiting = symbols.size, 0
    for at in range(first, last):
        before[at], after[at] = at - 1, at + 1
    for at in range(first, last - 1):
        waiting = _push(heap, waiting, symbols, at, at + 1, tables)
    while waiting:
        rank, at = heap[0] >> 32, heap[0] & 0xFFFFFFFF
        waiting = _pop(heap, waiting)
        right = after[at]
        if symbols[at] < 0 or right >= last:
            continue
        merge = _merge_of(symbols[at], symbols[right], tables)
        if merge < 0 or tables.ranks[merge] != rank:  # one of the two has changed since
            continue
        symbols[at], symbols[right] = tables.results[merge], -1
        after[at] = after[right]
        if after[at] < last:
            before[after[at]] = at
            waiting = _push(heap, waiting, symbols, at, after[at], tables)
        if at > first:
            waiting = _push(heap, waiting, symbols, before[at], at, tables)


@kernel
def _merge_of(left: int, right: int, tables: Tables) -> Any:
    """The index of the merge of two tokens; -1 if there is none."""
    low, high = np.int64(tables.starts[left]), np.int64(tables.starts[left + 1])
    end = high
    while low < high:
        middle = (low + high) >> 1
        if tables.rights[middle] < right:
            low = middle + 1
        else:
            high = middle
    return low if low < end and tables.rights[low] == right else -1


@kernel
def _push(heap: Longs, waiting: int, symbols: Ids, left: int, right: int, tables: Tables) -> int:
    """Put the pair into the heap of `waiting` ones, by rank and place, if there is a merge for it; their new number."""
    merge = _merge_of(symbols[left], symbols[right], tables)
    if merge < 0:
        return waiting
    key, at = np.int64(tables.ranks[merge]) << 32 | left, waiting
    while at > 0 and heap[(at - 1) >> 1] > key:
        heap[at] = heap[(at - 1) >> 1]
        at = (at - 1) >> 1
    heap[at] = key
    return waiting + 1


@kernel
def _pop(heap: Longs, waiting: int) -> int:
    """Take the first of the heap out; the new number of those waiting."""
    waiting -= 1
    key, at = heap[waiting], 0
    while True:
        child = 2 * at + 1
        if child + 1 < waiting and heap[child + 1] < heap[child]:
            child += 1
        if child >= waiting or heap[child] >= key:
            break
        heap[at] = heap[child]
        at = child
    heap[at] = key
    return waiting


@kernel
def _token_of(word: Ids, tables: Tables) -> Any:
    """The token that is spelled like the word; -1 if there is none."""
    low, high = 0, tables.order.size
    while low < high:
        middle = (low + high) >> 1
        token = np.int64(tables.order[middle])
        difference = _compared(word, token, tables)
        if difference == 0:
            return token
        if difference > 0:
            low = middle + 1
        else:
            high = middle
    return -1


@kernel
def _compared(word: Ids, token: Any, tables: Tables) -> Any:
    """Less than zero if the text of the word comes before that of the token, zero if they are equal."""
    at, end = np.int64(tables.bounds[token]), np.int64(tables.bounds[token + 1])
    for symbol in word:
        for place in range(np.int64(tables.bounds[symbol]), np.int64(tables.bounds[symbol + 1])):
            if at == end:
                return 1
            difference = np.int64(tables.texts[place]) - np.int64(tables.texts[at])
            if difference:
                return difference
            at += 1
    return -1 if at < end else 0
