"""Rotary position frequencies: theta_j = base^(-2j / head_dim) (Su et al., RoFormer, 2021), and their stretchings.

Linear scaling divides all of them by one factor and needs no function. Llama 3.1's divides only the slow ones, those
that turn less than `low` times within the original context, and blends up to those that turn `high` times.
"""

import math
from pathlib import Path

import numpy as np
import numpy.typing as npt

from warmfront.shared.errors import ModelError
from warmfront.shared.model.architecture import Positions, Rotary

__all__ = ["Doubles", "frequencies", "llama3", "positions"]

Doubles = npt.NDArray[np.float64]


def frequencies(head_dim: int, base: float) -> Doubles:
    """Inverse frequencies [head_dim / 2], in radians per position."""
    return np.asarray(base ** (-np.arange(0, head_dim, 2, dtype=np.float64) / head_dim))


def llama3(plain: Doubles, *, factor: float, low: float, high: float, original_context: float) -> Doubles:
    """Llama 3.1's long-context frequencies from plain ones."""
    turns = original_context * plain / (2 * math.pi)
    keep = np.clip((turns - low) / (high - low), 0, 1)
    return np.asarray(plain * (keep + (1 - keep) / factor))


def positions(path: Path, plain: Doubles, divisor: Doubles | float = 1.0) -> Positions:
    """The frequencies plain / divisor for every layer.

    Raises ModelError if the base and factors of the file at `path` give none that are positive.
    """
    with np.errstate(all="ignore"):
        stretched = plain / divisor
    if not (np.isfinite(stretched).all() and (stretched > 0).all()):
        raise ModelError(f"{path}: RoPE's base and scaling factors give no positive frequencies; the file is damaged")
    return Positions(rotary=(Rotary(frequencies=tuple(stretched.tolist())),))
