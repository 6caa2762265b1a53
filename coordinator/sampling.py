"""Choosing the next token from the logits, in a few passes over the vocabulary and without sorting it.

A filter leaves few tokens of many. Those that can be among the `count` largest logits are found by a bound: the
vocabulary is divided into groups of 64, and at least `count` logits reach the count-th largest of the groups' maxima.
Only these are sorted. Without a filter the draw picks a group by its sum, then a token within it.
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
        # What of the list last given is counted, and the distinct tokens in it, as keys and in an array with room.
        self._seen: Sequence[int] = ()
        self._counted = 0
        self._penalised: dict[int, None] = {}
        self._tokens: Indices = np.zeros(256, np.intp)

    def pick(self, logits: Floats, seen: Sequence[int]) -> int:
        """The next token for float32 [vocab] `logits`; `seen` are the tokens that the repetition penalty holds down.

        A list that is given again may only have grown. Raises ModelError for logits that are not finite.
        """
        best = int(logits.argmax())  # of a NaN, if there is one
        if not math.isfinite(logits[best]) or not math.isfinite(logits.min()):
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
            self._seen, self._counted, self._penalised = seen, 0, {}
        for token in seen[self._counted :]:
            if token not in self._penalised:
                if len(self._penalised) == self._tokens.size:
                    self._tokens = np.resize(self._tokens, 2 * self._tokens.size)
                self._tokens[len(self._penalised)] = token
                self._penalised[token] = None
        self._counted = len(seen)
        penalty, logits = self._wish.repetition_penalty, logits.copy()
        tokens = self._tokens[: len(self._penalised)]
        chosen = logits[tokens]
        # Of the quotient, for logits above 0, and the product, for others, it is the lesser if the penalty is above 1.
        lesser = np.minimum if penalty > 1 else np.maximum
        logits[tokens] = lesser(chosen / penalty, chosen * penalty).clip(-_LARGEST, _LARGEST)
        return logits

    def _drawn(self, logits: Floats, best: int) -> int:
        """A token by its probability after the filters; `best` has the largest logit."""
        wish, high = self._wish, float(logits[best])
        if wish.top_k and wish.top_k < logits.size:
            order, bounds = self._falling(logits, _largest(logits, wish.top_k), high)
            keep = wish.top_k
            if wish.top_p < 1:
                keep = int(np.searchsorted(bounds[:keep], wish.top_p * bounds[keep - 1])) + 1
        elif wish.top_p < 1:
            order, bounds, keep = self._most_probable(logits, high)
        elif wish.min_p > 0:
            some = np.flatnonzero(logits >= high + wish.temperature * (math.log(wish.min_p) - 0.01))
            order, bounds = self._falling(logits, some, high)
            keep = some.size
        else:
            return _draw(self._all_weights(logits, high), best, self._random.random())
        if wish.min_p > 0:
            keep = int(np.count_nonzero(self._weights(logits[order[:keep]], high) >= wish.min_p))
        return int(order[_reached(bounds[:keep], self._random.random() * bounds[keep - 1])])

    def _falling(self, logits: Floats, some: Indices, high: float) -> tuple[Indices, Doubles]:
        """These tokens, most probable first, and the sums of their weights up to each."""
        values = logits[some]
        order = np.argsort(-values)
        return some[order], np.cumsum(self._weights(values[order], high))

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

    def _most_probable(self, logits: Floats, high: float) -> tuple[Indices, Doubles, int]:
        """As `_falling`, tokens that have top_p of the probability, and how many of them it takes."""
        wanted = self._wish.top_p * float(_sums(self._all_weights(logits, high)).sum())
        groups = logits.size // _GROUP
        # The flatter the distribution, the more tokens it takes; a language model's seldom takes more than the first.
        for count in (groups // 8, groups // 2, groups - groups // 8, logits.size):
            order, bounds = self._falling(logits, _largest(logits, max(count, 1)), high)
            if bounds[-1] >= wanted:
                break
        return order, bounds, min(int(np.searchsorted(bounds, wanted)) + 1, order.size)


def _largest(logits: Floats, count: int) -> Indices:
    """The tokens of the `count` largest logits, and of some more that are larger than all others."""
    groups = logits.size // _GROUP
    if count >= logits.size:
        return np.arange(logits.size)
    if count > groups:
        return np.flatnonzero(logits >= np.partition(logits, -count)[-count])
    maxima = logits[: groups * _GROUP].reshape(_GROUP, groups).max(0)
    return np.flatnonzero(logits >= np.partition(maxima, -count)[-count])


def _sums(weights: Floats) -> Doubles:
    """Of the groups of every (size / 64)-th weight."""
    sums: Doubles = weights.reshape(_GROUP, -1).sum(0).astype(np.float64)
    return sums


def _draw(weights: Floats, best: int, chance: float) -> int:
    """The index at `chance` of the sum: `best`, which weighs 1, comes first, then the groups by their sums."""
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
