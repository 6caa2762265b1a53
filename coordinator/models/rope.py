"""Rotary position frequencies: theta_j = base^(-2j / dim) (Su et al., RoFormer, 2021), and their scalings.

linear    all frequencies divided by one factor
llama3    those divided that make less than `low` turns within the original context, those kept that make more than
          `high`, the ones between interpolated (Llama 3.1)
yarn      the same, interpolated along the pairs instead of the turns; cos and sin grow with the factor (Peng et al.)
longrope  a divisor for each pair, of two lists: for contexts up to the original one, and for longer ones (Phi-3)
dynamic   plain ones within the context that the model was trained for, and no more is used here
"""

import math
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from warmfront.coordinator.models.fields import Fields
from warmfront.shared.errors import ModelError
from warmfront.shared.model.architecture import Rotary

__all__ = [
    "Doubles",
    "YarnKeys",
    "frequencies",
    "llama3",
    "long_magnitude",
    "read_yarn",
    "rotary",
    "yarn_magnitude",
]

Doubles = npt.NDArray[np.float64]


def frequencies(dim: int, base: float) -> Doubles:
    """Inverse frequencies [dim / 2], in radians per position, of heads of which `dim` numbers are rotated."""
    return np.asarray(base ** (-np.arange(0, dim, 2, dtype=np.float64) / dim))


def llama3(plain: Doubles, *, factor: float, low: float, high: float, original_context: float) -> Doubles:
    """Llama 3.1's long-context frequencies from plain ones."""
    turns = original_context * plain / (2 * math.pi)
    keep = np.clip((turns - low) / (high - low), 0, 1)
    return np.asarray(plain * (keep + (1 - keep) / factor))


class YarnKeys(NamedTuple):
    """What a file calls YaRN's settings."""

    base: str
    factor: str
    fast: str
    slow: str


def read_yarn(
    settings: Fields,
    keys: YarnKeys,
    plain: Doubles,
    *,
    base: float,
    original_context: float,
    factor: float | None = None,
    whole: bool = True,
) -> tuple[Doubles, float]:
    """YaRN's frequencies from plain ones, and its factor, for which `factor` stands where the file has none.

    Pairs of more than `fast` turns within the original context are kept, those of less than `slow` divided by the
    factor. `whole`: the pairs between which is interpolated are rounded outwards.
    """
    factor = settings.positive(keys.factor, factor)
    fast, slow = settings.positive(keys.fast, 32.0), settings.positive(keys.slow, 1.0)
    if base <= 1:
        raise settings.wrong(keys.base, "above 1, as YaRN wants it")

    def pair_of(turns: float) -> float:
        return len(plain) * math.log(original_context / (turns * 2 * math.pi)) / math.log(base)

    first, last = pair_of(fast), pair_of(slow)
    if whole:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, 2 * len(plain) - 1)
    divide = np.clip((np.arange(len(plain)) - first) / max(last - first, 0.001), 0, 1)
    return np.asarray(plain * (divide / factor + 1 - divide)), factor


def yarn_magnitude(factor: float, weight: float = 1.0) -> float:
    """YaRN's factor on cos and sin."""
    return 0.1 * weight * math.log(factor) + 1 if factor > 1 else 1.0


def long_magnitude(factor: float, original_context: float) -> float:
    """LongRoPE's factor on cos and sin, for a context `factor` times the original one."""
    return math.sqrt(1 + math.log(factor) / math.log(original_context)) if factor > 1 else 1.0


def rotary(
    path: Path,
    plain: Doubles,
    divisor: Doubles | float = 1.0,
    magnitude: float = 1.0,
    *,
    long_divisor: Doubles | None = None,
    original_context: int = 0,
) -> Rotary:
    """A rotary table of plain / divisor, or of plain / long_divisor in contexts longer than `original_context`.

    Raises ModelError, naming `path`, if they are not positive and finite.
    """
    with np.errstate(all="ignore"):
        scaled = plain / divisor
        long = scaled[:0] if long_divisor is None else plain / long_divisor
    for values in (scaled, long):
        if not (np.isfinite(values).all() and (values > 0).all()):
            raise ModelError(
                f"{path}: RoPE's base and scaling factors give no positive frequencies; the file is damaged"
            )
    return Rotary(
        frequencies=tuple(scaled.tolist()),
        magnitude=magnitude,
        long_frequencies=tuple(long.tolist()),
        original_context=original_context,
    )
