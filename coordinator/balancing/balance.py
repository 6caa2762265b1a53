"""The warm front's own policy: every few tokens, even out who computes what, from what fires and what jobs cost.

A layer takes as long as its slowest worker, so every layer is divided such that all finish together
(`water_filling.py`), as far as the copies at hand allow:

- The activity expected of a group blends its long run, which starts from the profile, with the last few tokens
  (`activity.py`). Loads vary about that, so "even" means even up to a margin.
- *Flips* are free and come first: a cache that is too slow gives its least active groups home, one that is too fast
  takes the most active of its copies back. Only layers that are off balance by more than a tolerance are touched, and a
  new copy is used as soon as it is there.
- *Promotions* copy the groups whose absence from the caches costs most, of all layers; none to a layer that is in
  balance, since a faster worker's larger share buys nothing there. With no slot free, one takes the slot of the copy
  that saves least, if it is better by a factor and pays the transfer back within a horizon: no pair swaps to and fro.
- *Moves between homes* take the most active groups of the slow home to the fast one, with the same accounting, where
  it was slow at the last decision too: a neighbour's short turn on one core is over before its groups have moved.

A copy that gives way goes home before the copy into its slot begins. Keeping slots free until copies have come would
cost more: their groups would be missing always, while what gives way is missing for a few tokens, and was worth little.
"""

from typing import NamedTuple

import numpy as np

from warmfront.coordinator.balancing.activity import ActivityEstimate, Margin
from warmfront.coordinator.balancing.interface import (
    BalancerState,
    Bools,
    Floats,
    Ints,
    Owners,
    Reals,
    Rebalance,
    held_by,
    home_of,
    make_rebalance,
)
from warmfront.coordinator.balancing.water_filling import even_loads, job_ns, select_heaviest

__all__ = ["Balance", "Tuning"]

_MAX_MOVES = 256  # of a decision, of each kind: bounds its time


class Tuning(NamedTuple):
    """What `Balance` weighs; the defaults are those that `scripts/simulate_balancing.py` found good."""

    interval: int = 8  # tokens between decisions
    settled_interval: int = 16  # at most, as long as nothing is to be changed; with 32 a load shift was seen too late
    max_interval: int = 32  # tokens between decisions, however short a token is
    deciding_share: float = 0.01  # of the time that decisions may take
    long_tokens: float = 512.0  # time constants of the averages and of how they are judged
    short_tokens: float = 20.0
    trust_tokens: float = 16.0
    noise_tokens: float = 256.0
    tolerance: float = 0.06  # a layer may take longer than in balance by this share
    max_margin: float = 0.09  # share of a layer's time; 0.18: 0.95 of the oracle's tok/s, 0.09: 1.03 (docs/log.md)
    min_gain: float = 1.25  # times what the copy that gives way saves, a new one has to save
    horizon_tokens: float = 64.0  # by when a copy must have paid for itself


class _View(NamedTuple):
    """What a decision is made from, beside the owners."""

    state: BalancerState
    home: Owners  # [L, G]
    expected: Floats  # [L, G]: bytes per token
    order: Ints  # [L, G]: groups of each layer, most active first
    margin_ns: Floats  # [W, L]: by which workers should finish before the others

    def even_loads(self, total: Floats, caps: Floats | None = None) -> Floats:
        """Bytes [W, L] of the even split of `total` [L]."""
        return even_loads(self.state.costs, total, caps, self.margin_ns)

    def job_ns(self, loads: Floats) -> Floats:
        """ns [W, L] with the margins, to be compared with each other."""
        return job_ns(self.state.costs, loads) + self.margin_ns

    def loads(self, owner: Owners) -> Floats:
        """Bytes per token [W, L] that each worker is expected to read."""
        workers = range(len(self.state.is_home))
        return np.stack([np.where(owner == worker, self.expected, 0.0).sum(1) for worker in workers])

    def select(self, limit: Floats, allowed: Bools) -> Bools:
        """Of those `allowed` [L, G], in each layer the most active up to `limit` [L] bytes."""
        return select_heaviest(self.expected, self.order, limit, allowed)


class Balance:
    """Keeps every layer even, and the caches filled with what saves most."""

    name = "balance"

    def __init__(self, long_run: Floats, group_bytes: int, tuning: Tuning | None = None) -> None:
        tuning = tuning or Tuning()
        self.tuning = tuning
        self.interval = tuning.interval
        self._activity = ActivityEstimate(long_run, tuning.long_tokens, tuning.short_tokens, tuning.trust_tokens)
        self._margin = Margin(len(long_run), tuning.noise_tokens)
        self._last_resident: Bools | None = None  # copies at the last decision
        self._was_slow: Bools = np.zeros((1, 1), np.bool_)  # [homes, L]: slow at the last decision

    def observe(self, bytes_read: Reals, active: Reals) -> None:
        """Learn what is read."""
        self._activity.observe(bytes_read)
        self._margin.observe(bytes_read)

    def decide(self, state: BalancerState) -> Rebalance:
        """Flips, then the copies to begin and what gives way to them."""
        before = state.resident if self._last_resident is None else self._last_resident
        arrived = state.resident & ~before
        self._last_resident = state.resident.copy()
        home = home_of(state)
        for worker in np.flatnonzero(state.is_home):
            home[arrived[worker]] = worker
        # A group that its old home still owns follows the copy; an owner whose copy is gone gives it up.
        owner = np.where(state.is_home[state.owner], home, state.owner)
        owner = np.where(held_by(state.resident, owner), owner, home)
        expected = self._activity.expected_load
        balanced_ns = job_ns(state.costs, even_loads(state.costs, expected.sum(1))).max(0)
        # Capped: in real runs the noise is not only the loads', and a wide margin left the caches the slower side.
        margin_ns = np.where(
            state.is_home[:, None], np.minimum(self._margin.ns, self.tuning.max_margin * balanced_ns), 0.0
        )
        view = _View(state, home, expected, np.argsort(-expected, axis=1), margin_ns)

        self._flip(view, owner, arrived)
        # Copies that are late mean that the link is the limit: more of them would only queue up.
        budget = 0 if state.copies_late else min(state.copy_budget, _MAX_MOVES)
        # Promotions and moves are planned for the owners that there will be, or what is on its way is asked for twice.
        upcoming = _upcoming_owner(state, owner)
        drops, promotions, gains = self._promote(view, upcoming, budget)
        upcoming[promotions[:, 1], promotions[:, 2]] = promotions[:, 0]
        moves, savings = self._move(view, upcoming)
        best = np.argsort(-np.concatenate((gains, savings)), kind="stable")[:budget]
        # A promotion that the budget leaves out takes its drop with it.
        used_drops = drops[best[best < len(drops)]]
        decision = make_rebalance(
            owner, home, [used_drops[used_drops[:, 0] >= 0]], [np.concatenate((promotions, moves))[best]]
        )
        self._margin.watch(state, decision.owner)
        self.interval = self._next_interval(state, decision)
        return decision

    def _next_interval(self, state: BalancerState, decision: Rebalance) -> int:
        """Tokens until the next decision: more while nothing changes, and while deciding takes long."""
        quiet = not len(decision.moves) and not state.in_flight.any() and not self._was_slow.any()
        settled = quiet and (decision.owner == state.owner).all()
        interval = min(2 * self.interval, self.tuning.settled_interval) if settled else self.tuning.interval
        # Decisions of 4 ms at every 13th token of 18 ms were felt (docs/log.md).
        affordable = int(state.decision_tokens / self.tuning.deciding_share)
        return max(interval, min(self.tuning.max_interval, affordable))

    def _flip(self, view: _View, owner: Owners, arrived: Bools) -> None:
        """Change `owner` where copies at hand allow a better balance."""
        state, is_home = view.state, view.state.is_home
        at_home = view.home == np.arange(len(is_home))[:, None, None]
        held = np.where(is_home[:, None, None], at_home, state.resident)
        # A worker can own no more than it holds.
        even = view.even_loads(view.expected.sum(1), (held * view.expected).sum(2))
        loads = view.loads(owner)
        limit = view.job_ns(even).max(0) * (1 + self.tuning.tolerance)
        now = view.job_ns(loads)
        # Without the tolerance groups would flip at every decision, by noise: each flip changes the order of a sum.
        uneven = now.max(0) > limit
        if not (uneven.any() or arrived.any()):
            return
        for worker in np.flatnonzero(~is_home):
            takes = state.resident[worker] & is_home[owner] & (uneven[:, None] | arrived[worker])
            takes = view.select(even[worker] - loads[worker], takes)
            mine = (owner == worker) & (now[worker] > limit)[:, None]
            # The most active that make up the even load stay: the least active cost the slower home least.
            gives = mine & ~view.select(even[worker], mine)
            owner[takes] = worker
            owner[gives] = view.home[gives]

    def _promote(self, view: _View, upcoming: Owners, budget: int) -> tuple[Ints, Ints, Floats]:
        """Drops and promotions in pairs, [n, 3] each, and what each saves, ns a token.

        A drop of worker -1 stands for a free slot.
        """
        state, home, expected = view.state, view.home, view.expected
        is_home = state.is_home
        loads, even = view.loads(upcoming), view.even_loads(expected.sum(1))
        limit = view.job_ns(even).max(0) * (1 + self.tuning.tolerance)
        slow = is_home[:, None] & (view.job_ns(loads) > limit)
        if not budget or is_home.all() or not slow.any():
            return _table([]), _table([]), np.empty(0)
        room = np.where(is_home[:, None], 0.0, even - loads)
        held = np.asarray((state.resident | state.in_flight)[~is_home].any(0))
        wanted = ~held & slow[home, np.arange(len(home))[:, None]]
        wanted = view.select(np.maximum(room, 0).sum(0), wanted)
        # What a copy saves: its bytes at its home's pace. What lies beyond the balance saves nothing.
        saves = expected * state.costs[home, 1]
        needed = view.select(even[~is_home].sum(0) * (1 + self.tuning.tolerance), held)
        candidates = _largest(np.where(wanted, saves, 0.0), budget)
        worth = np.where(needed, saves, 0.0)
        victims = {worker: _victims(state, worker, worth, budget) for worker in np.flatnonzero(~is_home).tolist()}
        drops, moves, gains = [], [], []
        for layer, group in candidates:
            saved = saves[layer, group]
            while victims:
                worker = max(victims, key=lambda worker: room[worker, layer])
                value, victim = victims[worker][0] if victims[worker] else (np.inf, (-1, 0, 0))
                gain = saved - value
                # Both: the factor keeps two groups of nearly the same activity from swapping for ever, the horizon
                # keeps out copies whose groups will have cooled down before the transfer is paid back.
                if saved > self.tuning.min_gain * value and gain * self.tuning.horizon_tokens > state.transfer_ns:
                    victims[worker].pop(0)
                    drops.append(victim)
                    moves.append((worker, layer, group))
                    gains.append(gain)
                    room[worker, layer] -= expected[layer, group]
                    break
                # Later candidates save less and this worker's next victim is worth more: it is done.
                del victims[worker]
        return _table(drops), _table(moves), np.array(gains)

    def _move(self, view: _View, upcoming: Owners) -> tuple[Ints, Floats]:
        """Copies to begin from home to home, [n, 3], and what each saves, ns a token."""
        state, expected = view.state, view.expected
        homes = np.flatnonzero(state.is_home)
        if len(homes) < 2:
            return _table([]), np.empty(0)
        # What the homes share among themselves is what the caches leave them.
        costs, loads = state.costs[homes], view.loads(upcoming)[homes]
        even = even_loads(costs, loads.sum(0))
        limit = job_ns(costs, even).max(0) * (1 + self.tuning.tolerance)
        now = job_ns(costs, loads) > limit
        # Twice running: that left a third of the moves that neighbours on a busy machine caused (docs/log.md).
        slow = now & self._was_slow
        self._was_slow = now
        receiver = (even - loads).argmax(0)
        room = (even - loads).max(0)
        # A group with a copy in a cache, or under way, stays: its home hardly computes it.
        movable = ~state.in_flight.any(0) & ~state.resident[~state.is_home].any(0)
        moves, savings = [], []
        for number, worker in enumerate(homes):
            mine = movable & (upcoming == worker) & slow[number, :, None]
            mine &= expected * costs[number, 1] * self.tuning.horizon_tokens > state.transfer_ns
            layer, group = np.nonzero(view.select(np.minimum(loads[number] - even[number], room), mine))
            moves.append(np.column_stack((homes[receiver[layer]], layer, group)))
            savings.append(expected[layer, group] * costs[number, 1])
        table, saved = np.concatenate(moves), np.concatenate(savings)
        best = np.argsort(-saved, kind="stable")
        # No more to a home than it has slots for: what the budget is spent on has to be able to begin.
        begun = [best[table[best, 0] == worker][: state.free_slots[worker]] for worker in homes]
        chosen = np.concatenate(begun)[:_MAX_MOVES]
        return table[chosen], saved[chosen]


def _upcoming_owner(state: BalancerState, owner: Owners) -> Owners:
    """The owners once the copies under way have come."""
    upcoming = owner.copy()
    for worker, is_home in enumerate(state.is_home):
        upcoming[state.in_flight[worker] & (state.is_home[upcoming] | ~is_home)] = worker
    return upcoming


def _largest(values: Floats, count: int) -> list[tuple[int, int]]:
    """(layer, group) of the `count` largest `values` [L, G] above 0, largest first."""
    layer, group = np.nonzero(values)
    order = np.argsort(-values[layer, group], kind="stable")[:count]
    return list(zip(layer[order].tolist(), group[order].tolist(), strict=True))


def _victims(state: BalancerState, worker: int, values: Floats, count: int) -> list[tuple[float, tuple[int, int, int]]]:
    """Up to `count` (value, copy) in `worker`: free slots (no copy: -1), then its copies that are worth least."""
    free = min(int(state.free_slots[worker]), count)
    layer, group = np.nonzero(state.resident[worker])
    value = values[layer, group]
    order = np.argsort(value, kind="stable")[: count - free]
    copies = ((worker, *place) for place in zip(layer[order].tolist(), group[order].tolist(), strict=True))
    return [(0.0, (-1, 0, 0))] * free + list(zip(value[order].tolist(), copies, strict=True))


def _table(rows: list[tuple[int, int, int]]) -> Ints:
    return np.array(rows, np.int64).reshape(-1, 3)
