"""The warm front's own policy in a small world.  pytest tests/coordinator/balancing/test_balance.py"""

import numpy as np
import pytest

from tests.coordinator.balancing.world import GROUPS, LAYERS, World, policy_for, skewed


@pytest.mark.parametrize(("homes", "caches", "slots"), [(1, 1, 20), (1, 1, 150), (2, 1, 30), (1, 2, 20)])
def test_balance_comes_to_rest(homes: int, caches: int, slots: int) -> None:
    world = World(skewed(), caches, slots, homes)
    policy = policy_for("balance", world)
    world.run(policy, 300)
    world.flips = world.moves = 0
    world.run(policy, 800)
    # Under 1 % of the groups in 100 tokens.
    assert world.moves < 0.01 * 8 * LAYERS * GROUPS
    assert world.flips < 0.01 * 8 * LAYERS * GROUPS


@pytest.mark.parametrize("caches", [1, 2])
def test_balance_follows_a_switch_of_what_fires(caches: int) -> None:
    world = World(skewed(), caches, 24 // caches)
    policy = policy_for("balance", world)
    world.run(policy, 200)
    steady = world.hit()
    world.rates = skewed(9)
    assert world.hit() < 0.6 * steady
    world.run(policy, 64)
    assert world.hit() > 0.95 * steady


def test_balance_stops_at_the_balance_point() -> None:
    world = World(skewed(), 1, LAYERS * GROUPS)
    policy = policy_for("balance", world)
    world.run(policy, 100)
    times = world.times()
    assert (times.max(0) / times.mean(0)).max() < 1.1
    assert set(np.unique(world.owner)) == {0, 1}


def test_balance_follows_a_shift_of_the_load_and_back() -> None:
    world = World(skewed(), 1, LAYERS * GROUPS)
    policy = policy_for("balance", world)
    world.run(policy, 100)
    before = world.hit()
    world.costs[1, 1] *= 10
    world.run(policy, 64)
    assert (world.times().max(0) / world.times().mean(0)).max() < 1.1
    assert world.hit() < 0.8 * before
    world.costs[1, 1] /= 10
    moves = world.moves
    world.run(policy, 64)
    assert world.hit() == pytest.approx(before, rel=0.05)
    # What went home left its copy behind.
    assert world.moves == moves


def test_balance_evens_out_homes_of_different_speed() -> None:
    world = World(skewed(), 0, 0, homes=2)
    policy = policy_for("balance", world)
    world.costs[1, 1] *= 2
    world.run(policy, 200)
    assert (world.times().max(0) / world.times().mean(0)).max() < 1.1
    assert world.moves < LAYERS * GROUPS / 4
    world.moves = 0
    world.run(policy, 200)
    assert world.moves < 0.01 * 2 * LAYERS * GROUPS + 1


def test_balance_begins_nothing_that_does_not_pay() -> None:
    world = World(skewed(), 1, 20)
    policy = policy_for("balance", world)
    world.rates = skewed(3)
    for _ in range(100):
        policy.observe(world.draw())
    assert len(policy.decide(world.state()).moves) > 5
    dear = world.state()._replace(transfer_ns=1e9)
    assert len(policy.decide(dear).moves) == 0
    assert len(policy.decide(world.state()._replace(copies_late=True)).moves) == 0
    assert len(policy.decide(world.state()._replace(copy_budget=3)).moves) == 3


def test_balance_moves_between_homes_only_what_is_late_twice() -> None:
    world = World(np.full((LAYERS, GROUPS), 0.3), 0, 0, homes=2)
    policy, even = policy_for("balance", world), world.costs
    late = even * [[1], [3]]
    for costs, moves in ((late, False), (even, False), (late, False), (late, True)):
        begun = policy.decide(world.state()._replace(costs=costs)).moves
        assert bool(len(begun)) == moves
        assert policy.interval == 8 or costs is even


def test_balance_decides_the_less_often_the_more_of_a_tokens_time_it_takes() -> None:
    world = World(skewed(), 1, 20)
    policy = policy_for("balance", world)
    for tokens, every in ((0.0605, 20), (5.0, 64)):
        policy.decide(world.state()._replace(decision_tokens=tokens))
        assert policy.interval == every
    policy.decide(world.state()._replace(decision_tokens=0.01))
    assert policy.interval <= 16


def test_balance_observes_the_less_often_the_more_of_a_tokens_time_it_takes() -> None:
    world = World(skewed(), 1, 20)
    policy = policy_for("balance", world)
    for tokens, every in ((0.0, 1), (0.002, 1), (0.007, 3), (1.0, 32)):
        policy.decide(world.state()._replace(observation_tokens=tokens))
        assert policy.stride == every
