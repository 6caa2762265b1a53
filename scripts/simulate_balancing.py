"""Replays which neurons fire against modelled devices, for every balancing policy: what would each one gain?

    python scripts/simulate_balancing.py --synthetic topics=4,tokens=2000 --device rtx4090 --vram 0.1,0.25,0.5,0.75
    python scripts/simulate_balancing.py --trace TRACE.npz --device emulation --plot FILE.png

A trace is an npz file: `fired`, uint32 [tokens, layers, groups], bit i = neuron i of the group fired, and `about`, JSON
with `name`, `hidden`, `ffn`, `row_bytes` (of one weight row; a neuron has three) and, if known, `switches` (the tokens
at which the topic changes). The profile, from which placements start, is `--profile`, another trace of the model, or
else the first tenth of the trace, which is then not replayed. A synthetic trace fires as the neurons of
`make_synthetic_model.py` do, in groups as a packer makes them: clusters that fire together, in them by rate.

The model. A layer takes the maximum over the workers of a + b * bytes read; the coordinator's part of a token is
constant. Copies run beside it at the link's speed, plus 17 us a batch, and count from the first token after they have
come; they take memory bandwidth from the CPU workers, which is the stall that is shown. Workers report their times with
2 % of noise, one in a hundred ten times too long, and the costs are fitted to that. How many copies may begin at once
is the engine's rule (`interface.copy_budget`). The devices' figures are in `balancing_simulator/devices.py`. Beside the
policies there are `random`, random groups in the slots, and `oracle static`, the best single split for the trace by its
own frequencies, with the GPU's part of a layer up to the balance of the means, or 5, 10 or 20 % above, whichever is
fastest. The policy `prompt` is told of a prompt before each topic, of 128 tokens that use what its first tokens will
use; with `--prompts` all policies are, and without it they see a topic that changes in the middle of a text.

The last line of stdout is JSON.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
from balancing_simulator.devices import DEVICES, device_of
from balancing_simulator.replay import ALL, Result, simulate
from balancing_simulator.traces import Trace, load_trace, synthesize

from warmfront.shared.errors import UsageError

# Policies without one get matplotlib's next.
COLOURS = {
    "balance": "#d1495b",
    "static": "#3d405b",
    "lru": "#8ab17d",
    "ema": "#e9a23b",
    "ema-published": "#f2cc8f",
    "by-layer": "#7b5ea7",
    "prompt": "#4f6d7a",
    "random": "#b8b8b8",
    "oracle static": "#2a7f9e",
}
WINDOW = 16  # tokens over which a hit share is averaged to tell whether it has recovered


def recoveries(hits: Sequence[float], switches: Sequence[int]) -> list[int]:
    """Tokens after each switch until the hit share is 95 % of its mean in the second half of the topic."""
    found = []
    for start, end in pairwise([*switches, len(hits)]):
        topic = np.array(hits[start:end])
        if len(topic) >= 4 * WINDOW:
            steady = topic[len(topic) // 2 :].mean()
            means = np.convolve(topic, np.ones(WINDOW) / WINDOW, "valid")
            found.append(int(np.argmax(means >= 0.95 * steady)) + WINDOW)
    return found


def summary(result: Result, trace: Trace) -> dict[str, Any]:
    """The figures of one policy."""
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
    """The figures by policy, as text."""
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
    middle = shares[len(shares) // 2]
    for name in results[middle]:
        style = {"color": COLOURS.get(name), "label": name, "linewidth": 2.4 if name == "balance" else 1.4}
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
    """Reports errors in one line."""

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


def shift_of(text: str) -> tuple[int, int, float]:
    """TOKEN:WORKER:FACTOR; ValueError if it is not."""
    token, worker, factor = text.split(":")
    return int(token), int(worker), float(factor)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The arguments, checked; exits with code 2 if they make no sense."""
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
    parser.add_argument(
        "--policies", default=",".join(name for name in ALL if name != "other profile"), help="default: %(default)s"
    )
    parser.add_argument(
        "--prompts", action="store_true", help="each topic has a prompt, of which all policies are told"
    )
    parser.add_argument("--json", action="store_true", help="only the JSON")
    parser.add_argument("--plot", type=Path, metavar="FILE.png")
    options = parser.parse_args(arguments)
    try:
        options.vram = [float(share) for share in options.vram.split(",")]
    except ValueError:
        parser.error("--vram must be shares such as 0.1,0.25")
    options.policies = [name for name in ALL if name in options.policies.split(",")]
    workers = len(options.device.cpus) + options.gpus
    if not all(0 <= share <= 1 for share in options.vram):
        parser.error("--vram must be between 0 and 1")
    if not options.policies:
        parser.error(f"--policies must be of {', '.join(ALL)}")
    if any(not 0 <= worker < workers or factor <= 0 for _, worker, factor in options.shift):
        parser.error(f"--shift: workers are 0 to {workers - 1}, factors above 0")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Simulate; returns the exit code."""
    options = parse(arguments)
    try:
        paths = options.trace or []
        traces = [load_trace(path, options.profile) for path in paths] or [synthesize(**options.synthetic)]
    except UsageError as error:
        print(f"simulate_balancing.py: {error}", file=sys.stderr)
        return 2
    report = []
    for trace in traces:
        results: dict[float, dict[str, Result]] = {}
        for vram in options.vram:
            results[vram] = {
                name: simulate(
                    name, trace, options.device, vram, options.gpus, options.shift, prompts=options.prompts or None
                )
                for name in options.policies
            }
            figures = {name: summary(result, trace) for name, result in results[vram].items()}
            report.append({"trace": trace.name, "vram": vram, "policies": figures})
            if not options.json:
                print(f"\n{trace.name}, {len(trace.counts)} tokens, slots for {vram:.0%}\n{table(figures)}", flush=True)
        if options.plot is not None:
            path = options.plot if len(traces) == 1 else options.plot.with_stem(f"{options.plot.stem}-{trace.name}")
            draw(path, trace, trace.name, options.vram, results)
    print(json.dumps({"device": asdict(options.device), "gpus": options.gpus, "runs": report}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
