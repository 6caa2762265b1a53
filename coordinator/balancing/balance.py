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

Every decision looks at all groups once (`survey.py`), and closer only at layers that are off balance and at groups that
could save enough: while nothing changes there are none. Observing costs what a token used. Both are done the more
seldom the more of a token's time they take.

A copy that gives way goes home before the copy into its slot begins. Keeping slots free until copies have come would
cost more: their groups would be missing always, while what gives way is missing for a few tokens, and was worth little.
"""

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from warmfront.coordinator.balancing.activity import ActivityEstimate, Margin
from warmfront.coordinator.balancing.interface import (
    BalancerState,
    Bools,
    Floats,
    Ints,
    Owners,
    PromptLoad,
    Rebalance,
    Used,
    make_rebalance,
)
from warmfront.coordinator.balancing.survey import Survey, Surveyor
from warmfront.coordinator.balancing.water_filling import even_loads, job_ns, select_heaviest

__all__ = ["Balance", "Tuning"]

_MAX_MOVES = 256  # of a decision, of each kind: bounds its time


class Tuning(NamedTuple):
    """What `Balance` weighs; the defaults are those that `scripts/simulate_balancing.py` found good."""

    interval: int = 8  # tokens between decisions
    settled_interval: int = 16  # at most, as long as nothing is to be changed; with 32 a load shift was seen too late
    max_interval: int = 64  # tokens between decisions, however short a token is
    max_stride: int = 32  # tokens between observations, likewise
    time_share: float = 0.003  # of the time that decisions may take, and that observations may take
    long_tokens: float = 512.0  # time constants of the averages and of how they are judged, in tokens observed
    short_tokens: float = 20.0
    trust_tokens: float = 16.0
    noise_tokens: float = 256.0
    tolerance: float = 0.06  # a layer may take longer than in balance by this share
    max_margin: float = 0.09  # share of a layer's time; 0.18: 0.95 of the oracle's tok/s, 0.09: 1.03 (docs/log.md)
    min_gain: float = 1.25  # times what the copy that gives way saves, a new one has to save
    horizon_tokens: float = 64.0  # by when a copy must have paid for itself
    certainty: float = 3.0  # standard deviations of what is expected, by which it has to save more


class _View(NamedTuple):
    """What a decision is made from, beside the owners."""

    state: BalancerState
    sums: Survey  # of the owners when the decision began; `loads` follows their changes
    margin_ns: Floats  # [W, L]: by which workers should finish before the others
    noise_ns: float  # variance of what a group saves, per ns that it is expected to save

    @property
    def total(self) -> Floats:
        """Bytes per token [L]."""
        return np.asarray(self.sums.loads.sum(0))

    def even_loads(self, caps: Floats | None = None) -> Floats:
        """Bytes [W, L] of the even split."""
        return even_loads(self.state.costs, self.total, caps, self.margin_ns)

    def job_ns(self, loads: Floats) -> Floats:
        """ns [W, L] with the margins, to be compared with each other."""
        return job_ns(self.state.costs, loads) + self.margin_ns


class Balance:
    """Keeps every layer even, and the caches filled with what saves most."""

    name = "balance"

    def __init__(self, long_run: Floats, group_bytes: int, tuning: Tuning | None = None) -> None:
        tuning = tuning or Tuning()
        self.tuning = tuning
        self.interval, self.stride = tuning.interval, 1
        times = tuning.long_tokens, tuning.short_tokens, tuning.trust_tokens
        self._activity = ActivityEstimate(long_run, *times, unit=group_bytes)
        self._margin = Margin(len(long_run), tuning.noise_tokens)
        self._surveyor = Surveyor(*long_run.shape)
        # Compiled now, not between two tokens.
        select_heaviest(np.ones((1, 1)), even_loads(np.ones((1, 2)), np.ones(1))[0], np.ones((1, 1), np.bool_))
        self._was_slow: Bools = np.zeros((1, 1), np.bool_)  # [homes, L]: slow at the last decision

    def read(self, prompt: PromptLoad) -> None:
        """Learn what is read; the next token but one finds it where it belongs, as far as copies come."""
        self._activity.read(prompt)
        self.interval = 1

    def observe(self, used: Used) -> None:
        """Learn what is read."""
        self._margin.observe(self._activity.observe(used))

    def decide(self, state: BalancerState) -> Rebalance:
        """Flips, then the copies to begin and what gives way to them."""
        owner = state.owner.copy()
        sums = self._surveyor.survey(state, self._activity.averages, self._activity.blend)
        balanced_ns = job_ns(state.costs, even_loads(state.costs, sums.loads.sum(0))).max(0)
        home_ns = (sums.loads * state.costs[:, 1:])[state.is_home].max(0)
        margin_ns = np.where(state.is_home[:, None], self._margin.ns(balanced_ns, home_ns, self.tuning.max_margin), 0.0)
        noise_ns = self._activity.noise_bytes * float(state.costs[state.is_home, 1].max())
        view = _View(state, sums, margin_ns, noise_ns)

        flipped = self._flip(view, owner)
        # Copies that are late mean that the link is the limit: more of them would only queue up.
        budget = 0 if state.copies_late else min(state.copy_budget, _MAX_MOVES)
        # Promotions and moves are planned for the owners that there will be, or what is on its way is asked for twice.
        upcoming = _upcoming_owner(view, owner)
        drops, promotions, gains = self._promote(view, budget)
        moves, savings = self._move(view, upcoming, promotions)
        best = np.argsort(-np.concatenate((gains, savings)), kind="stable")[:budget]
        # A promotion that the budget leaves out takes its drop with it.
        used_drops = drops[best[best < len(drops)]]
        decision = make_rebalance(
            owner, state.home, [used_drops[used_drops[:, 0] >= 0]], [np.concatenate((promotions, moves))[best]]
        )
        self._activity.watch(state, decision.owner)
        self._margin.watch(state)
        quiet = not (flipped or len(decision.moves) or len(decision.drops) or self._was_slow.any())
        self._pace(state, settled=quiet and not state.in_flight.any())
        return decision

    def _pace(self, state: BalancerState, *, settled: bool) -> None:
        """When to observe and to decide again: the later the longer it takes, decisions while nothing changes too."""
        tuning = self.tuning
        interval = min(2 * self.interval, tuning.settled_interval) if settled else tuning.interval
        # Decisions of 4 ms at every 13th token of 18 ms were felt (docs/log.md).
        affordable = int(state.decision_tokens / tuning.time_share)
        self.interval = max(interval, min(tuning.max_interval, affordable))
        self.stride = min(tuning.max_stride, 1 + int(state.observation_tokens / tuning.time_share))

    def _flip(self, view: _View, owner: Owners) -> bool:
        """Change `owner` where copies at hand allow a better balance; returns whether anything has changed."""
        state, is_home, loads = view.state, view.state.is_home, view.sums.loads
        # A worker can own no more than it holds.
        even = view.even_loads(view.sums.held)
        limit = view.job_ns(even).max(0) * (1 + self.tuning.tolerance)
        now = view.job_ns(loads)
        # Without the tolerance groups would flip at every decision, by noise: each flip changes the order of a sum.
        uneven = np.flatnonzero(now.max(0) > limit)
        if not len(uneven):
            return False
        expected, home, owners, before = view.sums.expected[uneven], state.home[uneven], owner[uneven], owner[uneven]
        for worker in np.flatnonzero(~is_home):
            takes = state.resident[worker, uneven] & is_home[owners]
            takes = select_heaviest(expected, even[worker, uneven] - loads[worker, uneven], takes)
            mine = (owners == worker) & (now[worker, uneven] > limit[uneven])[:, None]
            # The most active that make up the even load stay: the least active cost the slower home least.
            gives = mine & ~select_heaviest(expected, even[worker, uneven], mine)
            owners[takes] = worker
            owners[gives] = home[gives]
        owner[uneven] = owners
        for number in range(len(is_home)):
            loads[number, uneven] = np.where(owners == number, expected, 0).sum(1)
        return bool((owners != before).any())

    def _promote(self, view: _View, budget: int) -> tuple[Ints, Ints, Floats]:
        """Drops and promotions in pairs, [n, 3] each, and what each saves, ns a token.

        A drop of worker -1 stands for a free slot.
        """
        state, sums, tuning = view.state, view.sums, self.tuning
        is_home, caches = state.is_home, np.flatnonzero(~state.is_home)
        nothing = _table([]), _table([]), np.empty(0)
        if not budget or not len(caches):
            return nothing
        even = view.even_loads()
        limit = view.job_ns(even).max(0) * (1 + tuning.tolerance)
        slow = is_home[:, None] & (view.job_ns(sums.loads) > limit)
        # What lies beyond the balance saves nothing, so layers may hold copies that are worth nothing.
        plenty = sums.held[caches].sum(0) > even[caches].sum(0) * (1 + tuning.tolerance)
        worthless = np.where(plenty, 0.0, sums.spared[caches].min(0)).min() if len(plenty) else 0.0
        least = 0.0 if state.free_slots[caches].any() else float(worthless)
        # What solves d = certainty * sqrt(noise * (2 least + d)), as `_pays` has it.
        chance = tuning.certainty**2 * view.noise_ns
        certain = (chance + (chance * (chance + 8 * least)) ** 0.5) / 2 if least < np.inf else 0.0
        floor = max(tuning.min_gain * least, least + state.transfer_ns / tuning.horizon_tokens, least + certain)
        layers = slow.any(0) & (sums.missed > floor)
        if not layers.any():
            return nothing
        held = np.asarray(state.resident[caches].any(0) | state.in_flight.any(0))
        # Of a layer with several homes only the slow ones give.
        wanted = ~held if is_home.sum() == 1 else ~held & slow[state.home, np.arange(len(held))[:, None]]
        places, values = self._surveyor.list_groups(sums.saves, wanted, layers, floor, np.inf, 4 * _MAX_MOVES)
        if not len(places):
            return nothing
        worth = sums.saves
        if plenty.any():
            needed = held.copy()
            needed[plenty] = select_heaviest(
                sums.expected[plenty], (even[caches].sum(0) * (1 + tuning.tolerance))[plenty], held[plenty]
            )
            worth = np.where(needed, worth, np.float32(0))
        everywhere, ceiling = np.ones(len(held), np.bool_), float(values[0]) / tuning.min_gain
        victims: dict[int, list[tuple[float, int]]] = {}
        for worker in caches.tolist():
            # Free slots first, which cost nothing; then the copies that are worth least.
            free = min(int(state.free_slots[worker]), budget)
            victims[worker] = [(0.0, -1)] * free
            if free < budget:
                lightest, worths = self._surveyor.list_groups(
                    worth, state.resident[worker], everywhere, -1.0, ceiling, free - budget
                )
                victims[worker] += zip(worths.tolist(), lightest.tolist(), strict=True)
        return self._match(view, even, (places, values), victims, budget)

    def _match(
        self,
        view: _View,
        even: Floats,
        candidates: tuple[Ints, npt.NDArray[np.float32]],
        victims: dict[int, list[tuple[float, int]]],
        budget: int,
    ) -> tuple[Ints, Ints, Floats]:
        """Candidates, those that save most first, take the slots of victims that are worth least: as `_promote`."""
        state, groups = view.state, view.sums.expected.shape[1]
        room = np.where(state.is_home[:, None], 0.0, even - view.sums.loads)
        drops, moves, gains = [], [], []
        for place, saved in zip(candidates[0].tolist(), candidates[1].tolist(), strict=True):
            layer, group = divmod(place, groups)
            load = float(view.sums.expected[layer, group])
            # More than half of it fits: rounding to the nearest.
            able = [worker for worker in victims if room[worker, layer] > load / 2]
            while able:
                worker = max(able, key=lambda worker: room[worker, layer])
                value, victim = victims[worker][0] if victims[worker] else (np.inf, -1)
                gain = saved - value
                if self._pays(view, saved, value):
                    victims[worker].pop(0)
                    drops.append((worker, *divmod(victim, groups)) if victim >= 0 else (-1, 0, 0))
                    moves.append((worker, layer, group))
                    gains.append(gain)
                    room[worker, layer] -= load
                    break
                # Later candidates save less and this worker's next victim is worth more: it is done.
                able.remove(worker)
                del victims[worker]
            if not victims or len(moves) == budget:
                break
        return _table(drops), _table(moves), np.array(gains)

    def _pays(self, view: _View, saved: float, value: float) -> bool:
        """Whether a copy that saves so much, ns a token, is to take the place of one that saves `value`.

        The factor keeps two groups of nearly the same activity from swapping for ever, the horizon keeps out copies
        whose groups will have cooled down before the transfer is paid back, and the certainty those that were used more
        by chance: of the experts that are seldom used, one always has been more than others.
        """
        gain, tuning = saved - value, self.tuning
        certain = tuning.certainty * (view.noise_ns * (saved + value)) ** 0.5
        pays_back = gain * tuning.horizon_tokens > view.state.transfer_ns
        return saved > tuning.min_gain * value and pays_back and gain > certain

    def _move(self, view: _View, upcoming: Owners, promotions: Ints) -> tuple[Ints, Floats]:
        """Copies to begin from home to home, [n, 3], and what each saves, ns a token."""
        state, expected = view.state, view.sums.expected
        homes = np.flatnonzero(state.is_home)
        if len(homes) < 2:
            return _table([]), np.empty(0)
        worker, layer, group = promotions.T
        _hand_over(view, upcoming, worker, layer, group)
        # What the homes share among themselves is what the caches leave them.
        costs, loads = state.costs[homes], view.sums.loads[homes]
        even = even_loads(costs, loads.sum(0))
        limit = job_ns(costs, even).max(0) * (1 + self.tuning.tolerance)
        now = job_ns(costs, loads) > limit
        # Twice running: that left a third of the moves that neighbours on a busy machine caused (docs/log.md).
        slow = now & self._was_slow
        self._was_slow = now
        if not slow.any():
            return _table([]), np.empty(0)
        receiver = (even - loads).argmax(0)
        room = (even - loads).max(0)
        # A group with a copy in a cache, or under way, stays: its home hardly computes it.
        movable = np.asarray(~state.in_flight.any(0) & ~state.resident[~state.is_home].any(0))
        movable[promotions[:, 1], promotions[:, 2]] = False
        moves, savings = [], []
        for number, worker in enumerate(homes):
            mine = movable & (upcoming == worker) & slow[number, :, None]
            mine &= expected * costs[number, 1] * self.tuning.horizon_tokens > state.transfer_ns
            limit = np.minimum(loads[number] - even[number], room)
            layer, group = np.nonzero(select_heaviest(expected, limit, mine))
            moves.append(np.column_stack((homes[receiver[layer]], layer, group)))
            savings.append(expected[layer, group] * costs[number, 1])
        table, saved = np.concatenate(moves), np.concatenate(savings)
        best = np.argsort(-saved, kind="stable")
        # No more to a home than it has slots for: what the budget is spent on has to be able to begin.
        begun = [best[table[best, 0] == worker][: state.free_slots[worker]] for worker in homes]
        chosen = np.concatenate(begun)[:_MAX_MOVES]
        return table[chosen], saved[chosen]


def _upcoming_owner(view: _View, owner: Owners) -> Owners:
    """The owners once the copies under way have come; `loads` become theirs."""
    state = view.state
    if not state.in_flight.any():
        return owner.copy()
    upcoming = owner.copy()
    worker, layer, group = np.nonzero(state.in_flight)
    # What a cache computes stays there, whatever home its copy goes to.
    counts = state.is_home[upcoming[layer, group]] | ~state.is_home[worker]
    _hand_over(view, upcoming, worker[counts], layer[counts], group[counts])
    return upcoming


def _hand_over(view: _View, owner: Owners, worker: Ints, layer: Ints, group: Ints) -> None:
    """Groups go to other owners, and so do their loads."""
    load = view.sums.expected[layer, group]
    np.subtract.at(view.sums.loads, (owner[layer, group], layer), load)
    np.add.at(view.sums.loads, (worker, layer), load)
    owner[layer, group] = worker


def _table(rows: list[tuple[int, int, int]]) -> Ints:
    return np.array(rows, np.int64).reshape(-1, 3)
