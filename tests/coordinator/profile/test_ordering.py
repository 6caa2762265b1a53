"""Orders of neurons against what a group is for, measured by brute force.

Run: pytest tests/coordinator/profile/test_ordering.py
"""

from itertools import pairwise

import numpy as np
import pytest

from warmfront.coordinator.profile.ordering import order_groups, order_neurons


def crafted(
    topics: int, neurons: int, segments: int, *, seed: int = 0, tokens: int = 200
) -> tuple[np.ndarray, np.ndarray]:
    """Counts [segments, neurons] and the topic of each neuron, at random places: it fires often in its own segments,
    segment s being of topic s % topics, and a tenth as often elsewhere; rates fall by a power law."""
    rng = np.random.default_rng(seed)
    topic = rng.permutation(np.arange(neurons) % topics)
    peak = np.clip(0.03 / rng.uniform(0.03, 1, neurons), 0, 0.9)
    own = topic == (np.arange(segments) % topics)[:, None]
    return rng.binomial(tokens, np.where(own, peak, peak / 10)).astype(np.uint16), topic


def impurity(labels: np.ndarray) -> float:
    """The share of pairs in a group of 32 that have different labels."""
    groups = labels.reshape(-1, 32)
    return float(np.mean(groups[:, :, None] != groups[:, None, :]))


@pytest.mark.parametrize("topics", [2, 4, 8])
@pytest.mark.parametrize("segments", [8, 20, 64])
def test_neurons_of_a_topic_share_groups(topics: int, segments: int) -> None:
    counts, topic = crafted(topics, 2048, segments)
    order = order_neurons(counts, 2048)
    assert sorted(order) == list(range(2048))
    before, after = impurity(topic), impurity(topic[order])
    assert before > 0.9 * (1 - 1 / topics)
    assert after < 0.35 * before


def test_few_groups_hold_what_a_topic_fires() -> None:
    """The purpose: of a topic, so many of the firings come from its 16 hottest of 64 groups."""
    counts, _ = crafted(4, 2048, 32)
    order = order_neurons(counts, 2048)
    hotness = np.argsort(-counts.sum(0, dtype=int))

    def held(places: np.ndarray) -> float:
        fired = counts[::4, places].sum(0, dtype=int).reshape(-1, 32).sum(1)
        return float(np.sort(fired)[-16:].sum() / fired.sum())

    assert held(order) > held(hotness) + 0.05
    assert held(hotness) > held(np.arange(2048)) + 0.1


def test_the_hottest_groups_come_first() -> None:
    counts, _ = crafted(4, 1000, 12)
    order = order_neurons(np.pad(counts, ((0, 0), (0, 24))), 1000)
    firing = counts.sum(0, dtype=int)[order[:992]].reshape(-1, 32)
    assert all(before >= after for before, after in pairwise(firing.sum(1)))


def test_with_one_segment_it_is_by_hotness() -> None:
    counts = np.random.default_rng(0).permutation(320).astype(np.uint16)[None]
    np.testing.assert_array_equal(order_neurons(counts, 320), np.argsort(-counts[0].astype(int)))


@pytest.mark.parametrize("ffn", [1, 31, 70, 96, 128])
@pytest.mark.parametrize("segments", [1, 5])
def test_padding_stays_last(ffn: int, segments: int) -> None:
    neurons = -(-ffn // 32) * 32
    counts = np.zeros((segments, neurons), np.uint16)
    counts[:, :ffn] = np.random.default_rng(ffn).integers(0, 50, (segments, ffn))
    order = order_neurons(counts, ffn)
    assert sorted(order[:ffn]) == list(range(ffn))
    assert list(order[ffn:]) == list(range(ffn, neurons))


@pytest.mark.parametrize("segments", [0, 1, 9])
def test_neurons_that_never_fired(segments: int) -> None:
    """Keep their order, behind all that did."""
    counts = np.zeros((segments, 256), np.uint16)
    assert list(order_neurons(counts, 256)) == list(range(256))
    if segments:
        counts[0, 100:164] = 5
        order = order_neurons(counts, 256)
        assert sorted(order[:64]) == list(range(100, 164))
        assert list(order[64:]) == [*range(100), *range(164, 256)]


def test_it_is_repeatable_and_settles() -> None:
    counts, _ = crafted(3, 1024, 30)
    order = order_neurons(counts, 1024)
    np.testing.assert_array_equal(order, order_neurons(counts.copy(), 1024))
    again = order_neurons(counts[:, order], 1024)
    np.testing.assert_array_equal(
        counts[:, order[again]].reshape(30, -1, 32).sum(2), counts[:, order].reshape(30, -1, 32).sum(2)
    )


@pytest.mark.parametrize("ffn", [320, 300])
def test_whole_groups_move(ffn: int) -> None:
    counts = np.zeros((2, 320), np.uint16)
    counts[:, :ffn] = np.random.default_rng(3).integers(0, 9, (2, ffn)) * np.repeat(np.arange(10) * 7 % 10, 32)[:ffn]
    groups = order_groups(counts, ffn).reshape(10, 32)
    np.testing.assert_array_equal(groups % 32, np.broadcast_to(np.arange(32), (10, 32)))
    assert (groups // 32 == groups[:, :1] // 32).all()
    firing = counts.sum(0)[groups].sum(1)
    whole = ffn // 32
    assert sorted(groups[:, 0] // 32) == list(range(10))
    assert all(before >= after for before, after in pairwise(firing[:whole]))
    assert list(groups[whole:, 0] // 32) == list(range(whole, 10))
