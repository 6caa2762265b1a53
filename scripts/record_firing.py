"""Records which neurons a model fires while it writes, for `simulate_balancing.py` and `bench_balancing.py`.

    python scripts/record_firing.py MODEL OUT.npz [--topics 4] [--walk 0,1,2] [--tokens 2000] [--dtype auto] [--seed 0]

The model writes greedily. The topic changes at even intervals, by a word of the next topic in place of the model's own
(`make_synthetic_model.py --topics`: word w belongs to topic (w - 259) % topics); `--walk` says which ones follow each
other, all in turn by default. OUT has `fired`, uint32 [tokens,
layers, groups], bit i = neuron i of the group, `ids`, int64 [tokens], and `about`, JSON. The last line of stdout is
JSON.
"""

import argparse
import json
import time
from pathlib import Path

import numpy as np
import numpy.typing as npt

from warmfront.coordinator import Engine

FIRST_WORD = 259


def starts(topics: int, vocab: int, seed: int) -> list[int]:
    """A word of each topic."""
    rng = np.random.default_rng(seed)
    return [FIRST_WORD + topic + topics * int(rng.integers((vocab - FIRST_WORD) // topics)) for topic in range(topics)]


def record(
    engine: Engine, topics: int, walk: list[int], tokens: int, seed: int
) -> tuple[npt.NDArray[np.uint32], list[int]]:
    """Masks of the neurons that each token fires, and the ids of the tokens; `walk`: topics that follow each other."""
    words = starts(topics, engine.model.spec.vocab, seed)
    fired, ids, token = [], [], 0
    engine.reset()
    for step in range(tokens):
        part = step * len(walk) // tokens
        if step == 0 or part != (step - 1) * len(walk) // tokens:
            token = words[walk[part]]
        ids.append(token)
        token = int(np.argmax(engine.step(token)))
        fired.append(engine.ownership.fired())
    return np.stack(fired), ids


def main() -> None:
    """Run as a script."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("out", type=Path)
    parser.add_argument("--topics", type=int, default=4)
    parser.add_argument("--walk", type=lambda text: [int(topic) for topic in text.split(",")])
    parser.add_argument("--tokens", type=int, default=2000)
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    walk = options.walk or list(range(options.topics))
    with Engine.load(options.model, dtype=options.dtype, gpu="none", context=options.tokens, say=print) as engine:
        spec, layout = engine.model.spec, engine.model.layout
        started = time.perf_counter()
        fired, ids = record(engine, options.topics, walk, options.tokens, options.seed)
        rate = options.tokens / (time.perf_counter() - started)
    about = {
        "name": f"{spec.name}, {len(walk)} topics",
        "hidden": spec.hidden,
        "ffn": spec.ffn,
        "row_bytes": layout.gate_row_bytes,
        "switches": [-(-options.tokens * part // len(walk)) for part in range(1, len(walk))],
    }
    np.savez_compressed(options.out, fired=fired, ids=np.array(ids), about=json.dumps(about))
    active = float(np.bitwise_count(fired).mean() / 32)
    print(
        json.dumps(
            {"file": str(options.out), "tokens": len(ids), "active": round(active, 4), "tok_s": round(rate, 1), **about}
        )
    )


if __name__ == "__main__":
    main()
