"""Choosing the next token from the logits, in a few passes over the vocabulary and without sorting it.

top-k, top-p and min-p leave few tokens of many, and only these are sorted. They are found by a threshold: with the
vocabulary in groups of 64, at least `count` logits reach the count-th largest of the group maxima. Without a filter the
draw picks a group by its sum, then a token within it. A sort of 49,152 logits had taken 5.6 ms a token (docs/log.md).
"""

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from warmfront.shared.config import Sampling
from warmfront.shared.errors import ModelError

__all__ = ["Sampler", "token_logprobs"]

Floats = npt.NDArray[np.float32]
Doubles = npt.NDArray[np.float64]
Longs = npt.NDArray[np.int64]

# Below this temperature any two float32 logits that differ are so far apart that the draw is greedy.
_GREEDY = 1e-30


class Sampler:
    """Draws tokens for one answer; with a seed the sequence of draws repeats."""

    def __init__(self, sampling: Sampling) -> None:
        # Not at the top: numba is imported while the workers start.
        from warmfront.coordinator.text import sampling_kernels

        self._kernels = sampling_kernels
        self._sampling = sampling
        self._random = np.random.default_rng(sampling.seed)
        self._seen: Sequence[int] = ()  # the list last given
        self._counted = 0  # tokens of it that have been looked at
        self._penalised: set[int] = set()  # the distinct ones, and below in an array that grows by doubling
        self._tokens: Longs = np.zeros(256, np.int64)
        self._allocate(0)

    def _allocate(self, vocab: int) -> None:
        """Work space for a vocabulary, padded to whole groups."""
        self._vocab = vocab
        groups = -(-vocab // self._kernels.GROUP)
        padded = groups * self._kernels.GROUP
        self._work, self._weights, self._values = (np.empty(padded, np.float32) for _ in range(3))
        self._maxima, self._sums = np.empty(groups, np.float32), np.empty(groups, np.float64)
        self._ids: Longs = np.empty(padded, np.int64)

    def pick(self, logits: Floats, seen: Sequence[int]) -> int:
        """The next token for float32 [vocab] `logits`; the repetition penalty applies to the tokens in `seen`.

        Between calls with the same list, it may only grow. Raises ModelError for logits that are not finite.
        """
        if logits.size != self._vocab:
            self._allocate(logits.size)
        penalty = self._sampling.repetition_penalty
        count = self._count(seen) if penalty != 1 else 0
        best = self._kernels.prepare(logits, self._work, self._maxima, self._tokens, count, np.float32(penalty))
        if best < 0:
            raise ModelError(
                "the model gives logits that are not finite: its file is damaged, or its numbers overflow; "
                "fetch it again, or try another --dtype"
            )
        return best if self._sampling.temperature < _GREEDY else self._draw(best)

    def _count(self, seen: Sequence[int]) -> int:
        """The number of distinct tokens in `seen`, which are written to the front of `self._tokens`."""
        if seen is not self._seen or len(seen) < self._counted:
            self._seen, self._counted, self._penalised = seen, 0, set()
        for token in seen[self._counted :]:
            if token not in self._penalised:
                if len(self._penalised) == self._tokens.size:
                    self._tokens = np.resize(self._tokens, 2 * self._tokens.size)
                self._tokens[len(self._penalised)] = token
                self._penalised.add(token)
        self._counted = len(seen)
        return len(self._penalised)

    def _draw(self, best: int) -> int:
        """A token drawn by its probability after the filters; `best` has the largest logit."""
        wanted, high = self._sampling, float(self._work[best])
        if wanted.top_k and wanted.top_k < self._vocab:
            ids, weights, sums = self._descending(self._threshold(wanted.top_k), high)
            keep = wanted.top_k
            if wanted.top_p < 1:
                keep = int(sums[:keep].searchsorted(wanted.top_p * sums[keep - 1])) + 1
        elif wanted.top_p < 1:
            ids, weights, sums, keep = self._most_probable(high)
        elif wanted.min_p > 0:
            # A margin of 1 % for rounding: the weights are compared with min_p below.
            ids, weights, sums = self._descending(high + wanted.temperature * (math.log(wanted.min_p) - 0.01), high)
            keep = ids.size
        else:
            return self._draw_from_all(best, high)
        if wanted.min_p > 0:  # weights are relative to the first, which is 1
            keep = int(np.count_nonzero(weights[:keep] >= wanted.min_p))
        return int(ids[_index_of(sums[:keep], self._random.random() * sums[keep - 1])])

    def _threshold(self, count: int) -> float:
        """A value that at least `count` logits reach, and not many more."""
        values = self._maxima if count <= self._maxima.size else self._work
        return float(np.partition(values, -count)[-count])

    def _descending(self, threshold: float, high: float) -> tuple[Longs, Doubles, Doubles]:
        """Tokens whose logit reaches `threshold`, most probable first; their weights, and the running sums of these."""
        threshold = max(threshold, -float(self._kernels.LARGEST))
        count = self._kernels.gather(self._work, self._maxima, np.float32(threshold), self._ids, self._values)
        values = self._values[:count]
        order = np.argsort(-values, kind="stable")
        weights: Doubles = np.exp((values[order].astype(np.float64) - high) / self._sampling.temperature)
        return self._ids[order], weights, weights.cumsum()

    def _weigh(self, high: float) -> None:
        """Fill in the weights of all tokens relative to logit `high`, and the sum of each group."""
        inverse = min(1 / self._sampling.temperature, float(self._kernels.LARGEST))
        self._kernels.weigh(self._work, self._weights, self._vocab, np.float32(high), np.float32(inverse), self._sums)

    def _most_probable(self, high: float) -> tuple[Longs, Doubles, Doubles, int]:
        """As `_descending`, tokens that together have top_p of the probability, and how many of them that takes."""
        self._weigh(high)
        wanted = self._sampling.top_p * float(self._sums.sum())
        groups = self._maxima.size
        # The flatter the distribution, the more tokens that takes; for a language model 16 are mostly enough.
        for count in (min(16, groups), groups // 8, groups // 2, groups - groups // 8, self._vocab):
            ids, weights, sums = self._descending(self._threshold(max(count, 1)), high)
            if sums[-1] >= wanted:
                break
        return ids, weights, sums, min(int(sums.searchsorted(wanted)) + 1, ids.size)

    def _draw_from_all(self, best: int, high: float) -> int:
        """A token drawn from all: `best`, whose weight is 1, where most draws end; else a group, then one of it."""
        self._weigh(high)
        group, size = best // self._kernels.GROUP, self._kernels.GROUP
        self._weights[best] = 0
        self._sums[group] = self._weights[group * size : (group + 1) * size].sum(dtype=np.float64)
        sums = self._sums.cumsum()
        point = self._random.random() * (1 + sums[-1]) - 1
        if point < 0:
            return best
        group = _index_of(sums, point)
        within = self._weights[group * size : (group + 1) * size].cumsum(dtype=np.float64)
        return group * size + _index_of(within, point - (sums[group - 1] if group else 0.0))


def _index_of(sums: Doubles, point: float) -> int:
    """The first index whose running sum exceeds `point`; the last one with a weight where rounding reaches the end."""
    return int(sums.searchsorted(min(point, np.nextafter(sums[-1], 0)), side="right"))


def token_logprobs(logits: Floats, token: int, count: int) -> tuple[float, tuple[tuple[int, float], ...]]:
    """The log probability of `token` at temperature 1, and the `count` most probable tokens with theirs."""
    shifted = logits.astype(np.float64) - float(logits.max())
    total = math.log(np.exp(shifted).sum())
    top = np.argpartition(-shifted, count)[:count] if count < shifted.size else np.arange(shifted.size)
    top = top[np.lexsort((top, -shifted[top]))]  # equal ones by their ids
    return float(shifted[token]) - total, tuple((int(i), float(shifted[i]) - total) for i in top)
