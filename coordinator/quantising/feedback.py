"""Rounding a matrix so that its products keep: what one column's rounding adds, the columns behind it take off.

The method of GPTQ (Frantar et al. 2023, arXiv:2210.17323), optimal brain surgery in a fixed order. With H the second
moments of a matrix's inputs, the error of its products is tr(E H E^T) for an error E of the weights. Once column
j is rounded, the best that the columns behind it can do is to move by -e_j U[j, j+1:] / U[j, j], where U is the upper
Cholesky factor of H^-1; what is left of the error is e_j^2 / U[j, j]^2, which is why that weighs a block's search.
Columns whose inputs are large come first (GPTQ's act-order), while there are many behind them to take up their error;
where a block has inputs together, blocks by their largest.
"""

from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from warmfront.coordinator.quantising.scales import round_blocks, searched
from warmfront.shared.kernels.jit import kernel
from warmfront.shared.model.formats import BLOCK, Kind, join_nibbles, join_q4

__all__ = ["Factor", "factor_of", "plainly", "with_feedback", "with_feedback_across"]

Bytes = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.float32]
Halves = npt.NDArray[np.float16]
Order = npt.NDArray[np.int64]
# Added to the diagonal of H, of its mean: with it fewer tokens than columns are enough, and columns that the sample
# never used keep their weights.
_DAMPING = 0.02


class Factor(NamedTuple):
    """U of a matrix's inputs in `order`, [cols, cols], and 1 / U[j, j]^2, the weight of an error in column order[j]."""

    upper: Floats
    importance: Floats
    order: Order


def factor_of(inputs: Floats, cols: int, block: int = BLOCK) -> Factor:
    """The factor for a matrix whose sampled inputs are [tokens, n]; columns n .. cols are padding.

    `block`: how many neighbours stay together; 1: each column has its own place.
    """
    moments = np.zeros((cols, cols), np.float64)
    moments[: inputs.shape[1], : inputs.shape[1]] = inputs.T @ inputs
    mean = float(np.trace(moments)) / inputs.shape[1]
    moments[np.diag_indices(cols)] += _DAMPING * mean if mean > 0 else 1.0
    large = -np.diagonal(moments).reshape(-1, block)
    first, within = np.argsort(large.min(1), kind="stable"), np.argsort(large, axis=1, kind="stable")
    order = (block * first[:, None] + within[first]).reshape(-1)
    # The upper factor of the inverse: the lower one of the matrix read backwards, inverted and read backwards again.
    backwards = torch.from_numpy(moments[order[::-1]][:, order[::-1]])
    lower = torch.linalg.cholesky(backwards)
    inverse = torch.linalg.solve_triangular(lower, torch.eye(cols, dtype=torch.float64), upper=False)
    upper = np.triu(inverse.numpy()[::-1, ::-1])
    return Factor(upper.astype(np.float32), np.asarray(1 / np.diagonal(upper) ** 2, np.float32), order)


def plainly(weights: Floats, kind: Kind) -> Bytes:
    """Packed rows of float32 [rows, cols], each block for itself and every weight alike."""
    blocks = weights.reshape(-1, BLOCK)
    scale, minimum = searched(blocks, np.ones_like(blocks), kind)
    return _joined(round_blocks(blocks, scale, minimum), scale, minimum, len(weights), kind)


@kernel
def _round_in_turn(part: Floats, scales: Floats, minima: Floats, upper: Floats, numbers: Bytes, errors: Floats) -> None:
    """Round blocks [n, 32] column by column; `part` is used up. `errors`: of each column, over its U[j, j]."""
    for i in range(len(part)):
        inverse = 1 / scales[i] if scales[i] != 0 else np.float32(0)
        for j in range(BLOCK):
            number = min(max(np.rint((part[i, j] - minima[i]) * inverse), np.float32(0)), np.float32(15))
            error = (part[i, j] - number * scales[i] - minima[i]) / upper[j, j]
            numbers[i, j], errors[i, j] = number, error
            for k in range(j + 1, BLOCK):
                part[i, k] -= error * upper[j, k]


def with_feedback(weights: Floats, factor: Factor, kind: Kind) -> Bytes:
    """Packed rows of float32 [rows, cols], whose blocks are of inputs."""
    rows, cols = weights.shape
    left = weights[:, factor.order]
    numbers = np.empty((rows, cols), np.uint8)
    scales, minima = np.empty((2, rows, cols // BLOCK), np.float16)
    rounded, errors = np.empty((rows, BLOCK), np.uint8), np.empty((rows, BLOCK), np.float32)
    for first in range(0, cols, BLOCK):
        here = slice(first, first + BLOCK)
        part, upper = np.ascontiguousarray(left[:, here]), np.ascontiguousarray(factor.upper[here, here])
        scale, minimum = searched(part, np.broadcast_to(factor.importance[here], part.shape), kind)
        _round_in_turn(part, scale.astype(np.float32), minimum.astype(np.float32), upper, rounded, errors)
        numbers[:, factor.order[here]] = rounded
        left[:, first + BLOCK :] -= errors @ factor.upper[here, first + BLOCK :]
        block = factor.order[first] // BLOCK
        scales[:, block], minima[:, block] = scale, minimum
    return _joined(numbers, scales.reshape(-1), minima.reshape(-1), rows, kind)


def with_feedback_across(weights: Floats, factor: Factor, kind: Kind) -> Bytes:
    """The same where a row is of an input, as in down: a row's blocks are rounded at once."""
    rows, cols = weights.shape
    left = weights[factor.order]
    numbers = np.empty((rows, cols // BLOCK, BLOCK), np.uint8)
    scales, minima = np.empty((2, rows, cols // BLOCK), np.float16)
    even = np.ones((cols // BLOCK, BLOCK), np.float32)
    for first in range(0, rows, BLOCK):
        last = min(first + BLOCK, rows)
        upper = factor.upper[first:last, first:last]
        part, errors = left[first:last], np.empty((last - first, cols), np.float32)
        for j, row in enumerate(part):
            blocks, at = row.reshape(-1, BLOCK), factor.order[first + j]
            scale, minimum = searched(blocks, even, kind)
            numbers[at] = number = round_blocks(blocks, scale, minimum)
            widened = _widened(number, scale[:, None], minimum[:, None])
            errors[j] = (blocks - widened).reshape(-1) / upper[j, j]
            part[j + 1 :] -= upper[j, j + 1 :, None] * errors[j]
            scales[at], minima[at] = scale, minimum
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
