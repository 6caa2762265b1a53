"""Scales against a much finer search in float64.  pytest tests/coordinator/quantising/test_scales.py"""

import numpy as np
import pytest

from warmfront.coordinator.quantising.scales import FOUR_BITS, round_blocks, searched
from warmfront.shared.model.formats import Kind, pack, unpack


def rounded(blocks: np.ndarray, importance: np.ndarray, kind: Kind) -> np.ndarray:
    scale, minimum = searched(blocks, importance, kind)
    number = round_blocks(blocks, scale, minimum)
    assert number.max() <= 15
    return number * scale.astype(np.float64)[:, None] + minimum.astype(np.float64)[:, None]


def errors(blocks: np.ndarray, importance: np.ndarray, kind: Kind) -> np.ndarray:
    return (importance * (rounded(blocks, importance, kind) - blocks) ** 2).sum(1)


def finest(block: np.ndarray, weight: np.ndarray, kind: Kind) -> float:
    """The least error of one block over a fine grid of scales, and of minima where the type has any."""
    span = np.ptp(block)
    if kind == Kind.Q4S:
        most = np.abs(block).max() / 8
        scales = np.concatenate((np.linspace(0.6, 1.3, 1500), -np.linspace(0.6, 1.3, 1500))) * most
        minima = -8 * scales
    else:
        grid = np.meshgrid(np.linspace(0.6, 1.05, 90) * span / 15, block.min() + np.linspace(-0.03, 0.3, 90) * span)
        scales, minima = (part.reshape(-1) for part in grid)
    q = np.clip(np.rint((block - minima[:, None]) / scales[:, None]), 0, 15)
    return float((weight * (q * scales[:, None] + minima[:, None] - block) ** 2).sum(1).min())


@pytest.mark.parametrize("kind", FOUR_BITS)
@pytest.mark.parametrize("weighted", [False, True])
def test_close_to_the_best_there_is(kind: Kind, weighted: bool) -> None:
    rng = np.random.default_rng(1)
    blocks = rng.standard_t(5, (60, 32)).astype(np.float32) * 10.0 ** rng.uniform(-3, 2, (60, 1)).astype(np.float32)
    importance = rng.gamma(0.5, size=(60, 32)).astype(np.float32) if weighted else np.ones((60, 32), np.float32)
    best = np.array([finest(*pair, kind) for pair in zip(blocks.astype(np.float64), importance, strict=True)])
    # One block may be farther off, all together hardly.
    unit = blocks.astype(np.float64).std(1) ** 2
    found = errors(blocks, importance, kind) / unit
    assert found.sum() < 1.15 * (best / unit).sum()
    nearest = (importance * (unpack(pack(blocks, kind), kind, 32).astype(np.float64) - blocks) ** 2).sum(1) / unit
    assert found.sum() < 0.93 * nearest.sum()


@pytest.mark.parametrize("kind", FOUR_BITS)
def test_weights_on_a_grid_stay(kind: Kind) -> None:
    rng = np.random.default_rng(2)
    numbers = rng.integers(0, 16, (50, 32))
    numbers[:, :2] = 0, 15
    scale = rng.uniform(0.01, 1, (50, 1)).astype(np.float16).astype(np.float32)
    low = -8 * scale if kind == Kind.Q4S else rng.normal(size=(50, 1)).astype(np.float16).astype(np.float32)
    blocks = (numbers * scale + low).astype(np.float32)
    found = rounded(blocks, np.ones_like(blocks), kind)
    # A fitted minimum is rounded to float16, in which the true one is exact: at most the neighbour of it.
    assert np.abs(found - blocks).max() <= 2.0**-9 * np.abs(blocks).max()


@pytest.mark.parametrize("kind", FOUR_BITS)
@pytest.mark.parametrize("value", [0.0, -0.75, 3.0, 1e-9])
def test_constant_blocks(kind: Kind, value: float) -> None:
    blocks = np.full((2, 32), value, np.float32)
    found = rounded(blocks, np.ones_like(blocks), kind)
    assert np.abs(found - value).max() <= 2.0**-10 * abs(value) + 1e-7
