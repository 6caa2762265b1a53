"""Kinds of text by the neurons that they use.  pytest tests/coordinator/selectors/test_clusters.py"""

import numpy as np
import pytest

from warmfront.coordinator.selectors.clusters import cluster, elbow
from warmfront.coordinator.selectors.core import bits_of, largest, overlap
from warmfront.coordinator.selectors.divergence import divergence

TEXTS, LAYERS, NEURONS = 60, 3, 64


def of_three_kinds() -> tuple[np.ndarray, np.ndarray]:
    """Scores of texts of which each kind uses neurons of its own, with noise; and the kinds."""
    random = np.random.default_rng(3)
    kinds = np.arange(TEXTS) % 3
    means = random.gamma(0.5, size=(3, LAYERS, NEURONS))
    noise = random.uniform(0.7, 1.4, size=(TEXTS, LAYERS, NEURONS))
    return (means[kinds] * noise).astype(np.float32), kinds


def test_kinds_are_found_and_texts_recognised() -> None:
    scores, kinds = of_three_kinds()
    found = cluster(scores, NEURONS)
    assert sorted(found.sizes.tolist()) == [20, 20, 20]
    for kind in range(3):
        nearest = found.nearest(scores[kinds == kind][0].astype(np.float64), NEURONS)
        np.testing.assert_allclose(nearest, scores[kinds == kind].mean(0), rtol=1e-5)


def test_elbow() -> None:
    assert elbow([100, 40, 10, 8, 7, 6]) == 3
    assert elbow([100, 10, 9]) == 2
    assert elbow([5.0]) == 1


def test_the_largest_and_their_words() -> None:
    scores = np.zeros((2, NEURONS))
    scores[0, [3, 40]], scores[1, 5] = 2.0, 1.0
    core = largest(scores, 0.05, 60)
    assert np.argwhere(core).tolist() == [[0, 0], [0, 3], [0, 40], [1, 0], [1, 1], [1, 5]]
    assert bits_of(core).tolist() == [[1 | 1 << 3, 1 << 8], [1 | 1 << 1 | 1 << 5, 0]]
    assert not largest(scores, 1.0, 60)[:, 60:].any(), "what is behind the neurons is padding"
    assert largest(scores, 1e-9, 60).sum() == 2


def test_overlap_is_beyond_chance() -> None:
    random = np.random.default_rng(0)
    one, other = (largest(random.random((4, 2000)), 0.4, 2000) for _ in range(2))
    assert overlap(one, one) == 1
    assert abs(overlap(one, other)) < 0.05


def test_divergence() -> None:
    one = np.log(np.array([[0.5, 0.25, 0.25], [0.9, 0.05, 0.05]], np.float32)) + 3
    other = np.log(np.array([[0.25, 0.5, 0.25], [0.9, 0.05, 0.05]], np.float32))
    assert divergence(one, other) == pytest.approx((0.5 * np.log(2) - 0.25 * np.log(2)) / 2, rel=1e-5)
