"""The warm front: who computes what, decided again every few tokens from what fires and what the workers' jobs cost.

A layer takes as long as its slowest worker, so every layer is divided such that all finish together (`levels.py`), as
far as the copies at hand allow:

- Activity that is expected of a group blends its long run, which starts from the profile, with the last few tokens.
  Loads vary about that, so even means even up to a margin (`expectation.py`).
- *Flips* are free and come first: a cache that is too slow gives its least active groups home, one that is too fast
  takes the most active of its copies back. Only layers that are off balance by more than a band are touched, and a new
  copy is taken up as soon as it is there.
- *Promotions* bring the groups whose absence from the caches costs most, of all layers; none to a layer that is in
  balance, since a faster worker's larger share buys nothing there. With no slot free, one takes the slot of the copy
  that saves least, if it is better by a factor and pays the transfer back within a horizon: no pair swaps to and fro.
- *Moves between homes* take the most active groups of the slow home to the fast one, with the same accounting, where
  it was slow at the last decision too: a neighbour's short turn on one core is over before its groups have moved.

What is given up goes home before the copy into its slot begins. To keep slots free until copies have come costs more:
their groups would be missed always, what gives way is missed for a few tokens, and is little by definition.
"""

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from warmfront.coordinator.balancing.activity import ActivityEstimate, Margin
from warmfront.coordinator.balancing.baselines import Ema, Lru, Static
from warmfront.coordinator.balancing.interface import (
    BalancerState,
    Bools,
    Floats,
    Ints,
    Owners,
    Policy,
    Rebalance,
    decision_of,
    held_by,
    home_of,
)
from warmfront.coordinator.balancing.water_filling import fill, level, times
from warmfront.shared.errors import UsageError

__all__ = ["POLICIES", "Balance", "BalancerState", "Policy", "Rebalance", "Tuning", "make_policy"]

POLICIES = ("balance", "static", "lru", "ema")
_MOST_MOVES = 256  # of a decision, of each kind

Reals = npt.NDArray[np.floating]


class Tuning(NamedTuple):
    """What `Balance` weighs; the defaults are those that `scripts/simulate_balancing.py` found good."""

    every: int = 8  # tokens between decisions
    settled_every: int = 16  # at most, as long as nothing is to be changed
    rarest: int = 32  # tokens between decisions, however short a token is
    deciding: float = 0.01  # share of the time that decisions may take
    long_tokens: float = 512.0  # time constants of the averages and of how they are judged
    recent_tokens: float = 20.0
    trust_tokens: float = 16.0
    noise_tokens: float = 256.0
    band: float = 0.06  # a layer may take longer than in balance by this share
    margin: float = 0.09  # at most this share of a layer's time the homes should be done earlier
    better: float = 1.25  # as a copy that gives way, a new one saves
    horizon_tokens: float = 64.0  # by when a copy must have paid for itself


class _Picture(NamedTuple):
    """What a decision is made from, beside the owners."""

    situation: BalancerState
    home: Owners  # [L, G]
    expected: Floats  # bytes per token [L, G]
    order: Ints  # [L, G]: most active first
    more: Floats  # ns [W, L] by which workers should be done before the others

    def even(self, total: Floats, caps: Floats | None = None) -> Floats:
        """Bytes [W, L] of the even split of `total` [L]."""
        return level(self.situation.costs, total, caps, self.more)

    def times(self, loads: Floats) -> Floats:
        """ns [W, L], to be compared with each other."""
        return times(self.situation.costs, loads) + self.more

    def loads(self, owner: Owners) -> Floats:
        """Bytes per token [W, L] that each worker is expected to read."""
        workers = range(len(self.situation.homes))
        return np.stack([np.where(owner == worker, self.expected, 0.0).sum(1) for worker in workers])

    def fill(self, limit: Floats, allowed: Bools) -> Bools:
        """Of those `allowed` [L, G], in each layer the most active up to `limit` [L] bytes."""
        return fill(self.expected, self.order, limit, allowed)


class Balance:
    """Keeps every layer even, and the caches filled with what saves most."""

    name = "balance"

    def __init__(self, long_run: Floats, tuning: Tuning | None = None) -> None:
        tuning = tuning or Tuning()
        self.tuning = tuning
        self.every = tuning.every
        self._expectation = ActivityEstimate(long_run, tuning.long_tokens, tuning.recent_tokens, tuning.trust_tokens)
        self._margin = Margin(len(long_run), tuning.noise_tokens)
        self._before: Bools | None = None  # copies at the last decision
        self._slow: Bools = np.zeros((1, 1), np.bool_)  # homes [H, L] that were slow at the last decision

    def observe(self, bytes_read: Reals, active: Reals) -> None:
        """Learn what is read."""
        self._expectation.observe(bytes_read)
        self._margin.observe(bytes_read)

    def decide(self, situation: BalancerState) -> Rebalance:
        """Flips, then the copies to begin and what gives way to them."""
        before = situation.resident if self._before is None else self._before
        arrived = situation.resident & ~before
        self._before = situation.resident.copy()
        home = home_of(situation)
        for worker in np.flatnonzero(situation.homes):
            home[arrived[worker]] = worker
        owner = np.where(situation.homes[situation.owner], home, situation.owner)
        owner = np.where(held_by(situation.resident, owner), owner, home)
        expected = self._expectation.bytes
        even = times(situation.costs, level(situation.costs, expected.sum(1))).max(0)
        more = np.where(situation.homes[:, None], np.minimum(self._margin.ns, self.tuning.margin * even), 0.0)
        picture = _Picture(situation, home, expected, np.argsort(-expected, axis=1), more)

        self._flip(picture, owner, arrived)
        budget = 0 if situation.late else min(situation.budget, _MOST_MOVES)
        ahead = _ahead(situation, owner)
        drops, promotions, gains = self._promote(picture, ahead, budget)
        ahead[promotions[:, 1], promotions[:, 2]] = promotions[:, 0]
        moves, savings = self._move(picture, ahead)
        best = np.argsort(-np.concatenate((gains, savings)), kind="stable")[:budget]
        # With a promotion that the budget leaves out goes the drop made for it.
        made = drops[best[best < len(drops)]]
        decision = decision_of(owner, home, [made[made[:, 0] >= 0]], [np.concatenate((promotions, moves))[best]])
        self._margin.watch(situation, decision.owner)
        quiet = not len(decision.moves) and not situation.coming.any() and not self._slow.any()
        settled = quiet and (decision.owner == situation.owner).all()
        every = min(2 * self.every, self.tuning.settled_every) if settled else self.tuning.every
        self.every = max(every, min(self.tuning.rarest, int(situation.decision_tokens / self.tuning.deciding)))
        return decision

    def _flip(self, picture: _Picture, owner: Owners, arrived: Bools) -> None:
        """Change `owner` where copies at hand allow a better balance."""
        situation, homes = picture.situation, picture.situation.homes
        at_home = picture.home == np.arange(len(homes))[:, None, None]
        held = np.where(homes[:, None, None], at_home, situation.resident)
        even = picture.even(picture.expected.sum(1), (held * picture.expected).sum(2))
        loads = picture.loads(owner)
        limit = picture.times(even).max(0) * (1 + self.tuning.band)
        now = picture.times(loads)
        uneven = now.max(0) > limit
        if not (uneven.any() or arrived.any()):
            return
        for worker in np.flatnonzero(~homes):
            takes = situation.resident[worker] & homes[owner] & (uneven[:, None] | arrived[worker])
            takes = picture.fill(even[worker] - loads[worker], takes)
            mine = (owner == worker) & (now[worker] > limit)[:, None]
            # The most active that make up the even load stay.
            gives = mine & ~picture.fill(even[worker], mine)
            owner[takes] = worker
            owner[gives] = picture.home[gives]

    def _promote(self, picture: _Picture, ahead: Owners, budget: int) -> tuple[Ints, Ints, Floats]:
        """Drops and promotions in pairs, [n, 3] each (a drop of worker -1 is none), and what each saves, ns a token."""
        situation, home, expected = picture.situation, picture.home, picture.expected
        homes = situation.homes
        loads, even = picture.loads(ahead), picture.even(expected.sum(1))
        limit = picture.times(even).max(0) * (1 + self.tuning.band)
        slow = homes[:, None] & (picture.times(loads) > limit)
        if not budget or homes.all() or not slow.any():
            return _table([]), _table([]), np.empty(0)
        room = np.where(homes[:, None], 0.0, even - loads)
        held = np.asarray((situation.resident | situation.coming)[~homes].any(0))
        wanted = ~held & slow[home, np.arange(len(home))[:, None]]
        wanted = picture.fill(np.maximum(room, 0).sum(0), wanted)
        # What a copy saves: its bytes at its home's pace. What lies beyond the balance saves nothing.
        saves = expected * situation.costs[home, 1]
        needed = picture.fill(even[~homes].sum(0) * (1 + self.tuning.band), held)
        candidates = _largest(np.where(wanted, saves, 0.0), budget)
        worth = np.where(needed, saves, 0.0)
        givers = {worker: _givers(situation, worker, worth, budget) for worker in np.flatnonzero(~homes).tolist()}
        drops, moves, gains = [], [], []
        for layer, group in candidates:
            saved = saves[layer, group]
            while givers:
                worker = max(givers, key=lambda worker: room[worker, layer])
                value, giver = givers[worker][0] if givers[worker] else (np.inf, (-1, 0, 0))
                gain = saved - value
                if saved > self.tuning.better * value and gain * self.tuning.horizon_tokens > situation.transfer_ns:
                    givers[worker].pop(0)
                    drops.append(giver)
                    moves.append((worker, layer, group))
                    gains.append(gain)
                    room[worker, layer] -= expected[layer, group]
                    break
                # What comes next saves less, and this worker's next copy more.
                del givers[worker]
        return _table(drops), _table(moves), np.array(gains)

    def _move(self, picture: _Picture, ahead: Owners) -> tuple[Ints, Floats]:
        """Copies to begin from home to home, [n, 3], and what each saves, ns a token."""
        situation, expected = picture.situation, picture.expected
        homes = np.flatnonzero(situation.homes)
        if len(homes) < 2:
            return _table([]), np.empty(0)
        costs, loads = situation.costs[homes], picture.loads(ahead)[homes]
        even = level(costs, loads.sum(0))
        limit = times(costs, even).max(0) * (1 + self.tuning.band)
        now = times(costs, loads) > limit
        slow = now & self._slow
        self._slow = now
        receiver = (even - loads).argmax(0)
        room = (even - loads).max(0)
        # A group with a copy in a cache, or under way, stays.
        movable = ~situation.coming.any(0) & ~situation.resident[~situation.homes].any(0)
        moves, savings = [], []
        for number, worker in enumerate(homes):
            mine = movable & (ahead == worker) & slow[number, :, None]
            mine &= expected * costs[number, 1] * self.tuning.horizon_tokens > situation.transfer_ns
            layer, group = np.nonzero(picture.fill(np.minimum(loads[number] - even[number], room), mine))
            moves.append(np.column_stack((homes[receiver[layer]], layer, group)))
            savings.append(expected[layer, group] * costs[number, 1])
        table, saved = np.concatenate(moves), np.concatenate(savings)
        best = np.argsort(-saved, kind="stable")
        begun = [best[table[best, 0] == worker][: situation.free[worker]] for worker in homes]
        chosen = np.concatenate(begun)[:_MOST_MOVES]
        return table[chosen], saved[chosen]


def _ahead(situation: BalancerState, owner: Owners) -> Owners:
    """The owners once the copies under way have come."""
    ahead = owner.copy()
    for worker, home in enumerate(situation.homes):
        ahead[situation.coming[worker] & (situation.homes[ahead] | ~home)] = worker
    return ahead


def _largest(values: Floats, count: int) -> list[tuple[int, int]]:
    """(layer, group) of the `count` largest `values` [L, G] above 0, largest first."""
    layer, group = np.nonzero(values)
    order = np.argsort(-values[layer, group], kind="stable")[:count]
    return list(zip(layer[order].tolist(), group[order].tolist(), strict=True))


def _givers(
    situation: BalancerState, worker: int, values: Floats, count: int
) -> list[tuple[float, tuple[int, int, int]]]:
    """Up to `count` (value, copy) in `worker`: free slots (no copy: -1), then its copies that are worth least."""
    free = min(int(situation.free[worker]), count)
    layer, group = np.nonzero(situation.resident[worker])
    value = values[layer, group]
    order = np.argsort(value, kind="stable")[: count - free]
    copies = ((worker, *place) for place in zip(layer[order].tolist(), group[order].tolist(), strict=True))
    return [(0.0, (-1, 0, 0))] * free + list(zip(value[order].tolist(), copies, strict=True))


def _table(rows: list[tuple[int, int, int]]) -> Ints:
    return np.array(rows, np.int64).reshape(-1, 3)


def make_policy(name: str, long_run: Floats, group_bytes: int) -> Policy:
    """One of POLICIES. `long_run` [L, G]: bytes per token to expect, from the profile; `group_bytes`: of a copy.

    Raises UsageError for another name.
    """
    if name == "balance":
        return Balance(long_run)
    if name == "static":
        return Static()
    if name == "lru":
        return Lru(long_run)
    if name == "ema":
        return Ema(long_run, group_bytes)
    raise UsageError(f"no policy {name!r}: choose one of {', '.join(POLICIES)}")
