"""Rounding a matrix so that its products keep: what one column's rounding adds, the columns behind it take off.

The method of GPTQ (Frantar et al. 2023, arXiv:2210.17323), optimal brain surgery in a fixed order. With H the second
moments of a matrix's inputs, the error of its products is tr(E H E^T) for an error E of the weights. Once column
j is rounded, the best that the columns behind it can do is to move by -e_j U[j, j+1:] / U[j, j], where U is the upper
Cholesky factor of H^-1; what is left of the error is e_j^2 / U[j, j]^2, which is why that weighs a block's search.
"""

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from warmfront.coordinator.quantising.scales import round_blocks, searched
from warmfront.shared.model.formats import BLOCK, Kind, join_nibbles, join_q4

__all__ = ["Factor", "factor_of", "plainly", "with_feedback", "with_feedback_across"]

Bytes = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.float32]
Halves = npt.NDArray[np.float16]
# Added to the diagonal of H, of its mean: with it fewer tokens than columns are enough, and columns that the sample
# never used keep their weights.
_DAMPING = 0.02


class Factor(NamedTuple):
    """U of a matrix's inputs, [cols, cols], and 1 / U[j, j]^2, the weight of an error in column j."""

    upper: Floats
    importance: Floats


def factor_of(inputs: Floats, cols: int) -> Factor:
    """The factor for a matrix whose sampled inputs are [tokens, n]; columns n .. cols are padding."""
    moments = np.zeros((cols, cols), np.float64)
    moments[: inputs.shape[1], : inputs.shape[1]] = inputs.T @ inputs
    mean = float(np.trace(moments)) / inputs.shape[1]
    moments[np.diag_indices(cols)] += _DAMPING * mean if mean > 0 else 1.0
    # The upper factor of the inverse: the lower one of the matrix read backwards, inverted and read backwards again.
    lower = np.linalg.cholesky(moments[::-1, ::-1])
    upper = np.linalg.inv(lower)[::-1, ::-1]
    return Factor(np.triu(upper).astype(np.float32), np.asarray(1 / np.diagonal(upper) ** 2, np.float32))


def plainly(weights: Floats, kind: Kind) -> Bytes:
    """Packed rows of float32 [rows, cols], each block for itself and every weight alike."""
    blocks = weights.reshape(-1, BLOCK)
    scale, minimum = searched(blocks, np.ones_like(blocks), kind)
    return _joined(round_blocks(blocks, scale, minimum), scale, minimum, len(weights), kind)


def with_feedback(weights: Floats, factor: Factor, kind: Kind) -> Bytes:
    """Packed rows of float32 [rows, cols], whose blocks are of inputs."""
    left, rows, cols = weights.copy(), *weights.shape
    numbers = np.empty((rows, cols // BLOCK, BLOCK), np.uint8)
    scales, minima = np.empty((2, rows, cols // BLOCK), np.float16)
    for block, first in enumerate(range(0, cols, BLOCK)):
        here = slice(first, first + BLOCK)
        part, upper = np.ascontiguousarray(left[:, here]), factor.upper[here, here]
        scale, minimum = searched(part, np.broadcast_to(factor.importance[here], part.shape), kind)
        errors = np.empty_like(part)
        for j in range(BLOCK):
            number = round_blocks(part[:, j, None], scale, minimum)
            numbers[:, block, j] = number[:, 0]
            errors[:, j] = (part[:, j] - _widened(number[:, 0], scale, minimum)) / upper[j, j]
            part[:, j + 1 :] -= errors[:, j, None] * upper[j, j + 1 :]
        left[:, first + BLOCK :] -= errors @ factor.upper[here, first + BLOCK :]
        scales[:, block], minima[:, block] = scale, minimum
    return _joined(numbers, scales.reshape(-1), minima.reshape(-1), rows, kind)


def with_feedback_across(weights: Floats, factor: Factor, kind: Kind) -> Bytes:
    """The same where a row is of an input, as in down: a row's blocks are rounded at once."""
    left, rows, cols = weights.copy(), *weights.shape
    numbers = np.empty((rows, cols // BLOCK, BLOCK), np.uint8)
    scales, minima = np.empty((2, rows, cols // BLOCK), np.float16)
    even = np.ones((cols // BLOCK, BLOCK), np.float32)
    for first in range(0, rows, BLOCK):
        last = min(first + BLOCK, rows)
        upper = factor.upper[first:last, first:last]
        part, errors = left[first:last], np.empty((last - first, cols), np.float32)
        for j, row in enumerate(part):
            blocks = row.reshape(-1, BLOCK)
            scale, minimum = searched(blocks, even, kind)
            numbers[first + j] = number = round_blocks(blocks, scale, minimum)
            widened = _widened(number, scale[:, None], minimum[:, None])
            errors[j] = (blocks - widened).reshape(-1) / upper[j, j]
            part[j + 1 :] -= upper[j, j + 1 :, None] * errors[j]
            scales[first + j], minima[first + j] = scale, minimum
        left[last:] -= factor.upper[first:last, last:].T @ errors
    return _joined(numbers, scales.reshape(-1), minima.reshape(-1), rows, kind)


def _widened(number: Bytes, scale: Halves, minimum: Halves) -> Floats:
    return np.asarray(number * scale.astype(np.float32) + minimum.astype(np.float32), np.float32)


def _joined(numbers: Bytes, scale: Halves, minimum: Halves, rows: int, kind: Kind) -> Bytes:
    numbers = numbers.reshape(rows, -1, BLOCK)
    scale, minimum = scale.reshape(rows, -1), minimum.reshape(rows, -1)
    if kind == Kind.Q4:
        return join_q4(numbers, scale, minimum)
    # A block of zeros is all zero bytes, as `pack` has it: padding compares equal whoever wrote it.
    numbers = np.where((scale == 0)[:, :, None], 0, numbers).astype(np.uint8)
    return np.concatenate((join_nibbles(numbers), np.ascontiguousarray(scale).view(np.uint8)), axis=1)
