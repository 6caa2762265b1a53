"""Policies to compare with.  pytest tests/coordinator/balancing/test_baselines.py"""

import numpy as np
import pytest

from tests.coordinator.balancing.world import GROUP_BYTES, GROUPS, LAYERS, World, policy_for, skewed, used
from warmfront.coordinator.balancing.interface import PromptLoad
from warmfront.coordinator.balancing.policies import make_policy


def test_static_changes_nothing() -> None:
    world = World(skewed(), 1, 20)
    world.rates = skewed(1)
    decision = policy_for("static", world).decide(world.state())
    np.testing.assert_array_equal(decision.owner, world.owner)
    assert decision.drops.shape == decision.moves.shape == (0, 3)


def test_lru_takes_in_what_was_used_for_what_was_used_longest_ago() -> None:
    world = World(skewed(), 1, 3)
    world.rates = np.zeros((LAYERS, GROUPS))
    world.rates[0, :3] = world.rates[1, 5] = 1.0
    world.resident[1], world.owner[:] = False, 0
    for place in ((2, 0), (2, 1), (0, 1)):
        world.resident[1][place], world.owner[place] = True, 1
    policy = make_policy("lru", np.zeros((LAYERS, GROUPS)), GROUP_BYTES)
    counts = np.zeros((LAYERS, GROUPS), int)
    counts[2, 1] = 16
    policy.observe(used(counts))
    policy.observe(world.draw())
    decision = policy.decide(world.state())
    # Three are wanted, (0, 1) is there and in use: two places, the one never used first.
    assert decision.drops.tolist() == [[1, 2, 0], [1, 2, 1]]
    assert {tuple(move) for move in decision.moves.tolist()} <= {(1, 0, 0), (1, 0, 2), (1, 1, 5)}
    assert len(decision.moves) == 2
    assert decision.owner[0, 1] == 1


def test_ema_holds_the_best_of_each_layer() -> None:
    world = World(skewed(), 1, 40)
    world.rates = skewed(1)
    slots = world.resident[1].sum(1)
    policy = policy_for("ema", world)
    world.noisy = False
    world.run(policy, 60)
    for layer in range(LAYERS):
        best = np.sort(np.rint(32 * world.rates[layer]))[::-1][: slots[layer]]
        held = np.sort(np.rint(32 * world.rates[layer][world.resident[1, layer]]))[::-1]
        np.testing.assert_array_equal(held, best)


def test_the_published_budget_of_swaps_ends_at_one_a_layer_and_the_mended_one_rises_again() -> None:
    begun = {}
    for name in ("ema", "ema-published"):
        world, counts = World(skewed(), 1, 40), []
        policy = policy_for(name, world)
        for token in range(200):
            # Of another topic each time, so there is always something to swap; late for the first half.
            policy.observe(used(np.rint(32 * skewed(token)).astype(int)))
            decision = policy.decide(world.state()._replace(copies_late=token < 100))
            counts.append(len(decision.moves))
        begun[name] = counts
    assert max(counts[100:]) == LAYERS
    assert begun["ema"][99] <= 2 * LAYERS
    assert begun["ema"][-1] > 3 * LAYERS


def test_by_layer_is_another_beginning_of_static() -> None:
    world = World(skewed(), 1, 20)
    decision = policy_for("by-layer", world).decide(world.state())
    np.testing.assert_array_equal(decision.owner, world.owner)
    assert decision.drops.shape == decision.moves.shape == (0, 3)


def test_prompt_takes_what_the_last_prompt_has_read_most_and_keeps_it() -> None:
    world = World(skewed(), 1, 20)
    world.budget = 8
    policy = policy_for("prompt", world)
    before = world.resident.copy()
    world.run(policy, 4)
    np.testing.assert_array_equal(world.resident, before)
    for seed in (1, 2):
        # Two jobs, of which the larger one counts for more; all that is decoded is of another topic.
        jobs = [PromptLoad(tokens, GROUP_BYTES * skewed(seed + part)) for part, tokens in ((0, 90), (5, 10))]
        for job in jobs:
            policy.read(job)
            nothing = policy.decide(world.state())  # between two jobs of a prompt
            assert len(nothing.moves) == len(nothing.drops) == 0
        world.run(policy, 12)
        read = sum(job.tokens * job.bytes_read for job in jobs)
        assert world.resident[1].sum() == 20
        np.testing.assert_allclose(np.sort(read[world.resident[1]]), np.sort(read, axis=None)[-20:])
        np.testing.assert_array_equal(world.owner == 1, world.resident[1])
        moves = world.moves
        assert policy.interval > 1000
        world.run(policy, 5)
        assert world.moves == moves


def test_of_groups_that_a_prompt_reads_alike_those_that_are_there_stay() -> None:
    world = World(skewed(), 1, 20)
    policy = policy_for("prompt", World(np.ones_like(skewed()), 1, 20))
    policy.read(PromptLoad(10, np.ones((LAYERS, GROUPS))))
    world.run(policy, 4)
    assert world.moves == 0


def test_ema_takes_a_prompt_for_its_tokens() -> None:
    world = World(skewed(), 1, 20)
    policies = [policy_for("ema", world) for _ in range(2)]
    token = used(np.rint(32 * skewed(1)).astype(int))
    for _ in range(3):
        policies[0].observe(token)
    policies[1].read(PromptLoad(3, token.bytes_read()))
    decisions = [policy.decide(world.state()) for policy in policies]
    assert len(decisions[0].moves) > 0
    np.testing.assert_array_equal(decisions[0].moves, decisions[1].moves)


@pytest.mark.parametrize(("name", "learns"), [("ema", True), ("ema-published", False), ("lru", False)])
def test_what_others_published_learns_from_decoded_tokens(name: str, learns: bool) -> None:
    world = World(skewed(), 1, 20)
    moves = []
    for prompted in (False, True):
        policy = policy_for(name, world)
        if prompted:
            policy.read(PromptLoad(8, GROUP_BYTES * skewed(5)))
        policy.observe(used(np.rint(32 * skewed(1)).astype(int)))
        moves.append(policy.decide(world.state()).moves.tolist())
    assert (moves[0] != moves[1]) is learns


def test_core_takes_the_groups_with_the_most_neurons_of_a_core_and_keeps_them_until_it_is_another() -> None:
    world = World(skewed(), 1, 20)
    world.noisy, world.budget = False, 8
    policy = policy_for("core", world)
    for seed in (1, 2):
        world.rates = skewed(seed)
        world.run(policy, 12)
        counts = np.rint(32 * world.rates).astype(int)
        held = counts[world.resident[1]]
        assert world.resident[1].sum() == 20
        np.testing.assert_array_equal(np.sort(held), np.sort(counts, axis=None)[-20:])
        np.testing.assert_array_equal(world.owner == 1, world.resident[1])
        moves = world.moves
        world.run(policy, 5)
        assert world.moves == moves
