"""Choosing the next token from the logits, in a few passes over the vocabulary and without sorting it.

A filter leaves few tokens of many. Those that can be among the `count` largest logits are found by a bound: of the
vocabulary in groups of 64, at least `count` logits reach the count-th largest of the groups' maxima. Only these are
sorted. Without a filter the draw picks a group by its sum, then a token within it.
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

# Below this temperature float32 logits that differ at all are infinitely far apart.
_GREEDY = 1e-30


class Sampler:
    """Draws tokens for one answer; with a seed the sequence of draws repeats."""

    def __init__(self, sampling: Sampling) -> None:
        # Not at the top: numba is imported beside the workers' start.
        from warmfront.coordinator.text import sampling_kernels

        self._kernels = sampling_kernels
        self._wish = sampling
        self._random = np.random.default_rng(sampling.seed)
        # What of the list last given is counted, and the distinct tokens in it, as keys and in an array with room.
        self._seen: Sequence[int] = ()
        self._counted = 0
        self._penalised: dict[int, None] = {}
        self._tokens: Longs = np.zeros(256, np.int64)
        self._make_room(0)

    def _make_room(self, vocab: int) -> None:
        self._vocab = vocab
        groups = -(-vocab // self._kernels.GROUP)
        padded = groups * self._kernels.GROUP
        self._work, self._weights, self._values = (np.empty(padded, np.float32) for _ in range(3))
        self._maxima, self._sums = np.empty(groups, np.float32), np.empty(groups, np.float64)
        self._ids: Longs = np.empty(padded, np.int64)

    def pick(self, logits: Floats, seen: Sequence[int]) -> int:
        """The next token for float32 [vocab] `logits`; `seen` are the tokens that the repetition penalty holds down.

        A list that is given again may only have grown. Raises ModelError for logits that are not finite.
        """
        if logits.size != self._vocab:
            self._make_room(logits.size)
        penalty = self._wish.repetition_penalty
        count = self._count(seen) if penalty != 1 else 0
        best = self._kernels.prepare(logits, self._work, self._maxima, self._tokens, count, np.float32(penalty))
        if best < 0:
            raise ModelError(
                "the model gives logits that are not finite: its file is damaged, or its numbers overflow; "
                "fetch it again, or try another --dtype"
            )
        return best if self._wish.temperature < _GREEDY else self._drawn(best)

    def _count(self, seen: Sequence[int]) -> int:
        """How many distinct tokens were seen; they are the first of `self._tokens`."""
        if seen is not self._seen or len(seen) < self._counted:
            self._seen, self._counted, self._penalised = seen, 0, {}
        for token in seen[self._counted :]:
            if token not in self._penalised:
                if len(self._penalised) == self._tokens.size:
                    self._tokens = np.resize(self._tokens, 2 * self._tokens.size)
                self._tokens[len(self._penalised)] = token
                self._penalised[token] = None
        self._counted = len(seen)
        return len(self._penalised)

    def _drawn(self, best: int) -> int:
        """A token by its probability after the filters; `best` has the largest logit."""
        wish, high = self._wish, float(self._work[best])
        if wish.top_k and wish.top_k < self._vocab:
            ids, weights, bounds = self._falling(self._bound(wish.top_k), high)
            keep = wish.top_k
            if wish.top_p < 1:
                keep = int(bounds[:keep].searchsorted(wish.top_p * bounds[keep - 1])) + 1
        elif wish.top_p < 1:
            ids, weights, bounds, keep = self._most_probable(high)
        elif wish.min_p > 0:
            ids, weights, bounds = self._falling(high + wish.temperature * (math.log(wish.min_p) - 0.01), high)
            keep = ids.size
        else:
            return self._drawn_of_all(best, high)
        if wish.min_p > 0:  # the first weighs 1
            keep = int(np.count_nonzero(weights[:keep] >= wish.min_p))
        return int(ids[_reached(bounds[:keep], self._random.random() * bounds[keep - 1])])

    def _bound(self, count: int) -> float:
        """What at least `count` logits reach, and not many more."""
        values = self._maxima if count <= self._maxima.size else self._work
        return float(np.partition(values, -count)[-count])

    def _falling(self, bound: float, high: float) -> tuple[Longs, Doubles, Doubles]:
        """The tokens of at least this logit, most probable first, their weights, and the sums of these up to each."""
        bound = max(bound, -float(self._kernels.LARGEST))
        count = self._kernels.gather(self._work, self._maxima, np.float32(bound), self._ids, self._values)
        values = self._values[:count]
        order = np.argsort(-values, kind="stable")
        weights: Doubles = np.exp((values[order].astype(np.float64) - high) / self._wish.temperature)
        return self._ids[order], weights, weights.cumsum()

    def _weigh(self, high: float) -> None:
        inverse = min(1 / self._wish.temperature, float(self._kernels.LARGEST))
        self._kernels.weigh(self._work, self._weights, self._vocab, np.float32(high), np.float32(inverse), self._sums)

    def _most_probable(self, high: float) -> tuple[Longs, Doubles, Doubles, int]:
        """As `_falling`, tokens that have top_p of the probability, and how many of them it takes."""
        self._weigh(high)
        wanted = self._wish.top_p * float(self._sums.sum())
        groups = self._maxima.size
        # The flatter the distribution, the more tokens it takes; a language model's seldom takes more than the first.
        for count in (min(16, groups), groups // 8, groups // 2, groups - groups // 8, self._vocab):
            ids, weights, bounds = self._falling(self._bound(max(count, 1)), high)
            if bounds[-1] >= wanted:
                break
        return ids, weights, bounds, min(int(bounds.searchsorted(wanted)) + 1, ids.size)

    def _drawn_of_all(self, best: int, high: float) -> int:
        """`best`, which weighs 1, comes first, and most draws end there; else a group by its sum, then one of it."""
        self._weigh(high)
        group, size = best // self._kernels.GROUP, self._kernels.GROUP
        self._weights[best] = 0
        self._sums[group] = self._weights[group * size : (group + 1) * size].sum(dtype=np.float64)
        bounds = self._sums.cumsum()
        point = self._random.random() * (1 + bounds[-1]) - 1
        if point < 0:
            return best
        group = _reached(bounds, point)
        within = self._weights[group * size : (group + 1) * size].cumsum(dtype=np.float64)
        return group * size + _reached(within, point - (bounds[group - 1] if group else 0.0))


def _reached(bounds: Doubles, point: float) -> int:
    """The first index whose bound exceeds `point`, or rounding aside the last bound; never one that weighs nothing."""
    return int(bounds.searchsorted(min(point, np.nextafter(bounds[-1], 0)), side="right"))


def token_logprobs(logits: Floats, token: int, count: int) -> tuple[float, tuple[tuple[int, float], ...]]:
    """The log probability of `token` at temperature 1, and the `count` most probable tokens with theirs."""
    shifted = logits.astype(np.float64) - float(logits.max())
    total = math.log(np.exp(shifted).sum())
    some = np.argpartition(-shifted, count)[:count] if count < shifted.size else np.arange(shifted.size)
    best = some[np.lexsort((some, -shifted[some]))]
    return float(shifted[token]) - total, tuple((int(i), float(shifted[i]) - total) for i in best)
