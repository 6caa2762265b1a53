"""What a layer costs beyond its bytes: posting the job, waking the worker, barriers, merging.

Two measurements. First, hand-overs alone: two threads that announce and await in turn, on one core (by yielding) and
on two. Second, whole layers: a Llama of 48 layers whose weights fit the first cache, so that a decode step consists
almost only of hand-overs; its time per layer is the overhead. The last line of stdout is JSON.

    python scripts/bench_handoff.py [--threads 2] [--rounds 5]
"""

import argparse
import json
import os
import statistics
import tempfile
import threading
import time
from pathlib import Path

import numpy as np

from warmfront.coordinator import Engine
from warmfront.shared.kernels.jit import kernel
from warmfront.shared.machine.memory import address
from warmfront.shared.wire.handoff import LINE, announce, await_sequence

LAYERS = 48
# Of a layer in a trace: seven of the coordinator, one of the worker.
EVENTS = 8
TURNS = 20_000


@kernel
def turns(mine: int, other: int, abort: int, first: int, count: int) -> None:
    """Announce and await in turn."""
    for turn in range(1, count + 1):
        if first:
            announce(mine, turn)
            await_sequence(other, turn, abort, 0, 0)
        else:
            await_sequence(other, turn, abort, 0, 0)
            announce(mine, turn)


def round_trip_us(cpus: tuple[int, int]) -> float:
    """Microseconds of a round trip between threads pinned to `cpus`."""
    lines = np.zeros(4 * LINE // 8, np.int64)
    base = address(lines)

    def run(number: int, count: int) -> None:
        os.sched_setaffinity(0, {cpus[number]})
        turns(base + LINE * number, base + LINE * (1 - number), base + 2 * LINE, 1 - number, count)

    turns(base, base, base + 2 * LINE, 0, 0)
    threads = [threading.Thread(target=run, args=(number, TURNS)) for number in (0, 1)]
    started = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return (time.perf_counter() - started) / TURNS * 1e6


def write_model(folder: Path) -> None:
    """A Llama of LAYERS tiny layers with random weights."""
    import torch
    from safetensors.torch import save_file

    hidden, ffn, vocab = 64, 64, 64
    shapes = {"model.embed_tokens.weight": (vocab, hidden), "model.norm.weight": (hidden,)}
    for layer in range(LAYERS):
        prefix = f"model.layers.{layer}."
        shapes |= {prefix + f"self_attn.{name}_proj.weight": (hidden, hidden) for name in "qkvo"}
        shapes |= {prefix + f"mlp.{name}_proj.weight": (ffn, hidden) for name in ("gate", "up")}
        shapes |= {prefix + "mlp.down_proj.weight": (hidden, ffn)}
        shapes |= {prefix + f"{name}_layernorm.weight": (hidden,) for name in ("input", "post_attention")}
    torch.manual_seed(0)
    save_file({name: torch.randn(shape) * 0.05 for name, shape in shapes.items()}, folder / "model.safetensors")
    config = {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": hidden,
        "intermediate_size": ffn,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "vocab_size": vocab,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 256,
        "tie_word_embeddings": True,
    }
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")


def layer_us(folder: Path, threads: int, rounds: int) -> float:
    """Median microseconds of a layer of the tiny model, by the trace of single tokens."""
    with tempfile.TemporaryDirectory() as traces:
        file = Path(traces) / "trace.json"
        with Engine.load(str(folder), threads=threads, trace=str(file)) as engine:
            for _ in range(rounds):
                engine.reset()
                engine.decode_ids([1, 2, 3], 200)
        events = [event for event in json.loads(file.read_text(encoding="utf-8"))["traceEvents"] if event["ph"] == "X"]
    tokens: dict[int, list[float]] = {}
    for number, event in enumerate(event for event in events if event["args"]["tokens"] == 1):
        tokens.setdefault(number // (LAYERS * EVENTS), []).extend((event["ts"], event["ts"] + event["dur"]))
    return statistics.median((max(times) - min(times)) / LAYERS for times in tokens.values())


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=min(2, len(os.sched_getaffinity(0))))
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    cpus = sorted(os.sched_getaffinity(0))
    result = {"round_trip_one_core_us": round(round_trip_us((cpus[0], cpus[0])), 2)}
    if len(cpus) > 1:
        result["round_trip_two_cores_us"] = round(round_trip_us((cpus[0], cpus[1])), 2)
    with tempfile.TemporaryDirectory() as folder:
        write_model(Path(folder))
        result["layer_us"] = round(layer_us(Path(folder), options.threads, options.rounds), 2)
    for name, value in result.items():
        print(f"{name:28} {value}")
    print(json.dumps(result | {"threads": options.threads}))


if __name__ == "__main__":
    main()
