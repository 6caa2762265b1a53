"""How far what a model says by a selector is from what it says with all neurons."""

from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = ["divergence", "log_softmax"]

Doubles = npt.NDArray[np.float64]


def log_softmax(logits: npt.NDArray[np.floating[Any]]) -> Doubles:
    """The log probabilities of logits [..., vocab], in nats: float64, for those of two runs differ little."""
    wide = logits.astype(np.float64)
    wide -= wide.max(-1, keepdims=True)
    return np.asarray(wide - np.log(np.exp(wide).sum(-1, keepdims=True)))


def divergence(reference: npt.NDArray[np.float32], other: npt.NDArray[np.float32]) -> float:
    """KL divergence of the distributions of logits [..., vocab] from those of `reference`: nats, mean over the tokens.

    The perplexity of text that follows `reference` is higher by the factor exp of this.
    """
    log_p, log_q = log_softmax(reference), log_softmax(other)
    return float((np.exp(log_p) * (log_p - log_q)).sum(-1).mean())
