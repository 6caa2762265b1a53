"""Decode speed against llama.cpp on the same GGUF file, alternately in one run.

Every new token reads all weights once: tok/s <= bandwidth / bytes. The measured read bandwidth of the same moment is
printed beside each round, since machines are shared. `pip install llama-cpp-python` for the comparison; without it
only warmfront is measured. The last line of stdout is JSON.

    python scripts/bench_decode.py [--model FILE.gguf] [--threads 2] [--rounds 5] [--tokens 128] [--dtype auto]
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from warmfront.coordinator import Engine
from warmfront.coordinator.default_model import DEFAULT_MODEL, resolve

PROMPT = "The lighthouse keeper wrote in his diary that"


def read_bandwidth() -> float:
    """GB/s of summing 1 GB from two threads."""
    import torch

    block = read_bandwidth.__dict__.setdefault("block", torch.ones(1 << 27, dtype=torch.int64))
    started = time.perf_counter()
    block.sum()
    return float(block.nbytes / (time.perf_counter() - started) / 1e9)


def ours(engine: Engine, tokens: int) -> tuple[float, list[int]]:
    """tok/s of one greedy answer, and its tokens."""
    engine.reset()
    ids = [token.id for token in engine.generate(PROMPT, max_new_tokens=tokens + 1)]
    return engine.stats.decode_tps, ids


def llama_cpp(path: str, threads: int) -> Callable[[int], float] | None:
    """A function that measures llama.cpp's tok/s, None if it is not installed."""
    try:
        import llama_cpp
    except ImportError:
        return None
    model = llama_cpp.Llama(path, n_ctx=1024, n_threads=threads, n_threads_batch=threads, verbose=False)
    prompt = model.tokenize(PROMPT.encode())

    def measure(tokens: int) -> float:
        model.reset()
        stream = model.generate(prompt, temp=0)
        next(stream)
        started = time.perf_counter()
        for _ in range(tokens):
            next(stream)
        return tokens / (time.perf_counter() - started)

    return measure


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=DEFAULT_MODEL)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--dtype", default="auto")
    wish = parser.parse_args()
    path = resolve(wish.model, print)
    result: dict[str, Any] = {"model": path.name, "threads": wish.threads, "tokens": wish.tokens, "dtype": wish.dtype}
    peer = llama_cpp(str(path), wish.threads)
    rows: dict[str, list[float]] = {"warmfront": [], "llama.cpp": [], "bandwidth": []}
    with Engine.load(str(path), threads=wish.threads, dtype=wish.dtype) as engine:
        layout = engine.model.layout
        size = sum(entry.nbytes for entry in engine.model.entries.values())
        result["weight_bytes"] = size
        result["bundle_bytes"] = layout.bundle_bytes
        ours(engine, 16)
        answers = set()
        for round_ in range(wish.rounds):
            rows["bandwidth"].append(read_bandwidth())
            rate, ids = ours(engine, wish.tokens)
            rows["warmfront"].append(rate)
            answers.add(tuple(ids))
            if peer is not None:
                rows["llama.cpp"].append(peer(wish.tokens))
            print(
                f"round {round_}: " + ", ".join(f"{name} {values[-1]:.1f}" for name, values in rows.items() if values)
            )
    result |= {name: round(statistics.median(values), 2) for name, values in rows.items() if values}
    result["same_tokens"] = len(answers) == 1
    result["roofline_share"] = round(float(np.median(rows["warmfront"])) * size / 1e9 / result["bandwidth"], 3)
    if peer is not None:
        result["ratio"] = round(result["warmfront"] / result["llama.cpp"], 3)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
