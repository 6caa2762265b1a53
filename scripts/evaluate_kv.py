"""What 8-bit keys and values cost: the perplexity of a text with `--kv q8` beside that with f16.

Teacher-forced in segments of --tokens: a prefill of half of each, then token by token, so that both ways of attention
count. The text is --text FILE, by default README.md, docs/ and LICENSE of this repository.

    python scripts/evaluate_kv.py [MODEL] [--tokens 2048] [--segments 4] [--dtype auto] [--text FILE]

The last line is JSON.
"""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from warmfront.coordinator import Engine

ROOT = Path(__file__).parents[1]


def losses(engine: Engine, ids: list[int], tokens: int) -> Iterator[float]:
    """-log p of the second half of each segment of `ids`."""
    for start in range(0, len(ids) - tokens + 1, tokens):
        segment = ids[start : start + tokens]
        for logits, token in zip(engine.forced_logits(segment, tokens // 2), segment[tokens // 2 :], strict=False):
            wide = logits.astype(np.float64)
            top = wide.max()
            yield float(top + np.log(np.exp(wide - top).sum()) - wide[token])


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="smollm2-135m")
    parser.add_argument("--tokens", type=int, default=2048, help="of a segment")
    parser.add_argument("--segments", type=int, default=4)
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--text", type=Path)
    options = parser.parse_args()
    files = (
        [options.text]
        if options.text
        else [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), ROOT / "LICENSE"]
    )
    text = "\n".join(file.read_text(encoding="utf-8") for file in files)
    result: dict[str, float] = {}
    for kv in ("f16", "q8"):
        with Engine.load(options.model, dtype=options.dtype, kv=kv, context=options.tokens + 1, gpu="none") as engine:
            ids = engine.tokenizer.encode(text)[: options.tokens * options.segments]
            each = list(losses(engine, ids, options.tokens))
        result[kv] = float(np.exp(np.mean(each)))
        print(f"{kv}: perplexity {result[kv]:.5f} of {len(each)} tokens", flush=True)
    print(json.dumps(result | {"q8 above f16": result["q8"] / result["f16"] - 1}))


if __name__ == "__main__":
    main()
