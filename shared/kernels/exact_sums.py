"""Sums whose result does not depend on who adds what, in which order: multiples of a unit, added as integers.

The feed-forward output of a layer is a sum over its neurons. Which thread or worker computes which of them changes as
loads shift, and sums of floats depend on their order. So the order is fixed only within a group of neurons, which one
thread computes as a whole; each column of a group's float32 sum is then rounded once, to a multiple of the token's
*unit*, and whatever is added from there on is 64-bit integers, which is exact.

The unit is a power of two, the smallest with which nothing can overflow: with a the sum of the input's magnitudes, no
gate and no up exceeds a times the largest magnitude in its matrix, no activation that of its gate (squared ReLU: of its
gate's square), and a column adds `neurons` products of the two with a weight of the down matrix. Real sums are some
2^25 times smaller than that bound (with squared ReLU 2^33: a gate is some 2^8 times smaller than its bound), so the
unit is about 2^-36 (2^-28) of them, where float32 resolves 2^-24. All factors carry 1 / unit: no step is added. A bias
of gate or up counts as the weight of one more feature, whose magnitude is 1.
"""

from typing import Any

import numpy as np
import numpy.typing as npt
from llvmlite import ir

from warmfront.shared.kernels.fp16 import has
from warmfront.shared.kernels.jit import kernel
from warmfront.shared.kernels.simd import I64, call, constants, load, store, vector
from warmfront.shared.model.panels import LANES

__all__ = ["add_to_sums", "inverse_unit", "merge_sums", "round_to_sums"]

# Bits of a sum, without the sign and one in reserve for roundings. The most is what an input of 8 bits adds: of each
# block 32 half steps, which are 1/127 of its largest magnitude, 1/8 of the block's sum at worst. In gate and up: 1.27.
_BITS = 61
# Beyond this magnitude float32 products may have overflowed before they came here; such a token's output is NaN.
_LIMIT = 2.0**100
DOUBLE = ir.DoubleType()
Floats = npt.NDArray[np.float32]
Longs = npt.NDArray[np.int64]


def _converts(context: Any) -> bool:
    """Whether the CPU converts vectors of floats to 64-bit integers."""
    return has(context, "avx512dq") or bool(context.codegen().magic_tuple()[0].startswith("aarch64"))


@kernel
def inverse_unit(reach: float, degree: int, magnitude: float) -> Any:
    """1 / unit as float32, for a token whose features' magnitudes add up to `magnitude`; NaN if that is not finite.

    `reach`: neurons times the largest magnitudes of gate (squared if gates are), up and down; `degree`: how many of
    these factors multiply the token (`FeedForward.degree`), none where the activation has a bound that `reach` has too.
    """
    bound = reach * magnitude**degree
    if not (bound < _LIMIT and magnitude < _LIMIT):
        return np.float32(np.nan)
    exponent = np.int64(0)
    if bound > 0:
        exponent = np.int64(np.ceil(np.log2(bound)))
    # Within float32 on both sides: tiny sums need no finer unit.
    return np.float32(2.0 ** min(_BITS - exponent, np.int64(100)))


def add_to_sums(context: Any, b: Any, sums: Any, offset: Any, values: Any) -> None:
    """Round 16 floats to integers and add them to int64 at byte `offset` of `sums`."""
    whole = b.fptosi(values, vector(I64)) if _converts(context) else _by_doubles(b, values)
    store(b, sums, offset, b.add(whole, load(b, sums, offset, vector(I64))))


def _by_doubles(b: Any, values: Any) -> Any:
    """16 floats below 2^62 as integers, in two halves: 1.5 * 2^52 added, the last place of a double is 1.

    Its bits are then the integer beside those of that number. What is added to the high half has more: shifted up, it
    takes those of the low half away. All steps but the last rounding are exact.
    """
    double, wide = vector(DOUBLE), vector(I64)
    magic = 1.5 * 2.0**52
    low_magic, high_magic, per_high_unit, minus_high_unit = (
        constants(value, double) for value in (magic, magic + 2.0**32 - (0x4338 << 16), 2.0**-32, -(2.0**32))
    )
    number = b.fpext(values, double)
    high = call(b, "llvm.fmuladd.v16f64", double, number, per_high_unit, high_magic)
    rest = call(b, "llvm.fmuladd.v16f64", double, b.fsub(high, high_magic), minus_high_unit, number)
    low = b.fadd(rest, low_magic)
    return b.add(b.shl(b.bitcast(high, wide), constants(32, wide)), b.bitcast(low, wide))


@kernel
def round_to_sums(values: Floats, inverse: Floats, lanes: int, out: Longs) -> None:
    """Float32 [panels, hidden, lanes], added up by a device in its own order, as int64 sums.

    inverse: [panels * lanes]; for one lane, a panel is a token.
    """
    rows = len(inverse) // lanes
    size = len(values) // rows
    for row in range(rows):
        for i in range(size):
            at = row * size + i
            out[at] = np.int64(np.rint(np.float64(values[at]) * inverse[row * lanes + i % lanes]))


@kernel
def merge_sums(sums: Longs, inverse: Floats, x: Floats) -> None:
    """Add int64 [n] sums to float32 x; number i is in units of token i % len(inverse)."""
    lanes = len(inverse)
    if lanes == 1:
        unit = 1 / np.float64(inverse[0])
        for i in range(len(x)):
            x[i] += np.float32(sums[i] * unit)
    else:
        units = 1 / inverse.astype(np.float64)
        for first in range(0, len(x), LANES):
            for lane in range(LANES):
                x[first + lane] += np.float32(sums[first + lane] * units[lane])
