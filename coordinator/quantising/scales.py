"""The scales and minima of 4-bit blocks, searched for the least squared error.

A block's error is a jagged function of its scale: each candidate range gives numbers, and for given numbers the best
scale and minimum are a least-squares fit. Candidates are ranges around the block's own, narrower ones too: to cut
off the largest weight often costs less than to widen all other steps. The weights of the squares (`importance`) say how
much an error in a column counts.
"""

import numpy as np
import numpy.typing as npt

from warmfront.shared.kernels.jit import kernel
from warmfront.shared.model.formats import BLOCK, Kind

__all__ = ["FOUR_BITS", "round_blocks", "searched"]

Bytes = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.float32]
Halves = npt.NDArray[np.float16]
# The types whose blocks are searched.
FOUR_BITS = (Kind.Q4, Kind.Q4S)
# The largest number of 4 bits, and candidates on either side of a block's own range; more gain less than 1 % of error.
_TOP, _NARROW, _WIDE, _STEP = 15, 7, 3, np.float32(0.03)
# Fits of scale and minimum, each to the numbers of the one before.
_FITS = 2


@kernel
def _symmetric(values: Floats, importance: Floats, scales: Floats) -> None:
    """Scales float32 [n] of blocks [n, 32] that are (number - 8) * scale."""
    for i in range(len(values)):
        low, high = np.float32(0), np.float32(0)
        for j in range(BLOCK):
            low, high = min(low, values[i, j]), max(high, values[i, j])
        least, best = np.float32(np.inf), np.float32(0)
        # 0 is farther from 8 than 15 is: either end may have the longer side.
        for end in (low, high):
            for step in range(-_NARROW, _WIDE + 1):
                scale = end / np.float32(-8) * (1 + step * _STEP)
                inverse = 1 / scale if scale != 0 else np.float32(0)
                product, square = np.float32(0), np.float32(0)
                for j in range(BLOCK):
                    number = min(max(np.rint(values[i, j] * inverse), np.float32(-8)), np.float32(7))
                    product += importance[i, j] * values[i, j] * number
                    square += importance[i, j] * number * number
                if square > 0:
                    # What the fit takes off the error, sum of w * x^2, which is the same for all.
                    gained = -product * product / square
                    if gained < least:
                        least, best = gained, product / square
        scales[i] = best


@kernel
def _affine(values: Floats, importance: Floats, scales: Floats, minima: Floats) -> None:
    """Scales and minima float32 [n] of blocks [n, 32] that are number * scale + minimum."""
    for i in range(len(values)):
        low, high = values[i, 0], values[i, 0]
        weight, weighted = np.float32(0), np.float32(0)
        for j in range(BLOCK):
            low, high = min(low, values[i, j]), max(high, values[i, j])
            weight += importance[i, j]
            weighted += importance[i, j] * values[i, j]
        least = np.float32(np.inf)
        scales[i], minima[i] = (high - low) / _TOP, low
        for step in range(-_NARROW, _WIDE):
            half = (high - low) / 2 * (1 + step * _STEP)
            scale, minimum = 2 * half / _TOP, (high + low) / 2 - half
            for fit in range(_FITS + 1):
                inverse = 1 / scale if scale != 0 else np.float32(0)
                error = total = square = product = np.float32(0)
                for j in range(BLOCK):
                    number = min(max(np.rint((values[i, j] - minimum) * inverse), np.float32(0)), np.float32(_TOP))
                    away = values[i, j] - number * scale - minimum
                    error += importance[i, j] * away * away
                    total += importance[i, j] * number
                    square += importance[i, j] * number * number
                    product += importance[i, j] * number * values[i, j]
                if error < least:
                    least, scales[i], minima[i] = error, scale, minimum
                spread = weight * square - total * total
                if fit == _FITS or spread <= np.float32(1e-6) * weight * square:
                    break
                scale = (weight * product - total * weighted) / spread
                minimum = (weighted - scale * total) / weight


def searched(values: Floats, importance: Floats, kind: Kind) -> tuple[Halves, Halves]:
    """Scale and minimum, as they are stored, of blocks float32 [n, 32] of Q4 or Q4S: float16 [n] each.

    `importance`: how much the squared error of each weight counts, float32 [n, 32], not negative.
    """
    values, importance = np.ascontiguousarray(values), np.ascontiguousarray(importance)
    scales, minima = np.zeros((2, len(values)), np.float32)
    if kind == Kind.Q4S:
        _symmetric(values, importance, scales)
        half = scales.astype(np.float16)
        return half, np.asarray(np.float16(-8) * half, np.float16)
    assert kind == Kind.Q4
    _affine(values, importance, scales, minima)
    return scales.astype(np.float16), minima.astype(np.float16)


def round_blocks(values: Floats, scale: Halves, minimum: Halves) -> Bytes:
    """The nearest numbers 0..15 of blocks float32 [..., 32] with these scales and minima [...]."""
    wide, low = scale.astype(np.float32)[..., None], minimum.astype(np.float32)[..., None]
    inverse = np.divide(1, wide, out=np.zeros_like(wide), where=wide != 0)
    return np.asarray(np.clip(np.rint((values - low) * inverse), 0, _TOP), np.uint8)
