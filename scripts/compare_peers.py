"""warmfront and its peers on the same model, in turns in one run: tokens a second of decode and of prefill.

For each token decode reads every weight that it needs once, so tok/s <= read bandwidth / bytes a token: an engine gains
by needing fewer bytes (neurons skipped, narrower weights) or by coming closer to the bandwidth. Prefill uses a weight
for many tokens and is bound by arithmetic. Machines are shared and their bandwidth moves, so only neighbours in time
can be compared: in a round every engine has a turn, in random order, and a ratio is the median of the rounds' ratios.
The bandwidth is measured before and after every turn. Other programs distort more than that: peers' threads spin at
barriers, and a busy core costs them most of their speed. A turn waits up to 20 s until others are quiet.

MODEL is a folder made by make_synthetic_model.py, or one GGUF file (default: SmolLM2-135M): row `gguf`.

    row    warmfront       llama.cpp, ik_llama.cpp    PowerInfer
    f16    f16             f16.gguf                   powerinfer-f16.gguf
    q8     q8              q8_0.gguf
    q4     q4              q4_0.gguf
    gguf   auto            the file

The peers are built from their sources. An environment variable has the path of a program, and a peer that is missing
is skipped with a line:

    WARMFRONT_LLAMA_CPP       llama.cpp's `llama-bench`
    WARMFRONT_IK_LLAMA_CPP    ik_llama.cpp's `llama-bench`; it interleaves the weights' rows as it loads (-rtr 1)
    WARMFRONT_POWERINFER      PowerInfer's `main`

Decode is measured behind prompts of --contexts tokens, past any end of the text. Loading and a warm-up are not timed.
The last line of stdout is JSON.

    python scripts/compare_peers.py [MODEL] [--threads 2] [--rounds 5] [--tokens 64] [--contexts 16] [--prefill 512]
        [--rows f16,q8,q4] [--selectors all,lowrank] [--peers llama.cpp,ik_llama.cpp,powerinfer] [--flash-attention 0,1]
"""

import argparse
import contextlib
import json
import os
import random
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from warmfront.coordinator import Engine
from warmfront.coordinator.hardware.bandwidth import Bandwidth
from warmfront.coordinator.models.default_model import DEFAULT_MODEL
from warmfront.coordinator.models.find import find_model
from warmfront.shared.errors import WarmfrontError
from warmfront.shared.selector import SELECTORS

LLAMA_CPP, IK_LLAMA_CPP, POWERINFER = "llama.cpp", "ik_llama.cpp", "powerinfer"
PROGRAMS = {
    LLAMA_CPP: "WARMFRONT_LLAMA_CPP",
    IK_LLAMA_CPP: "WARMFRONT_IK_LLAMA_CPP",
    POWERINFER: "WARMFRONT_POWERINFER",
}
FILES = {"f16": "f16.gguf", "q8": "q8_0.gguf", "q4": "q4_0.gguf"}
BOS, FIRST_ID, IDS = 1, 300, 211  # prompts: begin of sequence, then ids from 300 to 510 in turn
QUIET, PATIENCE_S = 0.1, 20.0  # others may use a tenth of the cores

Rates = dict[str, float]  # tok/s by column: "prefill 512", "decode @16"


class Skip(Exception):
    """Why an engine cannot be measured, in a line."""


class Task(NamedTuple):
    """What is done in a turn: prefill of `prefill` tokens; behind prompts of each length, decode of `tokens`."""

    threads: int
    tokens: int
    prefill: int
    contexts: tuple[int, ...]

    def rates(self, prefill: float, decode: Sequence[float]) -> Rates:
        """The measured tok/s by column."""
        behind = {f"decode @{context}": rate for context, rate in zip(self.contexts, decode, strict=True)}
        return {f"prefill {self.prefill}": prefill, **behind}


@dataclass
class Contender:
    """An engine on a file, and what its turns gave."""

    name: str
    load: Callable[["Contender"], AbstractContextManager[Callable[[Task], Rates]]]  # yields what takes a turn
    ours: bool = False
    bytes_per_token: int = 0  # weights that a token reads, where they are known
    samples: list[Rates] = field(default_factory=list)
    bandwidth: list[float] = field(default_factory=list)  # around each sample


def prompt(count: int) -> list[int]:
    """Ids of a prompt."""
    return [BOS, *(FIRST_ID + at % IDS for at in range(count - 1))]


@contextlib.contextmanager
def warmfront(
    path: Path, dtype: str, selector: str, task: Task, contender: Contender
) -> Iterator[Callable[[Task], Rates]]:
    """Our engine, resident, as it is used."""
    context = max(task.prefill, *task.contexts) + task.tokens + 8
    load = partial(Engine.load, str(path), threads=task.threads, context=context, gpu="none")
    try:
        engine = load(dtype=dtype, selector=selector)
    except WarmfrontError as error:
        raise Skip(str(error)) from error

    def turn(task: Task) -> Rates:
        engine.reset()
        list(engine.generate(prompt(task.prefill), max_new_tokens=1))
        prefill, decode = engine.stats.prefill_tps, []
        for count in task.contexts:
            engine.reset()
            engine.decode_ids(prompt(count), task.tokens)
            decode.append(engine.stats.decode_tps)
        return task.rates(prefill, decode)

    with engine:
        turn(task._replace(contexts=task.contexts[:1]))
        workers = engine.statistics.workers()
        neurons = sum(worker.bytes for worker in workers) * engine.model.spec.layers / workers[0].jobs
        contender.bytes_per_token = round(sum(engine.statistics.coordinator_bytes().values()) + neurons)
        yield turn


def program(peer: str) -> str:
    """The path of a peer's program."""
    variable = PROGRAMS[peer]
    path = os.environ.get(variable)
    if not path or not os.access(path, os.X_OK):
        raise Skip(f"{variable}={path} cannot be run" if path else f"{variable} is not set to the path of its program")
    return os.path.abspath(path)


def output_of(command: list[str]) -> tuple[str, str]:
    """What a peer's program printed, on stdout and on stderr."""
    with tempfile.TemporaryDirectory() as folder:  # where it may leave a log
        done = subprocess.run(command, cwd=folder, capture_output=True, encoding="utf-8", errors="replace")
    if done.returncode != 0:
        errors = [line for line in done.stderr.splitlines() if "error" in line]
        raise Skip(errors[0] if errors else f"exit code {done.returncode}")
    return done.stdout, done.stderr


@contextlib.contextmanager
def llama_bench(
    peer: str, file: Path, flash: str, task: Task, _contender: Contender
) -> Iterator[Callable[[Task], Rates]]:
    """llama.cpp or ik_llama.cpp: their `llama-bench`, a process for prefill and one for decode."""
    base = f"-m {file.resolve()} -t {task.threads} -fa {flash} -r 1 -o json".split()
    if peer == IK_LLAMA_CPP:
        base += ["-rtr", "1"]

    def run(*options: str) -> list[float]:
        out, _ = output_of([program(peer), *base, *options])
        try:
            return [float(test["avg_ts"]) for test in json.loads(out)]
        except (ValueError, TypeError, KeyError) as error:
            raise Skip("its output is not llama-bench's JSON") from error

    def turn(task: Task) -> Rates:
        tokens = str(task.tokens)
        if peer == IK_LLAMA_CPP:  # which has no -d
            behind = ["-n", "0", *(part for count in task.contexts for part in ("-gp", f"{count},{tokens}"))]
        else:
            behind = ["-n", tokens, "-d", ",".join(map(str, task.contexts))]
        (prefill,) = run("-p", str(task.prefill), "-n", "0")
        return task.rates(prefill, run("-p", "0", *behind))

    run("-p", "8", "-n", "0")
    yield turn


@contextlib.contextmanager
def powerinfer(file: Path, task: Task, _contender: Contender) -> Iterator[Callable[[Task], Rates]]:
    """PowerInfer's `main`, a process for each prompt; its own timing lines leave loading out."""

    def run(count: int, tokens: int, phase: str) -> float:
        # It takes text, puts BOS before it and finds the words of the synthetic models in their vocabulary.
        text = "".join(f"▁w{token}" for token in prompt(count)[1:])
        options = f"-t {task.threads} -c {count + tokens + 8} --temp 0 --repeat-penalty 1.0 --ignore-eos"
        command = [program(POWERINFER), "-m", str(file.resolve()), "-n", str(tokens), "-p", text, *options.split()]
        _, said = output_of([*command, "--verbose-prompt"])
        if [int(token) for token in re.findall(r"^ *(\d+) -> '", said, re.MULTILINE)] != prompt(count):
            raise Skip("it reads other tokens than the prompt's; the vocabulary must have ▁w300 to ▁w510 as 300 to 510")
        rate = re.search(rf": +{phase} time = .* ([\d.]+) tokens per second", said)
        if rate is None:
            raise Skip("no times among its last lines")
        return float(rate[1])

    def turn(task: Task) -> Rates:
        prefill = run(task.prefill, 1, "prompt eval")
        return task.rates(prefill, [run(count, task.tokens + 1, "eval") for count in task.contexts])

    run(8, 2, "eval")
    yield turn


def rows_of(model: Path, task: Task, wish: argparse.Namespace) -> dict[str, list[Contender]]:
    """The contenders by row, ours first."""
    rows = {}
    sparse = model / "powerinfer-f16.gguf"
    source = model if model.is_file() else sparse if sparse.is_file() else model / "hf"
    for row in ["gguf"] if model.is_file() else wish.rows:
        file, dtype = (model, "auto") if model.is_file() else (model / FILES[row], row)
        selectors = ["auto"] if model.is_file() else wish.selectors
        rows[row] = [
            Contender(f"warmfront {row} {selector}", partial(warmfront, source, dtype, selector, task), ours=True)
            for selector in selectors
        ]
        for peer in wish.peers:
            if peer != POWERINFER:
                for flash in wish.flash_attention:
                    load = partial(llama_bench, peer, file, flash, task)
                    rows[row].append(Contender(f"{peer} {row}{' flash' * int(flash)}", load))
            elif row == "f16":
                rows[row].append(Contender("PowerInfer f16", partial(powerinfer, sparse, task)))
    return rows


def others_share() -> float:
    """Share of all cores that other programs use; to be asked while nothing is measured."""

    def ticks() -> tuple[int, int]:
        cells = [int(cell) for cell in Path("/proc/stat").read_text(encoding="ascii").split()[1:9]]
        return cells[3] + cells[4], sum(cells)

    idle, total = ticks()
    time.sleep(0.2)
    idle_now, total_now = ticks()
    return 1 - (idle_now - idle) / max(total_now - total, 1)


def take_turn(contender: Contender, turn: Callable[[Task], Rates], task: Task, meter: Bandwidth) -> float:
    """Add a sample, once others are quiet; returns the share of the cores that they used all the same."""
    patience = time.monotonic() + PATIENCE_S
    while (busy := others_share()) > QUIET and time.monotonic() < patience:
        pass
    before = meter.measure()
    rates = turn(task)
    contender.samples.append(rates)
    contender.bandwidth.append((before + meter.measure()) / 2)
    return busy


def compare(contenders: list[Contender], rounds: int, task: Task) -> tuple[list[Contender], list[float]]:
    """All turns. Returns the contenders that could take theirs, and the shares of the cores that others used."""
    meter = Bandwidth(sorted(os.sched_getaffinity(0)))
    others: list[float] = []
    order = random.Random(0)
    with ExitStack() as stack:
        turns: dict[str, Callable[[Task], Rates]] = {}

        def attempt(contender: Contender, act: Callable[[], None]) -> bool:
            try:
                act()
            except Skip as skip:
                print(f"{contender.name} skipped: {skip}", flush=True)
                return False
            return True

        def load(contender: Contender) -> None:
            turns[contender.name] = stack.enter_context(contender.load(contender))

        def measure(contender: Contender) -> None:
            others.append(take_turn(contender, turns[contender.name], task, meter))

        left = [one for one in contenders if attempt(one, partial(load, one))]
        for _ in range(rounds):
            for one in order.sample(left, len(left)):
                if not attempt(one, partial(measure, one)):
                    left.remove(one)
    return left, others


def spread(values: Sequence[float]) -> dict[str, float]:
    found = {"median": statistics.median(values), "min": min(values), "max": max(values)}
    return {name: round(value, 2) for name, value in found.items()}


def report(contenders: list[Contender], others: list[float]) -> dict[str, Any]:
    """Print a row as tables; returns it for JSON."""
    columns = list(contenders[0].samples[0])
    result: dict[str, Any] = {"others": spread(others), "engines": {}, "ratios": {}}
    shown = "{median:.1f} ({min:.1f}-{max:.1f})"
    line = "{:40}" + "{:>22}" * (len(columns) + 1) + "{:>8}"
    print(line.format("", *columns, "GB/s around", "share"))
    for one in contenders:
        entry: dict[str, Any] = {name: spread([rates[name] for rates in one.samples]) for name in columns}
        entry["bandwidth"] = spread(one.bandwidth)
        share = ""
        if one.bytes_per_token:
            pairs = zip(one.samples, one.bandwidth, strict=True)
            shares = [rates[columns[1]] * one.bytes_per_token / 1e9 / around for rates, around in pairs]
            entry |= {"bytes_per_token": one.bytes_per_token, "share": round(statistics.median(shares), 3)}
            share = f"{entry['share']:.0%}"
        result["engines"][one.name] = entry
        print(line.format(one.name, *(shown.format(**entry[name]) for name in [*columns, "bandwidth"]), share))
    for mine in (one for one in contenders if one.ours):
        result["ratios"][mine.name] = {}
        for peer in (one for one in contenders if not one.ours):
            pairs = list(zip(mine.samples, peer.samples, strict=True))
            ratios = {name: statistics.median(a[name] / b[name] for a, b in pairs) for name in columns}
            result["ratios"][mine.name][peer.name] = {name: round(value, 3) for name, value in ratios.items()}
            cells = [f"{value:.2f}x" for value in ratios.values()]
            print(line.format(f"{mine.name.removeprefix('warmfront ')} / {peer.name}", *cells, "", ""))
    busy = "others used {median:.0%} of the cores ({min:.0%}-{max:.0%})".format(**result["others"])
    warning = "; engines whose threads spin lose most by that" if max(others) > QUIET else ""
    print(f"{busy}{warning}\n", flush=True)
    return result


def names_of(choices: Sequence[str]) -> Callable[[str], list[str]]:
    """Reads names with commas between them."""

    def names(text: str) -> list[str]:
        found = [name for name in text.lower().split(",") if name]
        if unknown := [name for name in found if name not in choices]:
            raise argparse.ArgumentTypeError(f"{', '.join(unknown)}: not among {', '.join(choices)}")
        return found

    return names


def count(text: str) -> int:
    if not text.isdecimal() or int(text) < 2:
        raise argparse.ArgumentTypeError(f"{text}: give a number, 2 or more")
    return int(text)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default=DEFAULT_MODEL)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    for name, default in (("tokens", 64), ("prefill", 512)):
        parser.add_argument(f"--{name}", type=count, default=default)
    parser.add_argument("--contexts", type=lambda text: tuple(map(count, text.split(","))), default=(16,))
    for name, choices, default in (
        ("rows", list(FILES), ",".join(FILES)),
        ("selectors", SELECTORS, "all,lowrank"),
        ("peers", list(PROGRAMS), ",".join(PROGRAMS)),
        ("flash-attention", ["0", "1"], "0,1"),
    ):
        parser.add_argument(f"--{name}", type=names_of(choices), default=default)
    wish = parser.parse_args()
    if min(wish.threads, wish.rounds) < 1:
        parser.error("--threads and --rounds must be 1 or more")
    try:
        model = find_model(wish.model, print, lambda *_: None)
    except WarmfrontError as error:
        sys.exit(str(error))
    task = Task(wish.threads, wish.tokens, wish.prefill, wish.contexts)
    result: dict[str, Any] = {"wish": vars(wish), "rows": {}}
    for row, contenders in rows_of(model, task, wish).items():
        left, others = compare(contenders, wish.rounds, task)
        if left:
            result["rows"][row] = report(left, others)
    if not result["rows"]:
        sys.exit("nothing was measured")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
