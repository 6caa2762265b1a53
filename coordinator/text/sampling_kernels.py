"""The passes of the sampler over the whole vocabulary, compiled: numpy's calls take longer between two tokens, where
their code and data have left the caches (docs/log.md).

The vocabulary is divided into groups of 64 logits, padded with -inf: a group's maximum tells whether to look into it.
"""

from typing import Any

import numpy as np
import numpy.typing as npt

from warmfront.shared.kernels.activation import exponentials, highest_of
from warmfront.shared.kernels.atomics import address_of
from warmfront.shared.kernels.jit import kernel

__all__ = ["GROUP", "LARGEST", "gather", "prepare", "weigh"]

GROUP = 64
LARGEST = np.finfo(np.float32).max
_EXPONENT = 0x7F800000  # of a float32; all ones in infinities and NaN
Floats = npt.NDArray[np.float32]
Longs = npt.NDArray[np.int64]


@kernel
def prepare(logits: Floats, work: Floats, maxima: Floats, tokens: Longs, count: int, penalty: Any) -> int:
    """Copy the logits to `work` [groups * 64], with the repetition penalty on the first `count` of `tokens`.

    Fills in the `maxima` of the groups. Returns the first index of the largest logit, -1 if a logit is not finite.
    """
    size, bits, not_finite = logits.size, logits.view(np.int32), 0
    for i in range(size):
        work[i] = logits[i]
        not_finite |= bits[i] & _EXPONENT == _EXPONENT
    if not_finite:
        return -1
    for i in range(size, work.size):
        work[i] = -np.inf
    for j in range(count):
        value = work[tokens[j]]
        value = value / penalty if value > 0 else value * penalty
        work[tokens[j]] = min(max(value, -LARGEST), LARGEST)
    top = 0
    for group in range(maxima.size):
        maxima[group] = highest_of(address_of(work) + group * GROUP * 4, GROUP)
        if maxima[group] > maxima[top]:
            top = group
    best = top * GROUP
    for i in range(best + 1, best + GROUP):
        if work[i] > work[best]:
            best = i
    return best


@kernel
def gather(work: Floats, maxima: Floats, bound: Any, ids: Longs, values: Floats) -> int:
    """List the logits that are at least `bound`, which is finite, in ascending order of ids; returns how many."""
    count = 0
    for group in range(maxima.size):
        if maxima[group] >= bound:
            for i in range(group * GROUP, (group + 1) * GROUP):
                if work[i] >= bound:
                    ids[count], values[count] = i, work[i]
                    count += 1
    return count


@kernel
def weigh(work: Floats, weights: Floats, size: int, high: Any, inverse: Any, sums: npt.NDArray[np.float64]) -> None:
    """weights = exp((work - high) * inverse) for the first `size`, 0 for the padding; and the `sums` of the groups."""
    for group in range(sums.size):
        for i in range(group * GROUP, (group + 1) * GROUP):
            weights[i] = max(work[i] - high, -LARGEST) * inverse  # finite: infinity times 0 would be NaN
        sums[group] = exponentials(address_of(weights) + group * GROUP * 4, GROUP, np.float32(0))
    if size < weights.size:
        last, total = sums.size - 1, np.float64(0)
        weights[size:] = 0
        for i in range(last * GROUP, size):
            total += weights[i]
        sums[last] = total
