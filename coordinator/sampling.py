"""Choosing the next token from the logits."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from warmfront.shared.config import Sampling

__all__ = ["Sampler"]


class Sampler:
    """Draws tokens for one answer; with a seed the sequence of draws repeats."""

    def __init__(self, sampling: Sampling) -> None:
        self._wish = sampling
        self._random = np.random.default_rng(sampling.seed)

    def pick(self, logits: npt.NDArray[np.float32], seen: Sequence[int]) -> int:
        """The next token for float32 [vocab] `logits`; `seen` are the tokens that the repetition penalty holds down."""
        wish = self._wish
        if wish.repetition_penalty != 1 and seen:
            logits = logits.copy()
            ids = np.unique(np.asarray(seen))
            chosen = logits[ids]
            logits[ids] = np.where(chosen > 0, chosen / wish.repetition_penalty, chosen * wish.repetition_penalty)
        if wish.temperature == 0:
            return int(np.argmax(logits))
        order, probabilities = self._candidates(logits.astype(np.float64) / wish.temperature)
        bounds = np.cumsum(probabilities)  # whose last differs from the sum by rounding: a draw must stay below it
        return int(order[np.searchsorted(bounds, self._random.random() * bounds[-1])])

    def _candidates(self, logits: npt.NDArray[np.float64]) -> tuple[npt.NDArray[np.intp], npt.NDArray[np.float64]]:
        """Tokens that the filters leave, most probable first, and their weights."""
        wish = self._wish
        count = min(wish.top_k or logits.size, logits.size)
        best = np.argpartition(-logits, count - 1)[:count] if count < logits.size else np.arange(count)
        order = best[np.argsort(-logits[best], kind="stable")]
        weights = np.exp(logits[order] - logits[order[0]])
        weights /= weights.sum()
        keep = len(weights)
        if wish.top_p < 1:
            keep = int(np.searchsorted(np.cumsum(weights), wish.top_p)) + 1
        if wish.min_p > 0:
            keep = min(keep, int(np.count_nonzero(weights >= wish.min_p * weights[0])))
        return order[:keep], weights[:keep]
