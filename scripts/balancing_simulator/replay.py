"""The replay of a trace on a device under one policy, token by token, in the order in which the engine does things."""

import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from balancing_simulator.devices import Device
from balancing_simulator.traces import GROUP, Floats, Trace
from warmfront.coordinator.balancing.cost_model import WorkerCosts
from warmfront.coordinator.balancing.interface import BalancerState, Policy, PromptLoad, Rebalance, Used, copy_budget
from warmfront.coordinator.balancing.policies import POLICIES, make_policy
from warmfront.coordinator.balancing.water_filling import even_loads, job_ns
from warmfront.shared.errors import UsageError

# A word with so many bits set.
WORDS = np.array([(1 << count) - 1 for count in range(GROUP + 1)], np.uint32)
PROMPT = 128  # tokens of a topic that are its prompt, for those policies that are told
ALL = (*POLICIES, "other profile", "random", "oracle static")
COPY_CALL_NS = 17_000.0  # of a batch of copies, beside its bytes
NOISE, HICCUPS = 0.02, 0.01  # of reported times: their deviation; the share that is ten times too long
REPORT_INTERVAL = 8  # tokens
REACHES = (1.0, 1.05, 1.1, 1.2)  # that the oracle tries, see `place`


class Result(NamedTuple):
    """What a policy made of a trace."""

    seconds: list[float]  # of each token
    hits: list[float]  # of each token: the GPUs' share of the bytes read
    moves: int  # copies begun to GPUs
    unused: int  # of these: dropped, or there at the end, before the group fired on the GPU
    flips: int  # changes of owner that decisions made
    stall_s: float  # time that copies took from the computing
    imbalance: list[float]  # per load report: slowest worker's time over the workers' mean, mean over the layers
    decide_ms: float  # mean time of a decision here


def place(
    weights: Floats, bytes_read: Floats, costs: Floats, homes: int, slots: Sequence[int], reach: float
) -> tuple[Any, Any, Any]:
    """Home, owner [L, G] and copies [W, L, G]: the caches own, by `weights`, up to `reach` times their even loads.

    The caches hold what weighs most of all that is within the balance, then what weighs most of the rest.
    """
    layers, groups = bytes_read.shape
    home = np.tile((np.arange(groups) * homes // groups).astype(np.uint8), (layers, 1))
    owner = home.copy()
    resident = home == np.arange(homes + len(slots))[:, None, None]
    even = even_loads(costs, bytes_read.sum(1))
    order = np.argsort(-weights, axis=1)
    ranked = np.take_along_axis(bytes_read, order, 1)
    within = np.empty(weights.shape, bool)
    limit = reach * even[homes:].sum(0)[:, None]
    np.put_along_axis(within, order, np.cumsum(ranked, 1) - ranked / 2 < limit, 1)
    best = np.lexsort((-weights.ravel(), ~within.ravel()))[: sum(slots)]
    share = np.arange(len(best)) % len(slots)
    for worker in range(len(slots)):
        resident[homes + worker].flat[best[share == worker]] = True
        mine = resident[homes + worker]
        owner[mine & within] = homes + worker
    return home, owner, resident


class Replay:
    """One policy, one trace, one machine: what the engine does between tokens, and the time that passes."""

    def __init__(
        self, trace: Trace, device: Device, slots: list[int], shifts: Sequence[tuple[int, int, float]], seed: int = 0
    ) -> None:
        """`slots`: of each GPU; `shifts`: (token, worker, factor on its ns per byte from then on)."""
        self.trace, self.device, self.shifts = trace, device, shifts
        self.homes = len(device.cpus)
        self.base = np.array([*device.cpus, *[device.gpu] * len(slots)])
        self.costs = self.base.copy()  # [W, 2]: true ones, now
        self.workers = len(self.base)
        self.is_home = np.arange(self.workers) < self.homes
        self.slots = np.array([trace.profile.size] * self.homes + slots)
        self.rng = np.random.default_rng(seed)
        self.group_bytes = GROUP * trace.neuron_bytes
        self.copy_ns = self.group_bytes / device.link_gbs
        self.reports = Reports(self.base, trace.profile.shape[0], self.rng)
        self.moves = self.unused = self.flips = 0

    def start(self, weights: Floats, rates: Floats, reach: float = 1.0) -> None:
        """Place the groups by `weights`; the layers' loads are those of `rates`; `reach` as in `place`."""
        bytes_read = rates * self.trace.neuron_bytes
        self.home, self.owner, self.resident = place(
            weights, bytes_read, self.base, self.homes, self.slots[self.homes :].tolist(), reach
        )
        self.in_flight = np.zeros_like(self.resident)
        self.batches: list[tuple[float, npt.NDArray[np.int64]]] = []  # done at, ns; moves
        self.fresh = np.zeros_like(self.resident)  # copied to a cache and not yet used there

    def run(self, policy: Policy, prompts: bool = False) -> Result:
        """All tokens. `prompts`: before each topic comes a prompt of tokens that use the same as its first ones."""
        now, stall, deciding, decisions = 0.0, 0.0, 0.0, 0
        seconds, hits = [], []
        token_ns, since = self.device.coordinator_ns, 0
        for token, counts in enumerate(self.trace.counts):
            for at, worker, factor in self.shifts:
                if at == token:
                    self.costs[worker, 1] = self.base[worker, 1] * factor
            if prompts and token in (0, *self.trace.switches):
                prompt = self.trace.counts[token : token + PROMPT]
                policy.read(PromptLoad(len(prompt), prompt.mean(0) * self.trace.neuron_bytes))
            self.land(now)
            own = self.device.coordinator_ns
            if since >= policy.interval:
                since = 0
                own += self.device.deciding_ns
                state = self.state(token_ns, policy.interval)
                started = time.thread_time()
                decision = policy.decide(state)
                deciding += time.thread_time() - started
                decisions += 1
                self.take(decision)
                self.begin(decision, state.copy_budget, now)
            read = counts * float(self.trace.neuron_bytes)
            loads = np.stack([np.where(self.owner == worker, read, 0.0).sum(1) for worker in range(self.workers)])
            times = job_ns(self.costs, loads)
            lost = self.stall(times, self.copied(now, token_ns))
            token_ns = float(times.max(0).sum()) + lost + own
            since += 1
            now += token_ns
            stall += lost
            self.fresh &= ~((self.owner == np.arange(self.workers)[:, None, None]) & (counts > 0))
            seconds.append(token_ns / 1e9)
            hits.append(float(loads[self.homes :].sum() / max(loads.sum(), 1)))
            self.reports.add(times, loads)
            if (token + 1) % policy.stride == 0:
                words, row = WORDS[counts], self.trace.row_bytes
                # Of each layer one branch, which every token uses.
                uses, bounds = np.ones((len(words), 1), np.uint8), np.array([0, words.shape[1]])
                policy.observe(Used(words, words, uses, bounds, row, 2 * row))
        unused = self.unused + int(self.fresh.sum())
        decide_ms = 1e3 * deciding / max(decisions, 1)
        return Result(seconds, hits, self.moves, unused, self.flips, stall / 1e9, self.reports.imbalance, decide_ms)

    def stall(self, times: Floats, copied: float) -> float:
        """ns by which `copied` bytes delay a token whose jobs take `times` [W, L].

        Copies take the CPU's time where the CPU is what the layer waits for.
        """
        busy = times[: self.homes].max(0)
        taken = copied * self.device.stolen_ns
        beside = self.device.coordinator_ns if self.device.shared else 0.0
        lost = float(np.maximum(busy + taken * busy / (busy.sum() + beside) - times.max(0), 0).sum())
        return lost + taken * beside / (busy.sum() + beside)

    def state(self, token_ns: float, interval: int) -> BalancerState:
        """What the policy is told."""
        return BalancerState(
            owner=self.owner,
            home=self.home,
            resident=self.resident,
            in_flight=self.in_flight,
            free_slots=self.slots - (self.resident | self.in_flight).sum((1, 2)),
            is_home=self.is_home,
            costs=np.array([[costs.job_ns, costs.byte_ns] for costs in self.reports.fitted]),
            transfer_ns=self.copy_ns,
            copy_budget=copy_budget(interval * token_ns, self.copy_ns, int(self.in_flight.sum())),
            copies_late=bool(self.batches),
            decision_tokens=self.device.deciding_ns / token_ns,
        )

    def take(self, decision: Rebalance) -> None:
        """Take the owners, give up the copies."""
        self.flips += int((decision.owner != self.owner).sum())
        self.owner = decision.owner.copy()
        where = tuple(decision.drops.T)
        self.unused += int(self.fresh[where].sum())
        self.resident[where] = self.fresh[where] = False

    def begin(self, decision: Rebalance, budget: int, now: float) -> None:
        """Begin the copies for which there are slots, in one batch."""
        free = self.slots - (self.resident | self.in_flight).sum((1, 2))
        moves = decision.moves[:budget]
        begun = [np.flatnonzero(moves[:, 0] == worker)[: max(0, free[worker])] for worker in range(self.workers)]
        batch = moves[np.sort(np.concatenate(begun))]
        if not len(batch):
            return
        self.in_flight[tuple(batch.T)] = True
        ready = max([now, *(done for done, _ in self.batches)])
        self.batches.append((ready + COPY_CALL_NS + len(batch) * self.copy_ns, batch))
        self.moves += int((batch[:, 0] >= self.homes).sum())

    def land(self, now: float) -> None:
        """The copies that have come are owned where they are from now on; of two homes the new one stays."""
        while self.batches and self.batches[0][0] <= now:
            batch = self.batches.pop(0)[1]
            where = tuple(batch.T)
            self.in_flight[where], self.resident[where] = False, True
            to_cache = batch[batch[:, 0] >= self.homes]
            self.fresh[tuple(to_cache.T)] = True
            for worker, layer, group in batch[batch[:, 0] < self.homes]:
                self.resident[self.home[layer, group], layer, group] = False
                self.home[layer, group] = worker
            self.owner[tuple(batch[:, 1:].T)] = batch[:, 0]

    def copied(self, now: float, token_ns: float) -> float:
        """Bytes that go over the link during the token, if it takes as long as the last."""
        busy = max(0.0, min(token_ns, self.batches[-1][0] - now)) if self.batches else 0.0
        return busy * self.device.link_gbs


class Reports:
    """The workers' load reports, which are noisy, and the costs that are fitted to them."""

    def __init__(self, base: Floats, layers: int, rng: np.random.Generator) -> None:
        self.fitted = [WorkerCosts(*costs) for costs in base]
        self.imbalance: list[float] = []  # of each report, see `Result`
        self._rng = rng
        self._sums = np.zeros((2, len(base), layers))  # ns and bytes as reported
        self._spent = np.zeros((len(base), layers))  # ns without the noise
        self._tokens = 0

    def add(self, times: Floats, loads: Floats) -> None:
        """A token's ns and bytes, [W, L] each."""
        noise = 1 + NOISE * self._rng.standard_normal(times.shape)
        noise[self._rng.random(times.shape) < HICCUPS] *= 10
        self._sums += (times * noise, loads)
        self._spent += times
        self._tokens += 1
        if self._tokens % REPORT_INTERVAL == 0:
            for fitted, busy_ns, bytes_read in zip(self.fitted, *self._sums, strict=True):
                fitted.update(REPORT_INTERVAL, busy_ns, bytes_read)
            self.imbalance.append(float((self._spent.max(0) / self._spent.mean(0)).mean()))
            self._sums[:] = self._spent[:] = 0


def simulate(
    name: str,
    trace: Trace,
    device: Device,
    vram: float,
    gpus: int = 1,
    shifts: Sequence[tuple[int, int, float]] = (),
    policy: Callable[[Floats], Policy] | None = None,
    prompts: bool | None = None,
) -> Result:
    """Replay `trace` under the policy `name`, one of ALL, with slots for the share `vram` of all groups.

    `shifts`: as in `Replay`; `policy`: makes another policy, from the long run's bytes [L, G]; `prompts`: as in
    `Replay.run`, None: for the policy `prompt` alone.
    """
    slots = [int(vram * trace.profile.size) // gpus] * gpus
    long_run = trace.profile * trace.neuron_bytes
    rates = trace.counts.mean(0) if name == "oracle static" else trace.profile
    weights = rates
    if name == "other profile":
        if trace.other is None:
            raise UsageError("other profile needs a trace of experts: leave it out")
        weights = rates = trace.other
    results = []
    for reach in REACHES if name == "oracle static" else (1.0,):
        replay = Replay(trace, device, slots, shifts)
        if name == "random":
            weights = replay.rng.random(rates.shape)
        if name == "by-layer":
            # Whole ones: what is left of the memory stays empty, and the GPU computes all that it holds.
            layers, groups = rates.shape
            weights, reach = np.repeat(-np.arange(layers, dtype=float)[:, None], groups, axis=1), 1e9
            replay.slots[replay.homes :] -= replay.slots[replay.homes :] % groups
        replay.start(weights, rates, reach)
        known = name if name in POLICIES else "static"
        made = policy(long_run) if policy else make_policy(known, long_run, replay.group_bytes)
        results.append(replay.run(made, prompts=name == "prompt" if prompts is None else prompts))
    return min(results, key=lambda result: sum(result.seconds))
