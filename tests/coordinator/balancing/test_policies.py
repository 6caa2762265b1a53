"""What holds for every policy of the registry.  pytest tests/coordinator/balancing/test_policies.py

A new policy is tested here as soon as it is registered; what it alone does belongs in a file of its own, as in
test_balance.py and test_baselines.py.
"""

import numpy as np
import pytest

from tests.coordinator.balancing.world import GROUP_BYTES, World, policy_for, skewed
from warmfront.coordinator.balancing.interface import PromptLoad
from warmfront.coordinator.balancing.policies import POLICIES, make_policy
from warmfront.shared import config
from warmfront.shared.errors import UsageError


def test_the_command_line_offers_the_policies_of_the_registry() -> None:
    assert tuple(POLICIES) == config.POLICIES


def test_another_name_is_refused() -> None:
    with pytest.raises(UsageError, match=", ".join(POLICIES)):
        make_policy("best", np.ones((1, 1)), 1)


@pytest.mark.parametrize("name", POLICIES)
@pytest.mark.parametrize(("homes", "caches", "slots"), [(1, 1, 20), (1, 1, 150), (2, 0, 0), (2, 3, 15), (1, 8, 6)])
def test_rules_hold_whatever_fires(name: str, homes: int, caches: int, slots: int) -> None:
    world = World(skewed(), caches, slots, homes)
    world.budget = 7
    policy = policy_for(name, world)
    assert policy.name == name
    for seed in range(4):
        world.rates = skewed(seed)
        world.costs[:, 1] = world.rng.uniform(0.01, 0.3, world.workers)
        policy.read(PromptLoad(3, GROUP_BYTES * world.rates))
        world.run(policy, 48)


@pytest.mark.parametrize("name", POLICIES)
@pytest.mark.parametrize(("homes", "caches", "slots"), [(1, 0, 0), (2, 1, 0), (1, 1, 4)])
def test_no_activity_no_budget_and_no_slots_are_borne(name: str, homes: int, caches: int, slots: int) -> None:
    world = World(np.zeros_like(skewed()), caches, slots, homes)
    world.budget = 0
    world.run(policy_for(name, world), 40)
    assert world.moves == 0


@pytest.mark.parametrize("name", POLICIES)
def test_the_same_inputs_give_the_same_decisions(name: str) -> None:
    owners = []
    for _ in range(2):
        world = World(skewed(), 1, 20)
        policy = policy_for(name, world)
        world.rates = skewed(5)
        world.run(policy, 64)
        owners.append(world.owner)
    np.testing.assert_array_equal(*owners)
