"""Choosing the next token from the logits, in a few passes over the vocabulary and without sorting it.

A filter leaves few tokens of many. Those that can be among the `count` largest logits are found by a bound: the
vocabulary is divided into groups of 64, and at least `count` logits reach the count-th largest of the groups' maxima.
Only these are sorted, in float64. Without a filter the draw picks a group by its sum, then a token within it.
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
Indices = npt.NDArray[np.intp]

_GROUP = 64
# Below this temperature float32 logits that differ at all are infinitely far apart.
_GREEDY = 1e-30
_LARGEST = float(np.finfo(np.float32).max)


class Sampler:
    """Draws tokens for one answer; with a seed the sequence of draws repeats."""

    def __init__(self, sampling: Sampling) -> None:
        self._wish = sampling
        self._random = np.random.default_rng(sampling.seed)
        # What of the list last given is counted, and the distinct tokens in it.
        self._seen: Sequence[int] = ()
        self._counted = 0
        self._penalised: Indices = np.empty(0, np.intp)

    def pick(self, logits: Floats, seen: Sequence[int]) -> int:
        """The next token for float32 [vocab] `logits`; `seen` are the tokens that the repetition penalty holds down.

        A list that is given again may only have grown. Raises ModelError for logits that are not finite.
        """
        # NaN is the largest and the least of all.
        if not math.isfinite(logits.max()) or not math.isfinite(logits.min()):
            raise ModelError(
                "the model gives logits that are not finite: its file is damaged, or its numbers overflow; "
                "fetch it again, or try another --dtype"
            )
        with np.errstate(over="ignore"):  # what overflows to -inf weighs nothing
            if self._wish.repetition_penalty != 1 and seen:
                logits = self._held_down(logits, seen)
            best = int(logits.argmax())
            return best if self._wish.temperature < _GREEDY else self._drawn(logits, best)

    def _held_down(self, logits: Floats, seen: Sequence[int]) -> Floats:
        """A copy of the logits after the repetition penalty."""
        if seen is not self._seen or len(seen) < self._counted:
            self._seen, self._counted, self._penalised = seen, 0, np.empty(0, np.intp)
        if len(seen) > self._counted:
            fresh = np.asarray(seen[self._counted :], np.intp)
            self._penalised = np.union1d(self._penalised, fresh)
            self._counted = len(seen)
        penalty, logits = self._wish.repetition_penalty, logits.copy()
        chosen = logits[self._penalised]
        chosen = np.where(chosen > 0, chosen / penalty, chosen * penalty)
        logits[self._penalised] = np.clip(chosen, -_LARGEST, _LARGEST)
        return logits

    def _drawn(self, logits: Floats, best: int) -> int:
        """A token by its probability after the filters; `best` has the largest logit."""
        wish, high = self._wish, float(logits[best])
        if wish.top_k and wish.top_k < logits.size:
            some = _largest(logits, wish.top_k)
            bound = np.partition(logits[some], -wish.top_k)[-wish.top_k]
            some = some[_first(logits[some], bound, wish.top_k)]
            weights = self._weights(logits[some], high)
            if wish.top_p < 1:
                kept = _nucleus(weights, wish.top_p * weights.sum())
                some, weights = some[kept], weights[kept]
        elif wish.top_p < 1:
            some, weights = self._most_probable(logits, high)
        elif wish.min_p > 0:
            some = np.flatnonzero(logits >= high + wish.temperature * (math.log(wish.min_p) - 0.01))
            weights = self._weights(logits[some], high)
        else:
            return _draw_of_all(self._all_weights(logits, high), best, self._random.random())
        if wish.min_p > 0:
            likely = weights >= wish.min_p
            some, weights = some[likely], weights[likely]
        return int(some[_draw(weights, int(weights.argmax()), self._random.random())])

    def _weights(self, logits: Floats, high: float) -> Doubles:
        """What each of a few logits weighs, 1 at most."""
        weights: Doubles = np.exp((logits.astype(np.float64) - high) / self._wish.temperature)
        return weights

    def _all_weights(self, logits: Floats, high: float) -> Floats:
        """The same of all in float32, with zeros behind them to a multiple of 64."""
        weights = np.zeros(-(-logits.size // _GROUP) * _GROUP, np.float32)
        part = weights[: logits.size]
        np.subtract(logits, high, out=part)
        part *= min(1 / self._wish.temperature, _LARGEST)
        np.exp(part, out=part)
        return weights

    def _most_probable(self, logits: Floats, high: float) -> tuple[Indices, Doubles]:
        """The fewest tokens that have top_p of the probability, and their weights."""
        wanted = self._wish.top_p * float(_sums(self._all_weights(logits, high)).sum())
        groups = logits.size // _GROUP
        # The flatter the distribution, the more tokens it takes; a language model's seldom takes more than the first.
        for count in (groups // 8, groups // 2, groups - groups // 8, logits.size):
            some = _largest(logits, max(count, 1))
            weights = self._weights(logits[some], high)
            if count == logits.size or weights.sum() >= wanted:
                break
        kept = _nucleus(weights, wanted)
        return some[kept], weights[kept]


def _largest(logits: Floats, count: int) -> Indices:
    """The tokens of the `count` largest logits, and of some more that are larger than all others."""
    groups = logits.size // _GROUP
    if count >= logits.size:
        return np.arange(logits.size)
    if count > groups:
        return np.flatnonzero(logits >= np.partition(logits, -count)[-count])
    maxima = logits[: groups * _GROUP].reshape(_GROUP, groups).max(0)
    return np.flatnonzero(logits >= np.partition(maxima, -count)[-count])


def _nucleus(weights: Doubles, wanted: float) -> Indices:
    """Where the fewest weights are that make `wanted` together, or all."""
    falling = np.sort(weights)[::-1]
    count = min(int(np.searchsorted(np.cumsum(falling), wanted)) + 1, weights.size)
    return _first(weights, falling[count - 1], count)


def _first(values: Floats | Doubles, bound: float, count: int) -> Indices:
    """Where the `count` largest values are, of which `bound` is the least; of equal ones the first."""
    some = np.flatnonzero(values >= bound)
    if some.size > count:
        some = np.delete(some, np.flatnonzero(values[some] == bound)[count - some.size :])
    return some


def _sums(weights: Floats) -> Doubles:
    """Of the groups of every (size / 64)-th weight."""
    sums: Doubles = weights.reshape(_GROUP, -1).sum(0).astype(np.float64)
    return sums


def _draw(weights: Doubles, best: int, chance: float) -> int:
    """The index at `chance` of the sum; `best`, which weighs 1, comes first, and most draws end there."""
    weights[best] = 0
    bounds = np.cumsum(weights)
    point = chance * (1 + bounds[-1]) - 1
    return best if point < 0 else _reached(bounds, point)


def _draw_of_all(weights: Floats, best: int, chance: float) -> int:
    """The same for weights in groups: the group first, by its sum."""
    weights[best] = 0
    bounds = np.cumsum(_sums(weights))
    point = chance * (1 + bounds[-1]) - 1
    if point < 0:
        return best
    group = _reached(bounds, point)
    within = np.cumsum(weights.reshape(_GROUP, -1)[:, group], dtype=np.float64)
    return _reached(within, point - (bounds[group - 1] if group else 0.0)) * bounds.size + group


def _reached(bounds: Doubles, point: float) -> int:
    """The first index whose bound exceeds `point`, or rounding aside the last bound; never one that weighs nothing."""
    return int(np.searchsorted(bounds, min(point, np.nextafter(bounds[-1], 0)), side="right"))


def token_logprobs(logits: Floats, token: int, count: int) -> tuple[float, tuple[tuple[int, float], ...]]:
    """The log probability of `token` at temperature 1, and the `count` most probable tokens with theirs."""
    shifted = logits.astype(np.float64) - float(logits.max())
    total = math.log(np.exp(shifted).sum())
    some = _largest(logits, count) if count else np.empty(0, np.intp)
    best = some[np.argsort(-shifted[some], kind="stable")][:count]
    return float(shifted[token]) - total, tuple((int(i), float(shifted[i]) - total) for i in best)
