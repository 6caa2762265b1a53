"""warmfront and its peers on the same model, alternately in one run: tokens a second of decode and of prefill.

For each token decode reads every weight that it needs once, so tok/s <= read bandwidth / bytes a token: an engine gains
by needing fewer bytes (neurons skipped, narrower weights) or by coming closer to the bandwidth. Prefill uses a weight
for many tokens and is bound by arithmetic. Machines are shared and their bandwidth moves, so only neighbours in time
can be compared: a turn is bandwidth, ours, a peer; a ratio is the median of the turns' ratios. Other programs distort
more than that: peers' threads spin at barriers, and a busy core costs them most of their speed. A turn waits up to
20 s until others are quiet.

MODEL is a folder made by make_synthetic_model.py, or one GGUF file (default: SmolLM2-135M): row `gguf`.

    row    warmfront       peers
    f16    f16, lowrank    PowerInfer (powerinfer-f16.gguf), llama.cpp (f16.gguf), warmfront with the selector `exact`;
                           with --transformers also transformers in bfloat16 (hf/), which is slow
    q8     q8, lowrank     llama.cpp (q8_0.gguf)
    q4     q4, lowrank     llama.cpp (q4_0.gguf)
    gguf   auto            llama.cpp

A peer that is missing is skipped with a line. The peers: `pip install llama-cpp-python transformers`; PowerInfer is
built from its source, WARMFRONT_POWERINFER is the path of its `main`. All answer the same prompts greedily and go on
after an end token; loading and a warm-up are not timed. Different answers of an engine are counted. PowerInfer may have
several: its threads add to one sum without a lock. The last line of stdout is JSON.

    python scripts/compare_peers.py [MODEL] [--threads 2] [--rounds 5] [--tokens 64] [--prompt-tokens 16]
                                    [--prefill 512] [--only f16,powerinfer,...] [--transformers]
"""

import argparse
import contextlib
import json
import multiprocessing
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from warmfront.coordinator import Engine
from warmfront.coordinator.hardware.bandwidth import Bandwidth
from warmfront.coordinator.models.default_model import DEFAULT_MODEL, find_model
from warmfront.shared.errors import WarmfrontError

POWERINFER = "WARMFRONT_POWERINFER"
BOS, FIRST_ID, IDS = 1, 300, 211  # prompts: begin of sequence, then ids from 300 to 510 in turn

QUIET, PATIENCE_S = 0.1, 20.0  # a turn waits until others use less than this of the cores, so long at most


class Skip(Exception):
    """Why an engine cannot be measured, in a line."""


class Task(NamedTuple):
    """A turn: prefill of a long prompt; then, after a short one, `tokens` decoded after the first."""

    threads: int
    tokens: int
    prompt: list[int]
    prefill: list[int]

    @property
    def context(self) -> int:
        return max(len(self.prompt), len(self.prefill)) + self.tokens + 8


class Sample(NamedTuple):
    """What a turn gave: two rates in tok/s and the answer."""

    decode: float
    prefill: float
    answer: tuple[int, ...] | str


Measure = Callable[[], Sample]
# Takes tokens, first forgetting all before them if the flag is set; returns the most probable next one.
Feed = Callable[[list[int], bool], int]


@dataclass
class Contender:
    """An engine on a file."""

    name: str
    path: Path
    load: Callable[[], AbstractContextManager[Measure]]  # yields what takes a turn
    samples: list[Sample] = field(default_factory=list)
    ratios: list[tuple[float, float]] = field(default_factory=list)  # ours over this one: decode, prefill
    facts: dict[str, int] = field(default_factory=dict)


def others_share() -> float:
    """Share of all cores that other programs use; to be asked while nothing is measured."""

    def ticks() -> tuple[int, int]:
        cells = [int(cell) for cell in Path("/proc/stat").read_text(encoding="ascii").split()[1:9]]
        return cells[3] + cells[4], sum(cells)

    idle, total = ticks()
    time.sleep(0.2)
    idle_now, total_now = ticks()
    return 1 - (idle_now - idle) / max(total_now - total, 1)


@contextlib.contextmanager
def warmfront(path: Path, dtype: str, selector: str, task: Task, facts: dict[str, int]) -> Iterator[Measure]:
    """Our engine; the bytes of weights that a token reads are added to `facts`."""
    load = partial(Engine.load, str(path), threads=task.threads, context=task.context, gpu="none")
    try:
        engine = load(dtype=dtype, selector=selector)
    except WarmfrontError as error:
        raise Skip(str(error)) from error

    def turn(task: Task) -> Sample:
        engine.reset()
        list(engine.generate(task.prefill, max_new_tokens=1))
        prefill = engine.stats.prefill_tps
        engine.reset()
        answer = tuple(engine.decode_ids(task.prompt, task.tokens))
        return Sample(engine.stats.decode_tps, prefill, answer)

    with engine:
        turn(task)
        workers = engine.statistics.workers()
        neurons = sum(worker.bytes for worker in workers) * engine.model.spec.layers / workers[0].jobs
        facts["bytes_per_token"] = round(sum(engine.statistics.coordinator_bytes().values()) + neurons)
        yield partial(turn, task)


@contextlib.contextmanager
def powerinfer(path: Path, task: Task) -> Iterator[Measure]:
    """PowerInfer's `main`, a process for each prompt; its own timing lines leave loading out."""
    main = os.environ.get(POWERINFER)
    if not main or not os.access(main, os.X_OK):
        raise Skip(f"{POWERINFER}={main} cannot be run" if main else f"{POWERINFER} is not set to the path of its main")
    options = f"-t {task.threads} -c {task.context} --temp 0 --repeat-penalty 1.0 --ignore-eos --verbose-prompt"

    def run(ids: list[int], tokens: int, phase: str) -> tuple[float, str]:
        # It takes text, puts BOS before it and finds the words of the synthetic models in their vocabulary.
        text = "".join(f"▁w{token}" for token in ids[1:])
        command = [os.path.abspath(main), "-m", str(path.resolve()), "-n", str(tokens), "-p", text, *options.split()]
        with tempfile.TemporaryDirectory() as folder:  # where it leaves a log
            done = subprocess.run(command, cwd=folder, capture_output=True, encoding="utf-8", errors="replace")
        rate = re.search(rf": +{phase} time = .* ([\d.]+) tokens per second", done.stderr)
        if done.returncode != 0 or rate is None:
            errors = [line for line in done.stderr.splitlines() if "error" in line]
            raise Skip(errors[0] if errors else f"exit code {done.returncode}, no times among its last lines")
        if [int(token) for token in re.findall(r"^ *(\d+) -> '", done.stderr, re.MULTILINE)] != ids:
            raise Skip("it reads other tokens than the prompt's; the vocabulary must have ▁w300 to ▁w510 as 300 to 510")
        return float(rate[1]), done.stdout

    def turn() -> Sample:
        prefill, _ = run(task.prefill, 1, "prompt eval")
        decode, answer = run(task.prompt, task.tokens + 1, "eval")
        return Sample(decode, prefill, answer)

    turn()
    yield turn


def llama_cpp_feed(path: str, task: Task) -> Feed:
    import llama_cpp as api

    sizes = {"n_ctx": task.context, "n_batch": task.context}
    model = api.Llama(path, n_threads=task.threads, n_threads_batch=task.threads, verbose=False, **sizes)

    def feed(ids: list[int], restart: bool) -> int:
        if restart:
            api.llama_memory_clear(api.llama_get_memory(model.ctx), True)
        tokens = (api.llama_token * len(ids))(*ids)  # the batch only points to it
        if api.llama_decode(model.ctx, api.llama_batch_get_one(tokens, len(ids))) != 0:
            raise RuntimeError("llama_decode failed")
        return int(np.ctypeslib.as_array(api.llama_get_logits_ith(model.ctx, -1), (model.n_vocab(),)).argmax())

    return feed


def transformers_feed(path: str, task: Task) -> Feed:
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    torch.set_num_threads(task.threads)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16)
    cache: list[Any] = [None]

    @torch.inference_mode()
    def feed(ids: list[int], restart: bool) -> int:
        past = None if restart else cache[0]
        out = model(torch.tensor([ids]), past_key_values=past, use_cache=True, logits_to_keep=1)
        cache[0] = out.past_key_values
        return int(out.logits[0, -1].argmax())

    return feed


_feed: list[Feed] = []  # in a child: the engine that it has loaded


def load_feed(load: Callable[[str, Task], Feed], path: str, task: Task) -> None:
    _feed.append(load(path, task))
    feed_turn(task)


def feed_turn(task: Task) -> Sample:
    feed = _feed[0]
    started = time.perf_counter()
    feed(task.prefill, True)
    prefill = len(task.prefill) / (time.perf_counter() - started)
    answer = [feed(task.prompt, True)]
    started = time.perf_counter()
    for _ in range(task.tokens):
        answer.append(feed(answer[-1:], False))
    return Sample(task.tokens / (time.perf_counter() - started), prefill, tuple(answer))


@contextlib.contextmanager
def child(load: Callable[[str, Task], Feed], path: Path, task: Task) -> Iterator[Measure]:
    """A peer that runs in Python, in a process of its own: its threads and memory end with it."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:

        def ask(what: Callable[..., Any], *arguments: Any) -> Any:
            try:
                return pool.submit(what, *arguments).result()
            except Exception as error:
                raise Skip(f"{type(error).__name__}: {error}".partition("\n")[0]) from error

        ask(load_feed, load, str(path), task)
        yield partial(ask, feed_turn, task)


def rows_of(model: Path, task: Task, options: argparse.Namespace) -> dict[str, list[Contender]]:
    """The contenders by row, ours first."""

    def ours(path: Path, dtype: str, selector: str) -> Contender:
        contender = Contender("", path, lambda: warmfront(path, dtype, selector, task, contender.facts))
        contender.name = f"warmfront {dtype} {selector}"
        return contender

    def theirs(name: str, file: str, load: Callable[[str, Task], Feed] = llama_cpp_feed) -> Contender:
        return Contender(name, model / file, lambda: child(load, model / file, task))

    if model.is_file():
        return {"gguf": [ours(model, "auto", "auto"), theirs("llama.cpp", "")]}
    sparse = model / "powerinfer-f16.gguf"
    source = sparse if sparse.is_file() else model / "hf"
    f16 = [ours(source, "f16", "lowrank"), Contender("PowerInfer f16", sparse, lambda: powerinfer(sparse, task))]
    f16 += [theirs("llama.cpp f16", "f16.gguf"), ours(source, "f16", "exact")]
    if options.transformers:
        f16.append(theirs("transformers bf16", "hf", transformers_feed))
    q8 = [ours(source, "q8", "lowrank"), theirs("llama.cpp q8_0", "q8_0.gguf")]
    q4 = [ours(source, "q4", "lowrank"), theirs("llama.cpp q4_0", "q4_0.gguf")]
    return {"f16": f16, "q8": q8, "q4": q4}


def compare(contenders: list[Contender], rounds: int) -> dict[str, list[float]]:
    """Take turns with one peer after the other; returns what was measured of the machine meanwhile."""
    ours, *peers = contenders
    bandwidth = Bandwidth(sorted(os.sched_getaffinity(0)))
    seen: dict[str, list[float]] = {"bandwidth": [], "others": []}

    def look() -> None:
        patience = time.monotonic() + PATIENCE_S
        while (busy := others_share()) > QUIET and time.monotonic() < patience:
            pass
        seen["others"].append(busy)
        seen["bandwidth"].append(bandwidth.measure())

    def turns(mine: Measure, peer: Contender | None = None, theirs: Measure | None = None) -> None:
        for _ in range(rounds):
            look()
            ours.samples.append(mine())
            if peer is not None and theirs is not None:
                peer.samples.append(theirs())
                (mine_decode, mine_prefill, _), (decode, prefill, _) = ours.samples[-1], peer.samples[-1]
                peer.ratios.append((mine_decode / decode, mine_prefill / prefill))
        look()

    with ours.load() as mine:
        for peer in peers:
            try:
                with peer.load() as theirs:
                    turns(mine, peer, theirs)
            except Skip as skip:
                print(f"{peer.name} skipped: {skip}", flush=True)
        if not ours.samples:
            turns(mine)
    return seen


def spread(values: list[float]) -> dict[str, float]:
    found = {"median": statistics.median(values), "min": min(values), "max": max(values)}
    return {name: round(value, 2) for name, value in found.items()}


def report(contenders: list[Contender], seen: dict[str, list[float]]) -> dict[str, Any]:
    """Print a row as a table; returns it for JSON."""
    result: dict[str, Any] = {name: spread(values) for name, values in seen.items()}
    table: list[tuple[str, ...]] = [("", "decode tok/s", "prefill tok/s", "ours: decode, prefill", "answers")]
    shown = "{median:.1f} ({min:.1f}-{max:.1f})"
    for one in contenders:
        if not one.samples:
            continue
        rates = {name: spread([getattr(sample, name) for sample in one.samples]) for name in ("decode", "prefill")}
        answers = len({sample.answer for sample in one.samples})
        entry: dict[str, Any] = {**rates, "turns": len(one.samples), "distinct_answers": answers, **one.facts}
        result[one.name] = entry
        if "bytes_per_token" in entry:
            used = rates["decode"]["median"] * entry["bytes_per_token"] / 1e9
            entry["bandwidth_share"] = round(used / result["bandwidth"]["median"], 3)
        if one.ratios:
            entry["ratio"] = [round(statistics.median(values), 3) for values in zip(*one.ratios, strict=True)]
        ratio = "{:.2f}x, {:.2f}x".format(*entry["ratio"]) if one.ratios else ""
        table.append((one.name, *(shown.format(**rate) for rate in rates.values()), ratio, f"{answers}"))
    print("\n".join("{:24}{:>24}{:>26}{:>24}{:>10}".format(*cells) for cells in table))
    busy = "others used {median:.0%} of the cores ({min:.0%}-{max:.0%})".format(**result["others"])
    warning = "; engines whose threads spin lose most by that" if result["others"]["max"] > QUIET else ""
    said = ", {} reads {:.0f} MB a token: {:.0%} of it"
    share = "".join(
        said.format(one.name, one.facts["bytes_per_token"] / 1e6, result[one.name]["bandwidth_share"])
        for one in contenders
        if one.samples and one.facts
    )
    print(f"read bandwidth {shown.format(**result['bandwidth'])} GB/s{share}; {busy}{warning}\n", flush=True)
    return result


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default=DEFAULT_MODEL)
    for name, default in (("threads", 2), ("rounds", 5), ("tokens", 64), ("prompt-tokens", 16), ("prefill", 512)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--only", help="rows, or first words of peers' names, with commas between them")
    parser.add_argument("--transformers", action="store_true")
    options = parser.parse_args()
    counts = (options.threads, options.rounds, options.tokens, options.prompt_tokens, options.prefill)
    if min(counts) < 1:
        sys.exit("all counts must be 1 or more")
    try:
        model = find_model(options.model, print)
    except WarmfrontError as error:
        sys.exit(str(error))
    prompts = [[BOS, *(FIRST_ID + at % IDS for at in range(count - 1))] for count in counts[3:]]
    rows = rows_of(model, Task(options.threads, options.tokens, *prompts), options)
    result: dict[str, Any] = {"wish": vars(options), "rows": {}}
    for row, (ours, *peers) in rows.items():
        names = (options.only or row).lower().split(",")
        peers = [peer for peer in peers if row in names or peer.name.lower().split()[0] in names]
        if row not in names and not peers:
            continue
        try:
            for peer in [peer for peer in peers if not peer.path.exists()]:
                print(f"{peer.name} skipped: no {peer.path}")
                peers.remove(peer)
            seen = compare([ours, *peers], options.rounds)
        except Skip as skip:
            print(f"row {row} skipped: {skip}", flush=True)
        else:
            result["rows"][row] = report([ours, *peers], seen)
    if not result["rows"]:
        sys.exit(f"nothing was measured; --only takes rows ({', '.join(rows)}) and peers")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
