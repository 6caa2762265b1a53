"""The estimate of activity and the homes' margin.  pytest tests/coordinator/balancing/test_activity.py"""

import numpy as np
import pytest

from tests.coordinator.balancing.world import used
from warmfront.coordinator.balancing.activity import ActivityEstimate, Margin
from warmfront.coordinator.balancing.interface import BalancerState, PromptLoad

SHAPE = (4, 50)


def rates(seed: int) -> np.ndarray:
    """How likely each group's neurons fire: a few groups' very."""
    return np.random.default_rng(seed).beta(0.3, 1.5, SHAPE)


def bytes_of(chances: np.ndarray) -> np.ndarray:
    return used(np.full(SHAPE, 32)).bytes_read() * chances


def expected(estimate: ActivityEstimate) -> np.ndarray:
    return sum(part * average for part, average in zip(estimate.blend, estimate.averages[:2], strict=True))


def error(estimate: ActivityEstimate, chances: np.ndarray) -> float:
    true = bytes_of(chances)
    return float(np.linalg.norm(expected(estimate) - true) / np.linalg.norm(true))


def test_while_nothing_changes_the_long_run_is_expected() -> None:
    rng, true = np.random.default_rng(0), rates(1)
    estimate = ActivityEstimate(bytes_of(true), 512, 20, 16)
    errors, noise = [], []
    for _ in range(300):
        counts = rng.binomial(32, true)
        estimate.observe(used(counts))
        errors.append(error(estimate, true))
        noise.append(np.linalg.norm(counts / 32 - true) / np.linalg.norm(true))
    # An average over 20 tokens alone would be off by 1 / sqrt(40) of a token's noise.
    assert np.mean(errors) < 0.5 / np.sqrt(40) * np.mean(noise)


def test_after_a_change_the_last_tokens_are() -> None:
    rng, true = np.random.default_rng(0), rates(2)
    estimate = ActivityEstimate(bytes_of(rates(1)), 512, 20, 16)
    before = error(estimate, true)
    for token in range(64):
        estimate.observe(used(rng.binomial(32, true)))
        if token == 31:
            # The last tokens know all but exp(-32 / 20), and are trusted.
            assert error(estimate, true) < 0.4 * before
    assert error(estimate, true) < 0.3 * before


def test_a_prompt_counts_as_its_tokens() -> None:
    """All alike they leave the same averages, and the products that go with them: later tokens are judged the same."""
    rng, counts = np.random.default_rng(0), rng_counts(3)
    first, second = (ActivityEstimate(bytes_of(rates(1)), 50, 20, 16) for _ in range(2))
    for _ in range(30):
        drawn = used(rng.binomial(32, rates(1)))
        first.observe(drawn)
        second.observe(drawn)
    for _ in range(25):
        first.observe(used(counts))
    second.read(PromptLoad(25, used(counts).bytes_read()))
    for ours, theirs, scale in zip(second.averages[:2], first.averages[:2], first.averages.scales, strict=True):
        np.testing.assert_allclose(ours, scale * theirs, rtol=1e-4, atol=1)
    np.testing.assert_allclose(second.averages.dots, first.averages.dots, rtol=1e-4)


@pytest.mark.parametrize(("topic", "trusted"), [(1, False), (2, True)])
def test_behind_a_prompt_its_own_is_expected_where_it_is_another_topic(topic: int, trusted: bool) -> None:
    rng, long = np.random.default_rng(0), bytes_of(rates(1))
    # Whole groups are used, as of experts, or not at all.
    estimate = ActivityEstimate(long, 512, 20, 16, unit=float(used(np.full(SHAPE, 32)).bytes_read().max()))
    tokens = 32 * (rng.random((100, *SHAPE)) < rates(topic))
    estimate.read(PromptLoad(100, np.mean([used(counts).bytes_read() for counts in tokens], axis=0)))
    long_part, short_part = estimate.blend
    assert (short_part > 0.8) if trusted else (short_part < 0.2)
    assert long_part + short_part == pytest.approx(1)
    assert error(estimate, rates(topic)) < 0.25


def rng_counts(seed: int) -> np.ndarray:
    """Of one token, by chance."""
    return np.random.default_rng(seed).binomial(32, rates(seed))


def test_what_few_groups_are_used_for_counts_as_in_averages_of_all() -> None:
    """Against the averages and the regression, written out over all groups."""
    rng = np.random.default_rng(5)
    long, kept = bytes_of(rates(1)), [1 - 1 / tokens for tokens in (50, 20, 16)]
    short, cross, square = long.copy(), 0.0, 0.0
    estimate = ActivityEstimate(long, 50, 20, 16)
    for token in range(1500):
        # Long after a change, and few groups at a time: blocks of none, and parts of blocks.
        counts = np.where(rng.random(SHAPE) < 0.1, rng.binomial(32, rates(2 + token // 700)), 0)
        counts[:, 16:40] *= rng.random() < 0.3
        read = used(counts).bytes_read()
        estimate.observe(used(counts))
        cross = kept[2] * cross + (1 - kept[2]) * ((short - long) * (read - long)).sum()
        square = kept[2] * square + (1 - kept[2]) * ((short - long) ** 2).sum()
        long, short = kept[0] * long + (1 - kept[0]) * read, kept[1] * short + (1 - kept[1]) * read
        if token % 50 == 49:
            trust = min(max(cross / square, 0), 1)
            np.testing.assert_allclose(expected(estimate), long + trust * (short - long), rtol=1e-3, atol=1)


def state(costs: list[tuple[float, float]], homes: int) -> BalancerState:
    held = np.ones((len(costs), *SHAPE), bool)
    none = np.zeros(len(costs), np.int64)
    is_home = np.arange(len(costs)) < homes
    nobody = np.zeros(SHAPE, np.uint8)
    return BalancerState(nobody, nobody, held, held, none, is_home, np.array(costs), 1.0, 0, False)


@pytest.mark.parametrize("ratio", [2.0, 4.0, 20.0])
def test_no_other_margin_makes_the_mean_layer_faster(ratio: float) -> None:
    rng = np.random.default_rng(3)
    now = state([(0.0, 0.2), (0.0, 0.2 / ratio)], 1)
    owner = np.zeros(SHAPE, np.uint8)
    owner[:, 25:] = 1
    estimate, margin = ActivityEstimate(np.ones(SHAPE), 512, 20, 16), Margin(SHAPE[0], 1000)
    estimate.watch(now, owner)
    margin.watch(now)
    counts = rng.binomial(32, 0.3, (2000, *SHAPE))
    for each in counts:
        margin.observe(estimate.observe(used(each)))
    bytes_read = used(counts).bytes_read()
    home, cache = 0.2 * bytes_read[:, 0, :25].sum(1), 0.2 / ratio * bytes_read[:, 0, 25:].sum(1)

    def mean_time(ahead: float) -> float:
        """With bytes moved such that the home is `ahead` ns earlier than the cache."""
        moved = (home.mean() - cache.mean() + ahead) / (0.2 + 0.2 / ratio)
        return float(np.maximum(home - 0.2 * moved, cache + 0.2 / ratio * moved).mean())

    best = min(mean_time(ahead) for ahead in np.linspace(-1, 2, 601) * home.std())
    found = margin.ns(np.full(SHAPE[0], 1e9), np.full(SHAPE[0], 1e9), 1.0)
    assert found.shape == SHAPE[:1]
    assert mean_time(found[0]) - best < 0.05 * (mean_time(0.0) - best)


def test_workers_alone_need_no_margin() -> None:
    estimate, margin = ActivityEstimate(np.ones(SHAPE), 512, 20, 16), Margin(SHAPE[0], 64)
    for homes in (0, 2):
        if homes:
            now = state([(0.0, 0.2), (0.0, 0.1)], homes)
            estimate.watch(now, np.zeros(SHAPE, np.uint8))
            margin.watch(now)
        for token in range(20):
            margin.observe(estimate.observe(used(np.random.default_rng(token).binomial(32, 0.5, SHAPE))))
        assert not margin.ns(np.ones(SHAPE[0]), np.ones(SHAPE[0]), 1.0).any()


@pytest.mark.parametrize(("lumps", "share"), [(40, 0.09), (4, 0.6), (1, 1.0)])
def test_a_margin_is_capped_unless_loads_come_in_lumps(lumps: int, share: float) -> None:
    """Homes read 40 groups with a chance of a tenth each, in so many lumps; caches are much faster."""
    rng, now = np.random.default_rng(1), state([(0.0, 0.2), (0.0, 0.002)], 1)
    estimate, margin = ActivityEstimate(np.ones(SHAPE), 512, 20, 16), Margin(SHAPE[0], 1000)
    estimate.watch(now, np.zeros(SHAPE, np.uint8))
    margin.watch(now)
    for _ in range(500):
        counts = np.zeros(SHAPE, int)
        counts[:, :40] = np.repeat(32 * (rng.random((SHAPE[0], lumps)) < 0.1), 40 // lumps, axis=1)
        margin.observe(estimate.observe(used(counts)))
    group_ns = 0.2 * used(np.full(SHAPE, 32)).bytes_read()[0, 0]
    # A layer takes as long as 20 groups at home, which read 4 on average: lumps of 10 fit twice, one of 40 does not.
    found = margin.ns(np.full(SHAPE[0], 20 * group_ns), np.full(SHAPE[0], 4 * group_ns), 0.09) / (20 * group_ns)
    np.testing.assert_allclose(found, share, rtol=0.35)
