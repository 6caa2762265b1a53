"""Counts by segment, and the figures made from them.  pytest tests/coordinator/profile/test_counts.py"""

from itertools import pairwise

import numpy as np
import pytest

from warmfront.coordinator.profile.counts import MAX_TOKENS, SEGMENT_TOKENS, SEGMENTS, Profile

LAYERS, NEURONS, FFN = 3, 96, 80
RATES = np.random.default_rng(1).uniform(0, 0.5, (LAYERS, 1, NEURONS)) * (np.arange(NEURONS) < FFN)


def random_firing(tokens: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).random((LAYERS, tokens, NEURONS)) < RATES


def counted(*pieces: np.ndarray, fresh: bool = False) -> Profile:
    profile = Profile(LAYERS, NEURONS, FFN, "relu", ["text"])
    for piece in pieces:
        profile.add(piece, fresh=fresh)
    return profile


def assert_counts(profile: Profile, fired: np.ndarray) -> None:
    """Each segment's counts are those of its tokens."""
    counts, bounds = profile.counts, np.cumsum([0, *profile.tokens])
    assert bounds[-1] == fired.shape[1]
    assert counts.dtype == np.uint16
    assert counts.shape == (LAYERS, len(profile.tokens), NEURONS)
    for segment, (low, high) in enumerate(pairwise(bounds)):
        np.testing.assert_array_equal(counts[:, segment], fired[:, low:high].sum(1))


@pytest.mark.parametrize("tokens", [1, 31, 32, 33, 288, SEGMENTS * SEGMENT_TOKENS])
def test_segments_of_equal_length(tokens: int) -> None:
    fired = random_firing(tokens)
    profile = counted(fired)
    assert_counts(profile, fired)
    assert profile.tokens == [min(SEGMENT_TOKENS, tokens - at) for at in range(0, tokens, SEGMENT_TOKENS)]


@pytest.mark.parametrize("step", [1, 7, 50, 288])
def test_the_pieces_do_not_matter(step: int) -> None:
    fired = random_firing(3000)
    whole, parts = counted(fired), counted(*(fired[:, at : at + step] for at in range(0, 3000, step)))
    assert parts.tokens == whole.tokens
    np.testing.assert_array_equal(parts.counts, whole.counts)


@pytest.mark.parametrize("tokens", [2049, 5000, 20_000])
def test_a_long_text_stays_within_the_segments(tokens: int) -> None:
    """And they stay about equally long."""
    fired = random_firing(tokens)
    profile = counted(fired)
    assert_counts(profile, fired)
    assert SEGMENTS // 2 < len(profile.tokens) <= SEGMENTS
    assert max(profile.tokens) <= 4 * tokens / SEGMENTS


def test_a_text_begins_a_segment() -> None:
    pieces = [random_firing(tokens, seed=tokens) for tokens in (40, 5, 33)]
    profile = counted(*pieces, fresh=True)
    assert profile.tokens == [32, 8, 5, 32, 1]
    assert_counts(profile, np.concatenate(pieces, axis=1))


def test_counts_cannot_overflow() -> None:
    """As many tokens as there may be, each firing everything: a long text and many short ones after it."""
    always = np.ones((1, 20_000, 32), bool)
    for many in (0, 1, 40):
        profile = Profile(1, 32, 32, "relu")
        for _ in range((MAX_TOKENS - many * 20_000) // 20_000):
            profile.add(always)
        for _ in range(many * 500):
            profile.add(always[:, :40], fresh=True)
        assert sum(profile.tokens) == MAX_TOKENS
        np.testing.assert_array_equal(profile.counts, np.broadcast_to(np.array(profile.tokens)[:, None], (1, 64, 32)))


def test_what_is_made_of_the_counts() -> None:
    fired = random_firing(500)
    profile = counted(fired)
    rates = fired.mean(1)
    np.testing.assert_allclose(profile.rates(), rates)
    np.testing.assert_allclose(profile.group_firing(), fired.reshape(LAYERS, 500, 3, 32).sum(3).mean(1))
    np.testing.assert_allclose(profile.active(), rates[:, :FFN].mean(1))
    for part in (0.5, 0.8):
        for layer, share in enumerate(profile.hot_share(part)):
            most = np.sort(fired[layer].sum(0))[::-1]
            hot = round(share * FFN)
            assert most[:hot].sum() >= part * most.sum()
            assert most[: hot - 1].sum() < part * most.sum()


def test_nothing_fired() -> None:
    profile = counted(np.zeros((LAYERS, 10, NEURONS), bool))
    for values in (profile.rates(), profile.group_firing(), profile.active(), profile.hot_share()):
        assert not values.any()
    assert not Profile(LAYERS, NEURONS, FFN, "relu").rates().any(), "no token yet"


def test_it_is_restored_and_goes_on() -> None:
    """After segments were joined too, so that the next joins are the same."""
    fired = random_firing(4000)
    whole, first = counted(fired), counted(fired[:, :2900])
    again = Profile.restored(first.counts, FFN, first.facts)
    assert (again.ffn, again.texts) == (FFN, ["text"])
    again.add(fired[:, 2900:])
    assert again.tokens == whole.tokens
    np.testing.assert_array_equal(again.counts, whole.counts)


def test_reordered() -> None:
    profile = counted(random_firing(100))
    rng = np.random.default_rng(0)
    permutation = np.stack([rng.permutation(NEURONS) for _ in range(LAYERS)])
    other = profile.reordered(permutation)
    assert other.tokens == profile.tokens
    for layer, order in enumerate(permutation):
        np.testing.assert_array_equal(other.counts[layer], profile.counts[layer][:, order])
