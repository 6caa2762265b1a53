"""Policies against a small world that does what they say.  pytest tests/coordinator/balancing/test_balance.py"""

from collections.abc import Callable

import numpy as np
import pytest

from warmfront.coordinator.balancing.balance import POLICIES, BalancerState, Policy, Rebalance, make_policy
from warmfront.coordinator.balancing.interface import budget_of
from warmfront.shared.errors import UsageError

LAYERS, GROUPS, GROUP_BYTES = 4, 48, 100_000
CPU, GPU = (5_000.0, 0.2), (20_000.0, 0.02)


class World:
    """Workers that hold copies; groups read `rates` [L, G] of their bytes on average, and a copy takes a decision."""

    def __init__(self, rates: np.ndarray, caches: int, slots: int, homes: int = 1, seed: int = 0) -> None:
        self.rates, self.rng = rates, np.random.default_rng(seed)
        self.workers = homes + caches
        self.homes = np.arange(self.workers) < homes
        self.costs = np.array([CPU] * homes + [GPU] * caches)
        self.home = np.tile(np.arange(GROUPS) * homes // GROUPS, (LAYERS, 1))
        self.resident = self.home == np.arange(self.workers)[:, None, None]
        # The groups that the profile has read most, dealt out to the caches.
        best = np.argsort(-rates, axis=None)[: slots * caches]
        for number, place in enumerate(best):
            self.resident[homes + number % caches].flat[place] = True
        self.owner = np.where(
            self.resident[homes:].any(0), self.resident[homes:].argmax(0) + homes if caches else 0, self.home
        ).astype(np.uint8)
        self.coming = np.zeros_like(self.resident)
        self.slots = np.array([LAYERS * GROUPS] * homes + [slots] * caches)
        self.flips = self.moves = 0
        self.budget = 1000
        self.noisy = True

    def free(self) -> np.ndarray:
        return self.slots - (self.resident | self.coming).sum((1, 2))

    def draw(self) -> tuple[np.ndarray, np.ndarray]:
        """Bytes read and share active: of 32 neurons a group, each by chance."""
        active = (self.rng.binomial(32, self.rates) if self.noisy else np.rint(32 * self.rates)) / 32
        return active * GROUP_BYTES, active

    def situation(self) -> BalancerState:
        return BalancerState(
            self.owner.copy(),
            self.resident.copy(),
            self.coming.copy(),
            self.free(),
            self.homes,
            self.costs,
            20_000.0,
            self.budget,
            False,
        )

    def land(self) -> None:
        """The copies under way have come; of two homes the new one stays."""
        for worker, layer, group in np.argwhere(self.coming):
            self.resident[worker, layer, group] = True
            if self.homes[worker]:
                old = self.home[layer, group]
                self.resident[old, layer, group] = False
                self.home[layer, group] = worker
                if self.owner[layer, group] == old:
                    self.owner[layer, group] = worker
        self.coming[:] = False

    def apply(self, decision: Rebalance) -> None:
        """Check the decision against the rules, then do it."""
        held = np.take_along_axis(self.resident, decision.owner[None].astype(int), 0)[0]
        assert held.all()
        for worker, layer, group in decision.drops:
            assert not self.homes[worker]
            assert self.resident[worker, layer, group]
            assert decision.owner[layer, group] != worker
            self.resident[worker, layer, group] = False
        assert len(np.unique(decision.drops, axis=0)) == len(decision.drops)
        self.flips += int((decision.owner != self.owner).sum())
        self.owner = decision.owner.copy()
        free, begun = self.free(), 0
        assert len(np.unique(decision.moves[:, 1:], axis=0)) == len(decision.moves)
        for worker, layer, group in decision.moves:
            assert not self.resident[worker, layer, group]
            assert not self.coming[:, layer, group].any()
            assert self.homes[worker] or not self.resident[~self.homes, layer, group].any()
            if free[worker] > 0 and begun < self.budget:
                self.coming[worker, layer, group] = True
                free[worker] -= 1
                begun += 1
        self.moves += begun

    def run(self, policy: Policy, tokens: int, after: Callable[[], None] | None = None) -> None:
        for token in range(tokens):
            policy.observe(*self.draw())
            if token % policy.every == policy.every - 1:
                self.land()
                self.apply(policy.decide(self.situation()))
                if after is not None:
                    after()

    def times(self) -> np.ndarray:
        """ns [W, L] that a token takes on average."""
        loads = np.stack([np.where(self.owner == w, self.rates * GROUP_BYTES, 0).sum(1) for w in range(self.workers)])
        return self.costs[:, :1] + self.costs[:, 1:] * loads

    def hit(self) -> float:
        return float(self.rates[~self.homes[self.owner]].sum() / self.rates.sum())


def skewed(seed: int = 0) -> np.ndarray:
    """Rates of which a fifth of the groups has most."""
    rng = np.random.default_rng(seed)
    rates = 0.8 / (1 + 8 * np.arange(GROUPS) / GROUPS) ** 1.5
    return np.stack([rng.permutation(rates) for _ in range(LAYERS)])


def policy_for(name: str, world: World) -> Policy:
    return make_policy(name, world.rates * GROUP_BYTES, GROUP_BYTES)


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
        world.run(policy, 48)


def test_static_changes_nothing() -> None:
    world = World(skewed(), 1, 20)
    world.rates = skewed(1)
    decision = policy_for("static", world).decide(world.situation())
    np.testing.assert_array_equal(decision.owner, world.owner)
    assert decision.drops.shape == decision.moves.shape == (0, 3)


def test_another_name_is_refused() -> None:
    with pytest.raises(UsageError, match="balance, static, lru, ema"):
        make_policy("best", np.ones((1, 1)), 1)


def test_lru_takes_in_what_was_used_for_what_was_used_longest_ago() -> None:
    world = World(skewed(), 1, 3)
    world.rates = np.zeros((LAYERS, GROUPS))
    world.rates[0, :3] = world.rates[1, 5] = 1.0
    world.resident[1], world.owner[:] = False, 0
    for place in ((2, 0), (2, 1), (0, 1)):
        world.resident[1][place], world.owner[place] = True, 1
    policy = make_policy("lru", np.zeros((LAYERS, GROUPS)), GROUP_BYTES)
    used = np.zeros((LAYERS, GROUPS))
    used[2, 1] = 0.5
    policy.observe(used, used)
    policy.observe(*world.draw())
    decision = policy.decide(world.situation())
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
        policy.observe(*world.draw())
    assert len(policy.decide(world.situation()).moves) > 5
    dear = world.situation()._replace(transfer_ns=1e9)
    assert len(policy.decide(dear).moves) == 0
    assert len(policy.decide(world.situation()._replace(late=True)).moves) == 0
    assert len(policy.decide(world.situation()._replace(budget=3)).moves) == 3


def test_balance_moves_between_homes_only_what_is_late_twice() -> None:
    world = World(np.full((LAYERS, GROUPS), 0.3), 0, 0, homes=2)
    policy, even = policy_for("balance", world), world.costs
    late = even * [[1], [3]]
    for costs, moves in ((late, False), (even, False), (late, False), (late, True)):
        begun = policy.decide(world.situation()._replace(costs=costs)).moves
        assert bool(len(begun)) == moves
        assert policy.every == 8 or costs is even


def test_balance_decides_the_less_often_the_more_of_a_tokens_time_it_takes() -> None:
    world = World(skewed(), 1, 20)
    policy = policy_for("balance", world)
    for tokens, every in ((0.2, 20), (5.0, 32)):
        policy.decide(world.situation()._replace(decision_tokens=tokens))
        assert policy.every == every
    policy.decide(world.situation()._replace(decision_tokens=0.01))
    assert policy.every <= 16


@pytest.mark.parametrize(
    ("until_next_ns", "moving", "budget"), [(100e6, 0, 25), (100e6, 9, 16), (1e6, 0, 16), (1e6, 20, 0)]
)
def test_copies_get_a_quarter_of_the_time_or_a_batch(until_next_ns: float, moving: int, budget: int) -> None:
    assert budget_of(until_next_ns, 1e6, moving) == budget
