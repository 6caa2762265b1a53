"""Balancing policies compared on the emulated GPU: what moving neurons gains when the topic or the load shifts.

    python scripts/bench_balancing.py topics MODEL --trace TRACE.npz [--vram 500MB] [--policies balance,ema]
    python scripts/bench_balancing.py shift MODEL [--workers 2 | --gpu host --vram 500MB --slow cpu0:4] [--tokens 96]
    python scripts/bench_balancing.py cost [--shape 48,128,24,8,2048] [--rate 200] [--policies balance] [--tokens 600]

An emulated GPU (`--gpu host`) is one pinned thread of this machine, and `--slow cpu0:4` makes the CPU worker four times
slower than it is, so that the emulated GPU is the fast device. All engines are loaded at once and take turns of a few
tokens, so that other load on the machine affects all alike; those that wait sleep.

topics   replays the ids of a trace of `record_firing.py`. `oracle` is the best single split for the whole trace, from
         its own frequencies and the measured costs of the workers; `profile` the same from another trace (`--profile`);
         `random` as many groups at random; none of these moves. With `--prompt N` the first N tokens of each topic
         are read as a prompt, and only what follows them is measured.
shift    a busy process is put on the first worker's core and removed again: `balance` against the frozen split
         (`static`, which starts from the shares that balance had found).
cost     what observing and deciding take of the coordinator's time, alone, without a model: `--shape` is layers,
         experts, groups of an expert, experts used, hidden size; a topic of its own every third of the tokens.

The last line of stdout is JSON.
"""

import argparse
import contextlib
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from balancing_simulator.cost import Shape, measure

from warmfront.coordinator import Engine
from warmfront.coordinator.measure.measured_costs import fit_line
from warmfront.coordinator.placement.expected_load import load_of
from warmfront.coordinator.placement.plan_file import write_plan
from warmfront.coordinator.placement.solver import DeviceCosts, solve
from warmfront.shared.config import parse_size
from warmfront.shared.model.bundle import GROUP

TURN = 16  # tokens that an engine decodes before the next one has its turn
WINDOW = 16  # tokens over which a hit share is averaged
STATIC = ("oracle", "random", "profile")


class Token(NamedTuple):
    """What is known of one decoded token."""

    seconds: float
    hit: float  # the GPU's share of the bytes read
    moves: int  # groups copied at it
    flips: int  # groups whose owner changed without a copy
    busy: npt.NDArray[np.float64]  # [layers, workers]: ns of work


class Runner:
    """An engine and the tokens that it has decoded."""

    def __init__(self, name: str, engine: Engine) -> None:
        self.name, self.engine = name, engine
        self.tokens: list[Token] = []

    def step(self, token: int) -> int:
        """Decode one token; returns the greedy next."""
        before, started = self.engine.ownership.flow, time.perf_counter()
        logits = self.engine.step(token)
        seconds, flow = time.perf_counter() - started, self.engine.ownership.flow
        _, spans = self.engine.statistics.times()
        busy = (spans[:, :, 1] - spans[:, :, 0]).astype(np.float64)
        hit = float(self.engine.ownership.share()[-1])
        self.tokens.append(Token(seconds, hit, flow.moves - before.moves, flow.flips - before.flips, busy))
        return int(np.argmax(logits))

    def read(self, ids: list[int]) -> None:
        """Compute a prompt behind what has been decoded."""
        with self.engine.session.text() as text:
            self.engine.session.read(text, ids, want_logits=False)

    def rate(self, low: int = 0, high: int | None = None) -> float:
        """Tokens a second of tokens low..high, by their median time: single disturbances do not count."""
        return 1 / float(np.median([token.seconds for token in self.tokens[low:high]]))

    def hits(self) -> npt.NDArray[np.float64]:
        return np.array([token.hit for token in self.tokens])

    def imbalance(self, low: int, high: int | None = None) -> float:
        """The slowest worker's time over the workers' mean, by layer, of the mean token."""
        busy = np.median([token.busy for token in self.tokens[low:high]], axis=0)
        return float((busy.max(1) / busy.mean(1)).mean())

    def changes(self, low: int, high: int | None = None) -> int:
        return sum(token.moves + token.flips for token in self.tokens[low:high])


def measured_costs_of(runner: Runner) -> DeviceCosts:
    """The costs of the CPU and the GPU worker as the engine has fitted them."""
    cpu, gpu = runner.engine.ownership.costs
    return DeviceCosts(cpu.job_ns, cpu.byte_ns, gpu.job_ns, gpu.byte_ns)


def recovery(hits: npt.NDArray[np.float64], start: int, end: int) -> int:
    """Tokens after `start` until the hit share over a window is 95 % of that of the last half before `end`."""
    steady = hits[(start + end) // 2 : end].mean()
    for token in range(start + 1, end):
        if hits[max(start, token - WINDOW) : token].mean() >= 0.95 * steady:
            return token - start
    return end - start


def topics(options: argparse.Namespace) -> dict[str, Any]:
    """The replay of a trace by every policy."""
    with np.load(options.trace) as file:
        fired, ids, about = file["fired"], file["ids"].tolist(), json.loads(str(file["about"]))
    fired = {"oracle": fired[: options.tokens]}
    if options.profile is not None:
        with np.load(options.profile) as file:
            fired["profile"] = file["fired"]
    ids, switches = ids[: options.tokens], [0, *(at for at in about["switches"] if at < options.tokens)]
    common = {"gpu": "host", "vram_budget": options.vram, "slow": options.slow, "workers": 1, "verify": options.verify}
    common["dtype"] = options.dtype
    with ExitStack() as stack:

        def load(name: str, **overrides: Any) -> Runner:
            engine = Engine.load(options.model, say=print, **common, **overrides)
            return Runner(name, stack.enter_context(engine))

        balance = load("balance")
        for token in ids[: options.warm]:
            balance.step(token)
        costs, balance.tokens = measured_costs_of(balance), []
        balance.engine.close()
        model = Path(options.model).name
        print(f"{model}: CPU {costs.cpu_byte_ns:.3f} ns/B, GPU {costs.gpu_byte_ns:.3f} ns/B")
        runners = [load(name, policy=name) for name in options.policies if name not in STATIC]
        for name in options.policies:
            if name in STATIC:
                plan = Path(stack.enter_context(scratch())) / f"{name}.json"
                split(runners[0].engine, fired.get(name), costs, options.vram, plan)
                runners.append(load(name, policy="static", plan=str(plan)))
        for start, end in pairwise([*switches, len(ids)]):
            first = min(start + options.prompt, end)
            if first > start:
                for runner in runners:
                    runner.read(ids[start:first])
            for at in range(first, end, TURN):
                for runner in runners:
                    for token in ids[at : min(at + TURN, end)]:
                        runner.step(token)
        decoded = [at - part * options.prompt for part, at in enumerate(switches)]
        policies = {each.name: summary(each, decoded) for each in runners}
        return {"times": costs._asdict(), "device": device_of(runners), "policies": policies}


def device_of(runners: list[Runner]) -> dict[str, Any]:
    """What was measured, as a `--device` for `simulate_balancing.py`.

    The workers' costs are a line through every policy's time per layer over its bytes; the coordinator's time is the
    rest of the oracle's tokens; the costs of a copied byte and of a decision are those of the policy that copied most.
    """
    points = [points_of(runner) for runner in runners]
    busy, read = (np.concatenate([each[i] for each in points], axis=1) for i in (0, 1))
    cpu, gpu = (list(fit_line(busy[None, worker], read[None, worker])) for worker in (0, 1))
    steady = next((each for each in runners if each.name == "oracle"), runners[0])
    rest = [1e9 * token.seconds - token.busy.max(1).sum() for token in steady.tokens]
    busiest = max(runners, key=lambda each: each.engine.ownership.flow.moves).engine
    copied_ns = busiest.ownership.transfer_ns / busiest.model.layout.group_bytes
    return {
        "cpus": [cpu],
        "gpu": gpu,
        "coordinator_ns": float(np.median(rest)),
        "link_gbs": 1 / copied_ns,
        "stolen_ns": copied_ns,
        "shared": True,
        "deciding_ns": busiest.ownership.deciding_ns,
    }


def points_of(runner: Runner) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Of the CPU and the GPU worker: median ns of a layer's job, and its mean bytes, [2, layers] each."""
    reports, names = runner.engine.statistics.reports(), runner.engine.ownership.names
    jobs = np.array([reports[name].jobs for name in names])[:, None] / len(runner.tokens[0].busy)
    read = np.array([reports[name].bytes for name in names]) / jobs
    return np.median([token.busy for token in runner.tokens], axis=0).T, read


def scratch() -> "contextlib.AbstractContextManager[str]":
    import tempfile

    return tempfile.TemporaryDirectory()


def split(engine: Engine, fired: npt.NDArray[np.uint32] | None, costs: DeviceCosts, vram: int, path: Path) -> None:
    """Write a plan from the frequencies of a trace; without one, at random."""
    layout, spec = engine.model.layout, engine.model.spec
    slots = engine.statistics.device_memory()["slots"] // layout.group_bytes
    if fired is not None:
        firing = np.bitwise_count(fired).mean(0)
        # Of experts all neurons fire, or none.
        use = firing / GROUP if spec.architecture.feed_forward.experts else np.ones_like(firing)
        load = load_of(layout, engine.plan.selector, firing / np.maximum(use, 1e-9)) * use
        gpu = solve(firing, load, slots, costs)
    else:
        size = spec.layers * layout.groups
        gpu = np.zeros(size, bool)
        gpu[np.random.default_rng(0).permutation(size)[:slots]] = True
        gpu = gpu.reshape(spec.layers, layout.groups)
    write_plan(path, engine.model, vram, gpu, {})


def summary(runner: Runner, switches: list[int]) -> dict[str, Any]:
    """The figures of one policy."""
    hits, ends = runner.hits(), [*switches[1:], len(runner.tokens)]
    flow = runner.engine.ownership.flow
    seconds = [token.seconds for token in runner.tokens]
    groups = runner.engine.ownership.owners().size
    settled = [(end - (end - start) // 2, end) for start, end in zip(switches, ends, strict=True)]
    return {
        "tok_s": round(len(seconds) / sum(seconds), 2),
        "tok_s_median": round(runner.rate(), 2),
        "hit_share": round(float(hits.mean()), 4),
        "recovered_after": [recovery(hits, start, end) for start, end in zip(switches, ends, strict=True)][1:],
        "max_over_mean": round(float(np.mean([runner.imbalance(*each) for each in settled])), 3),
        "moves": flow.moves,
        "flips": flow.flips,
        "unused": round(runner.engine.ownership.unused / max(1, flow.moves), 4),
        "changes_per_100_settled": round(
            float(np.mean([100 * runner.changes(*each) / (each[1] - each[0]) / groups for each in settled])), 4
        ),
    }


@contextlib.contextmanager
def neighbour(cpu: int) -> Iterator[None]:
    """Meanwhile a process on one core never stops computing."""
    code = f"import os\nos.sched_setaffinity(0, [{cpu}])\nwhile True: pass"
    with subprocess.Popen([sys.executable, "-c", code]) as process:
        try:
            yield
        finally:
            process.kill()


def shift(options: argparse.Namespace) -> dict[str, Any]:
    """Decode three spans of tokens: quiet, beside a busy process, quiet again."""
    common = {"workers": options.workers, "gpu": options.gpu, "selector": options.selector, "dtype": options.dtype}
    if options.gpu != "none":
        common |= {"vram_budget": options.vram, "slow": options.slow}
    with ExitStack() as stack:
        runners = []
        for name in ("balance", "static"):
            engine = Engine.load(options.model, say=print, policy=name, **common)
            runners.append(Runner(name, stack.enter_context(engine)))
        balance, frozen = runners
        tokens = dict.fromkeys(runners, 300)
        cpu = balance.engine.plan.cores.workers[0].cpus[0]

        def span(count: int) -> None:
            for _ in range(0, count, TURN):
                for runner in runners:
                    for _ in range(TURN):
                        tokens[runner] = runner.step(tokens[runner])

        # First balance finds its shares; the frozen split takes them over where it holds the groups.
        for _ in range(options.tokens):
            tokens[balance] = balance.step(tokens[balance])
        held = frozen.engine.ownership.resident
        owners = balance.engine.ownership.owners()
        able = np.take_along_axis(held, owners[None].astype(np.intp), 0)[0]
        frozen.engine.ownership.hand_over(np.where(able, owners, frozen.engine.ownership.owners()))
        balance.tokens = []
        span(options.tokens)
        with neighbour(cpu):
            span(options.tokens)
        span(options.tokens)
        n, half = options.tokens, options.tokens // 2
        share = [1 - each for each in balance.hits()]
        late = min(64, n)
        return {
            "balance_tok_s": [round(balance.rate(n * i + half, n * (i + 1)), 2) for i in range(3)],
            "static_tok_s": [round(frozen.rate(n * i + half, n * (i + 1)), 2) for i in range(3)],
            "loaded_ratio": round(balance.rate(n + half, 2 * n) / frozen.rate(n + half, 2 * n), 3),
            "share_of_first": [
                round(float(np.mean(share[low:high])), 4)
                for low, high in ((half, n), (n + late - 16, n + late), (2 * n - 16, 2 * n), (3 * n - half, 3 * n))
            ],
            "changes_per_100_quiet": round(
                100 * balance.changes(half, n) / half / balance.engine.ownership.owners().size, 4
            ),
            "changes": [balance.changes(n * i, n * (i + 1)) for i in range(3)],
        }


def main() -> None:
    """Run as a script."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("topics", "shift", "cost"))
    parser.add_argument("model", nargs="?")
    parser.add_argument("--trace", type=Path)
    parser.add_argument("--profile", type=Path)
    parser.add_argument("--vram", type=parse_size, default="500MB")
    parser.add_argument("--slow", default="cpu0:4")
    parser.add_argument("--policies", type=lambda text: text.split(","), default="balance,oracle,ema,random")
    parser.add_argument("--tokens", type=int, default=None)
    parser.add_argument("--prompt", type=int, default=0, help="tokens of each topic; default: %(default)s")
    parser.add_argument("--warm", type=int, default=128)
    parser.add_argument("--verify", action="store_true")
    parser.add_argument("--workers", type=int, default=None)
    parser.add_argument("--gpu", default="none")
    parser.add_argument("--selector", default="auto")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--shape", type=lambda text: Shape(*map(int, text.split(","))), default="48,128,24,8,2048")
    parser.add_argument("--rate", type=float, default=200.0, help="tokens a second that the model would make")
    options = parser.parse_args()
    if options.what == "cost":
        tokens = options.tokens or 600
        known = [name for name in options.policies if name not in STATIC]
        figures = [measure(options.shape, options.rate, 0.3, tokens, 3, name) for name in known]
        print(json.dumps({"bench": "cost", "rate": options.rate, "policies": figures}))
        return
    if options.model is None:
        parser.error(f"{options.what} needs a model")
    if options.what == "topics" and options.trace is None:
        parser.error("topics needs --trace FILE.npz of record_firing.py")
    if "profile" in options.policies and options.profile is None:
        parser.error("the policy profile needs --profile FILE.npz of record_firing.py")
    options.tokens = options.tokens or (2000 if options.what == "topics" else 192)
    result = topics(options) if options.what == "topics" else shift(options)
    print(json.dumps({"bench": options.what, "model": Path(options.model).name, "vram": options.vram, **result}))


if __name__ == "__main__":
    main()
