"""Replays which neurons fire against modelled devices, for every balancing policy: what would each one gain?

    python scripts/simulate_balancing.py --synthetic topics=4,tokens=2000 --device rtx4090 --vram 0.1,0.25,0.5,0.75
    python scripts/simulate_balancing.py --trace TRACE.npz --device emulation --plot FILE.png

A trace is an npz file: `fired`, uint32 [tokens, layers, groups], bit i = neuron i of the group fired, and `about`, JSON
with `name`, `hidden`, `ffn`, `row_bytes` (of one weight row; a neuron has three) and, if known, `switches` (the tokens
at which the topic changes). The profile, which placements start from, is `--profile`, another trace of the model, or
else the first tenth of the trace, which is not replayed. A synthetic trace fires as the neurons of
`make_synthetic_model.py` do, in groups as a packer makes them: clusters that fire together, in them by rate.

The model. A layer takes max over workers of a + b * bytes read; the coordinator's part of a token is constant. Copies
run beside it at the link's pace, 17 us a batch, and count from the first token after they have come; they take memory
bandwidth from the CPU workers, which is the stall they expose. Workers report their times with 2 % of noise and one in
a hundred ten times too long, from which the costs are fitted. How many copies may begin at once is the engine's rule
(`situation.budget_of`). Figures of the devices are below. Beside the policies: `random`, random groups in the slots,
and `oracle static`, the best single split for the trace by its own frequencies, with the GPU's part of a layer up to
the balance of the means, or 5, 10 or 20 % above, whichever is fastest.

The last line of stdout is JSON.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import numpy as np
import numpy.typing as npt

from warmfront.coordinator.balancing.balance import POLICIES, BalancerState, Policy, Rebalance, make_policy
from warmfront.coordinator.balancing.cost_model import WorkerCosts
from warmfront.coordinator.balancing.interface import budget_of
from warmfront.coordinator.balancing.water_filling import fill, level
from warmfront.shared.errors import UsageError

Floats = npt.NDArray[np.float64]
GROUP = 32
ALL = (*POLICIES, "random", "oracle static")
COPY_CALL_NS = 17_000.0
NOISE, HICCUPS = 0.02, 0.01
REPORT_EVERY = 8
REACHES = (1.0, 1.05, 1.1, 1.2)
WINDOW = 16  # tokens over which a hit share is averaged to tell whether it has recovered


@dataclass(frozen=True, kw_only=True)
class Device:
    """One machine: (ns per job, ns per byte) of each CPU worker and of a GPU, and what copies cost."""

    cpus: list[list[float]]
    gpu: list[float]
    coordinator_ns: float
    link_gbs: float
    stolen_ns: float  # of the CPU workers' time, per byte copied
    shared: bool = False  # the coordinator computes on the same cores: copies take its time, too
    deciding_ns: float = 0.0  # a decision, where it was measured


def machine(cpu_gbs: float, gpu_gbs: float, link_gbs: float, attention_bytes: float = 8.4e9) -> Device:
    """Of published bandwidths, of which scattered rows get 70 % and streams 85 %.

    The coordinator streams the attention weights of a 13 B model (f16) on the GPU. A job costs a CPU worker 10 us
    (hand-over and barrier), a GPU worker 20 us (launches, the answer's way). A copied byte is read, written into pinned
    memory and read again by the GPU; half of that the CPU's compute leaves unused.
    """
    return Device(
        cpus=[[10_000.0, 1 / (0.7 * cpu_gbs)]],
        gpu=[20_000.0, 1 / (0.7 * gpu_gbs)],
        coordinator_ns=attention_bytes / (0.85 * gpu_gbs),
        link_gbs=link_gbs,
        stolen_ns=1.5 / cpu_gbs,
    )


DEVICES = {
    # Two channels of DDR5-4800 to 5600 give 60 GB/s; 1008 GB/s and PCIe 4.0 x16 (25 of 32 GB/s): data sheet.
    "rtx4090": machine(60, 1008, 25),
    # Two channels of DDR4-3200; 912 GB/s, PCIe 4.0 x16.
    "3080ti": machine(50, 912, 25),
    # Eight or more channels of DDR5; HBM3e, 4800 GB/s; PCIe 5.0 x16 (50 of 64 GB/s).
    "h200": machine(400, 4800, 50),
    # The emulated GPU of bench_balancing.py on two cores, as it measured it; copies share the cores with all else.
    "emulation": Device(
        cpus=[[179_000.0, 0.502]],
        gpu=[208_000.0, 0.126],
        coordinator_ns=52.5e6,
        link_gbs=1.04,
        stolen_ns=0.96,
        shared=True,
        deciding_ns=4.4e6,
    ),
}


class Trace(NamedTuple):
    """What fired: uint8 [tokens, layers, groups] neurons; the profile's mean of the same, [layers, groups]."""

    name: str
    counts: npt.NDArray[np.uint8]
    profile: Floats
    row_bytes: int
    switches: list[int]

    @property
    def neuron_bytes(self) -> int:
        """Gate row, up row, down row."""
        return 3 * self.row_bytes


class Result(NamedTuple):
    """What a policy made of a trace. Lists are per token."""

    seconds: list[float]
    hits: list[float]
    moves: int
    unused: int
    flips: int
    stall_s: float
    imbalance: list[float]  # per load report: slowest worker's time over the workers' mean, mean over the layers
    decide_ms: float


def popcounts(fired: npt.NDArray[np.uint32]) -> npt.NDArray[np.uint8]:
    """Bits set of each word."""
    table = np.array([number.bit_count() for number in range(256)], np.uint8)
    return np.asarray(table[np.ascontiguousarray(fired)[..., None].view(np.uint8)].sum(-1, dtype=np.uint8))


def load_trace(path: Path, profile: Path | None) -> Trace:
    """Raises UsageError if a file is not a trace."""

    def read(path: Path) -> tuple[npt.NDArray[np.uint8], dict[str, Any]]:
        try:
            with np.load(path) as file:
                about = json.loads(str(file["about"]))
                counts = popcounts(file["fired"].astype(np.uint32, casting="safe"))
            if counts.ndim != 3 or not isinstance(about["row_bytes"], int):
                raise ValueError("of another shape")
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UsageError(f"{path} is not a trace of firing neurons ({error})") from None
        return counts, about

    counts, about = read(path)
    switches = [int(token) for token in about.get("switches", [])]
    if profile is not None:
        sample = read(profile)[0]
    else:
        skipped = len(counts) // 10
        sample, counts = counts[:skipped], counts[skipped:]
        switches = [token - skipped for token in switches if token > skipped]
    if sample.shape[1:] != counts.shape[1:] or not len(sample) or not len(counts):
        raise UsageError(f"{path} has too few tokens, or its profile is of another model")
    return Trace(str(about.get("name", path.stem)), counts, sample.mean(0), about["row_bytes"], switches)


def clusters(points: Floats, count: int, rng: np.random.Generator) -> npt.NDArray[np.int64]:
    """Number of the cluster of each of `points` [n, d]: k-means, ten rounds."""
    centres = points[rng.choice(len(points), count, replace=False)]
    for _ in range(10):
        near = ((points[:, None] - centres[None]) ** 2).sum(-1).argmin(1)
        centres = np.stack([points[near == k].mean(0) if (near == k).any() else centres[k] for k in range(count)])
    return np.asarray(near)


def synthesize(
    *,
    topics: int = 4,
    tokens: int = 2000,
    layers: int = 40,
    groups: int = 432,
    hidden: int = 5120,
    active: float = 0.10,
    rank: int = 63,
    seed: int = 0,
) -> Trace:
    """Neuron i fires where u_i . z is above its threshold: z of a token normal around its topic, rates by a power law.

    The profile is exact, over all topics. Topics take turns; with one there is none.
    """
    import torch

    sys.path.insert(0, str(Path(__file__).parent))
    from make_synthetic_model import firing_rates

    rng = np.random.default_rng(seed)
    neurons = groups * GROUP
    rates = firing_rates(neurons, active)
    topic = np.arange(tokens) * topics // tokens
    centres = np.zeros((topics, rank), np.float32)
    if topics > 1:
        centres[np.arange(topics), np.arange(topics)] = rank**0.5
    counts = np.empty((tokens, layers, groups), np.uint8)
    profile = np.empty((layers, groups))
    for layer in range(layers):
        u = rng.standard_normal((neurons, rank)).astype(np.float32) / rank**0.5
        size, wanted = torch.from_numpy(np.linalg.norm(u, axis=1)), torch.from_numpy(rng.permutation(rates))
        mean = torch.from_numpy(u @ centres.T)

        def firing(threshold: Any, mean: Any = mean, size: Any = size) -> Any:
            return torch.special.ndtr(((mean - threshold[:, None]) / size[:, None]).double())

        low, high = torch.full((neurons,), -12.0), torch.full((neurons,), 24.0)
        for _ in range(40):
            middle = (low + high) / 2
            over = firing(middle).mean(1) > wanted
            low, high = torch.where(over, middle, low), torch.where(over, high, middle)
        by_topic = firing(low).numpy()
        order = packed(by_topic, rng)
        z = rng.standard_normal((tokens, rank)).astype(np.float32) + centres[topic]
        fired = z @ u[order].T > low.numpy()[order]
        counts[:, layer] = fired.reshape(tokens, groups, GROUP).sum(2, dtype=np.uint8)
        profile[layer] = by_topic.mean(1)[order].reshape(groups, GROUP).sum(1)
    switches = [int(token) for token in np.flatnonzero(np.diff(topic)) + 1]
    return Trace(f"synthetic, {topics} topics", counts, profile, 2 * hidden, switches)


def packed(by_topic: Floats, rng: np.random.Generator) -> npt.NDArray[np.int64]:
    """Order of neurons of rates `by_topic` [neurons, topics]: in clusters by rate, cut into groups, these by rate."""
    rate = by_topic.mean(1)
    roots = np.sqrt(by_topic)
    directions = roots / np.linalg.norm(roots, axis=1, keepdims=True)
    cluster = (
        clusters(directions, min(2 * by_topic.shape[1], 16), rng) if by_topic.shape[1] > 1 else np.zeros(len(rate))
    )
    groups = np.lexsort((-rate, cluster)).reshape(-1, GROUP)
    return np.asarray(groups[np.argsort(-rate[groups].sum(1), kind="stable")].ravel())


def plan(
    weights: Floats, bytes_read: Floats, costs: Floats, homes: int, slots: Sequence[int], reach: float
) -> tuple[Any, Any, Any]:
    """Home, owner [L, G] and copies [W, L, G]: the caches own, by `weights`, up to `reach` times their even loads.

    The caches hold what weighs most of all that is within the balance, then what weighs most of the rest.
    """
    layers, groups = bytes_read.shape
    home = np.tile((np.arange(groups) * homes // groups).astype(np.uint8), (layers, 1))
    owner = home.copy()
    resident = home == np.arange(homes + len(slots))[:, None, None]
    even = level(costs, bytes_read.sum(1))
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
        owner[fill(weights, order, np.full(layers, np.inf), mine & within)] = homes + worker
    return home, owner, resident


class Replay:
    """One policy, one trace, one machine: what the engine does at token boundaries, and the time that passes."""

    def __init__(
        self, trace: Trace, device: Device, slots: list[int], shifts: Sequence[tuple[int, int, float]], seed: int = 0
    ) -> None:
        self.trace, self.device, self.shifts = trace, device, shifts
        self.homes = len(device.cpus)
        self.base = np.array([*device.cpus, *[device.gpu] * len(slots)])
        self.true = self.base.copy()
        self.workers = len(self.base)
        self.is_home = np.arange(self.workers) < self.homes
        self.slots = np.array([trace.profile.size] * self.homes + slots)
        self.rng = np.random.default_rng(seed)
        self.group_bytes = GROUP * trace.neuron_bytes
        self.copy_ns = self.group_bytes / device.link_gbs
        self.fitted = [WorkerCosts(*costs) for costs in self.base]

    def start(self, weights: Floats, rates: Floats, reach: float = 1.0) -> None:
        """Place the groups by `weights`; the layers' loads are those of `rates`; `reach` as in `plan`."""
        bytes_read = rates * self.trace.neuron_bytes
        self.home, self.owner, self.resident = plan(
            weights, bytes_read, self.base, self.homes, self.slots[self.homes :].tolist(), reach
        )
        self.coming = np.zeros_like(self.resident)
        self.batches: list[tuple[float, npt.NDArray[np.int64]]] = []  # done at, ns; moves
        self.fresh = np.zeros_like(self.resident)  # promoted and not yet used

    def run(self, policy: Policy) -> Result:
        """All tokens."""
        now, stall, moves, unused, flips, deciding, decisions = 0.0, 0.0, 0, 0, 0, 0.0, 0
        seconds, hits, imbalance = [], [], []
        sums = np.zeros((2, self.workers, self.trace.profile.shape[0]))
        spent = np.zeros_like(sums[0])
        token_ns, since = self.device.coordinator_ns, 0
        for token, counts in enumerate(self.trace.counts):
            for at, worker, factor in self.shifts:
                if at == token:
                    self.true[worker, 1] = self.base[worker, 1] * factor
            self.land(now)
            own = self.device.coordinator_ns
            if since >= policy.every:
                since = 0
                own += self.device.deciding_ns
                situation = self.situation(token_ns, policy.every)
                started = time.thread_time()
                decision = policy.decide(situation)
                deciding += time.thread_time() - started
                decisions += 1
                flips += int((decision.owner != self.owner).sum())
                unused += self.drop(decision)
                moves += self.begin(decision, situation.budget, now)
            read = counts * float(self.trace.neuron_bytes)
            loads = np.stack([np.where(self.owner == worker, read, 0.0).sum(1) for worker in range(self.workers)])
            times = self.true[:, :1] + self.true[:, 1:] * loads
            copied = self.copied(now, token_ns)
            # Copies take the CPU's time where the CPU is what the layer waits for.
            slowest = times.max(0)
            busy = times[: self.homes].max(0)
            taken = copied * self.device.stolen_ns
            beside = self.device.coordinator_ns if self.device.shared else 0.0
            lost = float(np.maximum(busy + taken * busy / (busy.sum() + beside) - slowest, 0).sum())
            lost += taken * beside / (busy.sum() + beside)
            token_ns = float(slowest.sum()) + lost + own
            since += 1
            now += token_ns
            stall += lost
            self.fresh &= ~((self.owner == np.arange(self.workers)[:, None, None]) & (counts > 0))
            seconds.append(token_ns / 1e9)
            hits.append(float(loads[self.homes :].sum() / max(loads.sum(), 1)))
            noise = 1 + NOISE * self.rng.standard_normal(times.shape)
            noise[self.rng.random(times.shape) < HICCUPS] *= 10
            sums += (times * noise, loads)
            spent += times
            if token % REPORT_EVERY == REPORT_EVERY - 1:
                for fitted, busy_ns, bytes_read in zip(self.fitted, *sums, strict=True):
                    fitted.update(REPORT_EVERY, busy_ns, bytes_read)
                imbalance.append(float((spent.max(0) / spent.mean(0)).mean()))
                sums[:] = spent[:] = 0
            policy.observe(read, counts / GROUP)
        unused += int(self.fresh.sum())
        return Result(seconds, hits, moves, unused, flips, stall / 1e9, imbalance, 1e3 * deciding / max(decisions, 1))

    def situation(self, token_ns: float, every: int) -> BalancerState:
        """What the policy is told."""
        return BalancerState(
            self.owner.copy(),
            self.resident.copy(),
            self.coming.copy(),
            self.slots - (self.resident | self.coming).sum((1, 2)),
            self.is_home,
            np.array([[costs.job_ns, costs.byte_ns] for costs in self.fitted]),
            self.copy_ns,
            budget_of(every * token_ns, self.copy_ns, int(self.coming.sum())),
            bool(self.batches),
            self.device.deciding_ns / token_ns,
        )

    def drop(self, decision: Rebalance) -> int:
        """Take the owners, give up the copies; how many of these had never been used."""
        self.owner = decision.owner.copy()
        where = tuple(decision.drops.T)
        never = int(self.fresh[where].sum())
        self.resident[where] = self.fresh[where] = False
        return never

    def begin(self, decision: Rebalance, budget: int, now: float) -> int:
        """Begin the copies for which there are slots, one batch; how many to caches."""
        free = self.slots - (self.resident | self.coming).sum((1, 2))
        moves = decision.moves[:budget]
        begun = [np.flatnonzero(moves[:, 0] == worker)[: max(0, free[worker])] for worker in range(self.workers)]
        batch = moves[np.sort(np.concatenate(begun))]
        if not len(batch):
            return 0
        self.coming[tuple(batch.T)] = True
        ready = max([now, *(done for done, _ in self.batches)])
        self.batches.append((ready + COPY_CALL_NS + len(batch) * self.copy_ns, batch))
        return int((batch[:, 0] >= self.homes).sum())

    def land(self, now: float) -> None:
        """The copies that have come count from now on; of two homes the new one stays."""
        while self.batches and self.batches[0][0] <= now:
            batch = self.batches.pop(0)[1]
            where = tuple(batch.T)
            self.coming[where], self.resident[where] = False, True
            to_cache = batch[batch[:, 0] >= self.homes]
            self.fresh[tuple(to_cache.T)] = True
            for worker, layer, group in batch[batch[:, 0] < self.homes]:
                old = self.home[layer, group]
                self.resident[old, layer, group] = False
                self.home[layer, group] = worker
                if self.owner[layer, group] == old:
                    self.owner[layer, group] = worker

    def copied(self, now: float, token_ns: float) -> float:
        """Bytes that go over the link during the token, if it takes as long as the last."""
        busy = max(0.0, min(token_ns, self.batches[-1][0] - now)) if self.batches else 0.0
        return busy * self.device.link_gbs


def simulate(
    name: str,
    trace: Trace,
    device: Device,
    vram: float,
    gpus: int = 1,
    shifts: Sequence[tuple[int, int, float]] = (),
    policy: Callable[[Floats], Policy] | None = None,
) -> Result:
    """Replay `trace` under one of ALL, with slots for the share `vram` of all groups; `policy` makes another one."""
    slots = [int(vram * trace.profile.size) // gpus] * gpus
    long_run = trace.profile * trace.neuron_bytes
    rates = trace.counts.mean(0) if name == "oracle static" else trace.profile
    results = []
    for reach in REACHES if name == "oracle static" else (1.0,):
        replay = Replay(trace, device, slots, shifts)
        replay.start(replay.rng.random(rates.shape) if name == "random" else rates, rates, reach)
        known = name if name in POLICIES else "static"
        results.append(replay.run(policy(long_run) if policy else make_policy(known, long_run, replay.group_bytes)))
    return min(results, key=lambda result: sum(result.seconds))


def recoveries(hits: Sequence[float], switches: Sequence[int]) -> list[int]:
    """Tokens after each switch until the hit share is 95 % of what it comes to in the second half of the topic."""
    found = []
    for start, end in pairwise([*switches, len(hits)]):
        topic = np.array(hits[start:end])
        if len(topic) >= 4 * WINDOW:
            steady = topic[len(topic) // 2 :].mean()
            means = np.convolve(topic, np.ones(WINDOW) / WINDOW, "valid")
            found.append(int(np.argmax(means >= 0.95 * steady)) + WINDOW)
    return found


def summary(result: Result, trace: Trace) -> dict[str, Any]:
    """The figures that are printed."""
    return {
        "tokens_per_s": len(result.seconds) / sum(result.seconds),
        "hit_share": float(np.mean(result.hits)),
        "moves": result.moves,
        "unused_moves": result.unused,
        "flips": result.flips,
        "stall_share": result.stall_s / sum(result.seconds),
        "imbalance": float(np.mean(result.imbalance)),
        "recovery_tokens": recoveries(result.hits, trace.switches),
        "decide_ms": result.decide_ms,
    }


def table(figures: dict[str, dict[str, Any]]) -> str:
    """Lines of text."""
    lines = [
        f"{'policy':15}{'tok/s':>8}{'hit':>7}{'moves':>8}{'unused':>8}{'flips':>8}{'stall':>7}{'max/mean':>9}  recovery"
    ]
    for name, row in figures.items():
        unused = row["unused_moves"] / max(row["moves"], 1)
        lines.append(
            f"{name:15}{row['tokens_per_s']:8.2f}{row['hit_share']:7.1%}{row['moves']:8d}{unused:8.1%}{row['flips']:8d}"
            f"{row['stall_share']:7.1%}{row['imbalance']:9.2f}  {' '.join(map(str, row['recovery_tokens']))}"
        )
    return "\n".join(lines)


def draw(
    path: Path, trace: Trace, title: str, shares: Sequence[float], results: dict[float, dict[str, Result]]
) -> None:
    """Speed by VRAM, and hit share by token with the VRAM in the middle."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(13, 4.8), width_ratios=(1, 1.6), layout="constrained")
    colours = dict(zip(ALL, ("#d1495b", "#3d405b", "#8ab17d", "#e9a23b", "#b8b8b8", "#2a7f9e"), strict=True))
    middle = shares[len(shares) // 2]
    for name in results[middle]:
        style = {"color": colours[name], "label": name, "linewidth": 2.4 if name == "balance" else 1.4}
        speeds = [len(results[vram][name].seconds) / sum(results[vram][name].seconds) for vram in shares]
        left.plot([100 * vram for vram in shares], speeds, marker="o", markersize=4, **style)
        hits = np.convolve(results[middle][name].hits, np.ones(32) / 32, "valid")
        right.plot(np.arange(len(hits)) + 32, 100 * hits, **style)
    for token in trace.switches:
        right.axvline(token, color="#999999", linewidth=0.8, linestyle=":")
    left.set(xlabel="slots, % of the feed-forward weights", ylabel="tokens per second", ylim=(0, None))
    right.set(
        xlabel="token (dotted: the topic changes)",
        ylabel=f"active bytes read by the GPU, % (slots: {middle:.0%})",
        ylim=(0, 100),
    )
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", color="#e5e5e5")
    left.legend(frameon=False)
    figure.suptitle(title)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


class Parser(argparse.ArgumentParser):
    """Says in one line what is wrong."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}\n")


def synthetic_options(text: str) -> dict[str, Any]:
    """`topics=4,tokens=2000` as keywords of `synthesize`; ValueError if they are not."""
    kinds = {"active": float}
    known = ("topics", "tokens", "layers", "groups", "hidden", "active", "rank", "seed")
    pairs = [part.split("=") for part in text.split(",") if part]
    if any(len(pair) != 2 or pair[0] not in known for pair in pairs):
        raise ValueError
    return {key: kinds.get(key, int)(value) for key, value in pairs}


def device_of(text: str) -> Device:
    """A known name, or the path of a JSON file with the fields of `Device`; ValueError if it is neither."""
    if text in DEVICES:
        return DEVICES[text]
    try:
        return Device(**json.loads(Path(text).read_text(encoding="utf-8")))
    except (OSError, TypeError) as error:
        raise ValueError(str(error)) from None


def shift_of(text: str) -> tuple[int, int, float]:
    """TOKEN:WORKER:FACTOR; ValueError if it is not."""
    token, worker, factor = text.split(":")
    return int(token), int(worker), float(factor)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Exits with code 2 if the arguments make no sense."""
    parser = Parser(
        prog="simulate_balancing.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--trace", type=Path, nargs="+", metavar="FILE", help="recorded traces")
    source.add_argument(
        "--synthetic", type=synthetic_options, metavar="KEY=VALUE,...", help="topics, tokens, layers, ..."
    )
    parser.add_argument("--profile", type=Path, metavar="FILE", help="a trace to take the profile from")
    parser.add_argument(
        "--device", type=device_of, default="rtx4090", metavar="NAME", help=f"{', '.join(DEVICES)} or a JSON file"
    )
    parser.add_argument(
        "--vram", default="0.25", help="shares of the feed-forward weights that fit; default: %(default)s"
    )
    parser.add_argument("--gpus", type=int, default=1, choices=range(1, 9), help="that share the VRAM")
    parser.add_argument(
        "--shift", type=shift_of, action="append", default=[], metavar="TOKEN:WORKER:FACTOR", help="of its ns per byte"
    )
    parser.add_argument("--policies", default=",".join(ALL), help="default: %(default)s")
    parser.add_argument("--json", action="store_true", help="only the JSON")
    parser.add_argument("--plot", type=Path, metavar="FILE.png")
    wish = parser.parse_args(arguments)
    try:
        wish.vram = [float(share) for share in wish.vram.split(",")]
    except ValueError:
        parser.error("--vram must be shares such as 0.1,0.25")
    wish.policies = [name for name in ALL if name in wish.policies.split(",")]
    workers = len(wish.device.cpus) + wish.gpus
    if not all(0 <= share <= 1 for share in wish.vram):
        parser.error("--vram must be between 0 and 1")
    if not wish.policies:
        parser.error(f"--policies must be of {', '.join(ALL)}")
    if any(not 0 <= worker < workers or factor <= 0 for _, worker, factor in wish.shift):
        parser.error(f"--shift: workers are 0 to {workers - 1}, factors above 0")
    return wish


def main(arguments: Sequence[str] | None = None) -> int:
    """Simulate; returns the exit code."""
    wish = parse(arguments)
    try:
        paths = wish.trace or []
        traces = [load_trace(path, wish.profile) for path in paths] or [synthesize(**wish.synthetic)]
    except UsageError as error:
        print(f"simulate_balancing.py: {error}", file=sys.stderr)
        return 2
    report = []
    for trace in traces:
        results: dict[float, dict[str, Result]] = {}
        for vram in wish.vram:
            results[vram] = {
                name: simulate(name, trace, wish.device, vram, wish.gpus, wish.shift) for name in wish.policies
            }
            figures = {name: summary(result, trace) for name, result in results[vram].items()}
            report.append({"trace": trace.name, "vram": vram, "policies": figures})
            if not wish.json:
                print(f"\n{trace.name}, {len(trace.counts)} tokens, slots for {vram:.0%}\n{table(figures)}", flush=True)
        if wish.plot is not None:
            path = wish.plot if len(traces) == 1 else wish.plot.with_stem(f"{wish.plot.stem}-{trace.name}")
            draw(path, trace, trace.name, wish.vram, results)
    print(json.dumps({"device": asdict(wish.device), "gpus": wish.gpus, "runs": report}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
