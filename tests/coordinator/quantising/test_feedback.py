"""What rounding does to products, by float64.  pytest tests/coordinator/quantising/test_feedback.py"""

import numpy as np
import pytest

from warmfront.coordinator.quantising.feedback import factor_of, plainly, with_feedback, with_feedback_across
from warmfront.coordinator.quantising.scales import FOUR_BITS
from warmfront.shared.model.formats import BLOCK, Kind, row_bytes, unpack

COLS, ROWS, TOKENS = 160, 96, 400


def sampled(tokens: int = TOKENS, cols: int = COLS) -> np.ndarray:
    """Inputs of which some columns are large, and all of which share a few directions."""
    rng = np.random.default_rng(1)
    shared = rng.normal(size=(tokens, 12)) @ rng.normal(size=(12, cols))
    values = shared + 0.7 * rng.normal(size=(tokens, cols))
    return (values * rng.gamma(0.6, size=cols)).astype(np.float32)


def weights(rows: int = ROWS, cols: int = COLS) -> np.ndarray:
    return np.random.default_rng(2).normal(size=(rows, cols)).astype(np.float32)


@pytest.mark.parametrize("block", [1, BLOCK])
def test_the_factor_is_that_of_the_inverse(block: int) -> None:
    """Of the columns by how large their inputs are, those of a block together."""
    x = sampled().astype(np.float64)
    factor = factor_of(sampled(), COLS, block)
    assert np.array_equal(np.sort(factor.order), np.arange(COLS))
    size = np.square(x[:, factor.order]).sum(0).reshape(-1, block)
    assert (np.diff(size.max(1)) <= 0).all()
    assert (np.diff(size, axis=1) <= 0).all()
    assert np.array_equal(
        factor.order.reshape(-1, block) // block, factor.order[::block, None] // block + np.zeros(block)
    )
    x = x[:, factor.order]
    moments = x.T @ x
    moments[np.diag_indices(COLS)] += 0.02 * np.trace(moments) / COLS
    upper = factor.upper.astype(np.float64)
    assert not np.tril(upper, -1).any()
    inverse = np.linalg.inv(moments)
    np.testing.assert_allclose(upper.T @ upper, inverse, atol=1e-4 * np.abs(inverse).max())


@pytest.mark.parametrize("kind", FOUR_BITS)
@pytest.mark.parametrize("tokens", [TOKENS, 40])
def test_products_keep_better(kind: Kind, tokens: int) -> None:
    """On other inputs of the same kind too, where there were fewer of them than columns."""
    factor, matrix = factor_of(sampled()[:tokens], COLS), weights()
    packed = with_feedback(matrix, factor, kind)
    assert packed.shape == (ROWS, row_bytes(kind, COLS))
    other = sampled()[tokens // 2 :].astype(np.float64)

    def error(data: np.ndarray) -> float:
        return float(((other @ (unpack(data, kind, COLS).astype(np.float64) - matrix).T) ** 2).sum())

    assert error(packed) < (0.6 if tokens == TOKENS else 0.85) * error(plainly(matrix, kind))


@pytest.mark.parametrize("kind", FOUR_BITS)
def test_products_across_rows_keep_better(kind: Kind) -> None:
    """Rows of inputs, not a whole number of the panels they are taken in."""
    inputs, cols = 150, 64
    x, matrix = sampled(cols=inputs), weights(inputs, cols)
    packed = with_feedback_across(matrix, factor_of(x, inputs, 1), kind)

    def error(data: np.ndarray) -> float:
        return float(((x.astype(np.float64) @ (unpack(data, kind, cols).astype(np.float64) - matrix)) ** 2).sum())

    assert error(packed) < 0.6 * error(plainly(matrix, kind))


@pytest.mark.parametrize("kind", FOUR_BITS)
def test_padding_stays_zero(kind: Kind) -> None:
    """Columns and rows of zeros, of which the sample knows nothing."""
    matrix = weights()
    matrix[:, -32:] = 0
    matrix[-1] = 0
    packed = with_feedback(matrix, factor_of(sampled()[:, : COLS - 32], COLS), kind)
    wide = unpack(packed, kind, COLS)
    assert not wide[:, -32:].any()
    assert not packed[-1].any()
    assert wide[:-1, :-32].any(axis=1).all()
