"""Rotary position frequencies: theta_j = base^(-2j / head_dim) (Su et al., RoFormer, 2021), and their scalings.

Linear scaling divides all frequencies by one factor. Llama 3.1's divides only the slow ones, which make less than `low`
turns within the original context, leaves those that make more than `high` turns, and interpolates between.
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
    """Llama 3.1's long-context frequencies [head_dim / 2] from plain ones."""
    turns = original_context * plain / (2 * math.pi)
    keep = np.clip((turns - low) / (high - low), 0, 1)
    return np.asarray(plain * (keep + (1 - keep) / factor))


def positions(path: Path, plain: Doubles, divisor: Doubles | float = 1.0) -> Positions:
    """One rotary table, of the frequencies plain / divisor, for all layers.

    Raises ModelError, naming `path`, if they are not positive and finite.
    """
    with np.errstate(all="ignore"):
        scaled = plain / divisor
    if not (np.isfinite(scaled).all() and (scaled > 0).all()):
        raise ModelError(f"{path}: RoPE's base and scaling factors give no positive frequencies; the file is damaged")
    return Positions(rotary=(Rotary(frequencies=tuple(scaled.tolist())),))
