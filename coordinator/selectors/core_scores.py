"""Scores of neurons by the magnitudes that were noted of some tokens (`core.py`), compiled: a job has 10^8 of them."""

from typing import Any

import numpy as np
import numpy.typing as npt
from numba import carray

from warmfront.shared.kernels.atomics import address_of, floats_at
from warmfront.shared.kernels.jit import kernel

__all__ = ["add_norm_scores", "add_positive_scores"]

Noted = npt.NDArray[np.uint16]
# Of the factors that are not 0: a token's own core, of CoreInfer's 0.2 to 0.4.
_SHARE = 0.4
_BINS = 256


@kernel
def add_norm_scores(noted: Noted, norms: Any, scores: Any) -> None:
    """Add to `scores`, float64 [neurons], what each token of `noted`, bfloat16 [tokens, neurons], gives; `norms`:
    float32 [neurons]."""
    tokens, neurons = noted.shape
    row = np.empty(neurons, np.uint32)
    values = carray(floats_at(address_of(row)), (neurons,))
    for token in range(tokens):
        total = np.float64(0)
        for i in range(neurons):
            row[i] = np.uint32(noted[token, i]) << np.uint32(16)
        for i in range(neurons):
            weighed = np.float64(values[i]) * np.float64(norms[i])
            total += weighed * weighed
        if total > 0:
            for i in range(neurons):
                weighed = np.float64(values[i]) * np.float64(norms[i])
                scores[i] += weighed * weighed / total


@kernel
def _threshold(row: Any, count: Any) -> int:
    """The `count`-th largest of the numbers of 16 bits of a row: by their high bytes, then by the low ones."""
    tops, lows = np.zeros(_BINS, np.int64), np.zeros(_BINS, np.int64)
    for i in range(len(row)):
        tops[row[i] >> 8] += 1
    top, left = _BINS - 1, count
    while tops[top] < left:
        left -= tops[top]
        top -= 1
    for i in range(len(row)):
        if row[i] >> 8 == top:
            lows[row[i] & 255] += 1
    low = _BINS - 1
    while lows[low] < left:
        left -= lows[low]
        low -= 1
    return top * _BINS + low


@kernel
def add_positive_scores(noted: Noted, scores: Any) -> None:
    """The same by counts: 1 for the neurons of each token's own core, those as large as its last included."""
    tokens, neurons = noted.shape
    for token in range(tokens):
        row = noted[token]
        found = 0
        for i in range(neurons):
            found += row[i] != 0
        if found > 0:
            # bfloat16 numbers without a sign are in the order of their bits.
            least = _threshold(row, np.int64(np.ceil(_SHARE * found)))
            for i in range(neurons):
                if row[i] >= least:
                    scores[i] += 1
