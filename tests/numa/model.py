"""A small random model for the emulated machine; run as a program, it compiles the kernels for it.

python -m tests.numa.model       beforehand, on any machine; the kernels go to the cache folder

Its answer is kept for the machine, too, where a minute goes by until a model is loaded.
"""

import json
import os
import tempfile
from pathlib import Path
from typing import Any

from tests.conftest import GGUF_SHAPES, write_gguf

LAYERS, VOCAB = 2, 2048
TOKENS = 32
ANSWER = Path(__file__).with_name("answer.json")
PROMPT = [300, 301, 302, 400, 333]


def write_model(path: Path) -> Path:
    """A GGUF file in float16: 0.8 MB of neurons a layer, 1 MB in the embedding. A token takes 50 ms there."""
    shapes = GGUF_SHAPES | {"token_embd.weight": (VOCAB, 256)}
    parts = {name.removeprefix("blk.0."): shape for name, shape in shapes.items() if name.startswith("blk.0.")}
    shapes |= {f"blk.{layer}.{part}": shape for layer in range(1, LAYERS) for part, shape in parts.items()}
    write_gguf(path, fields={"llama.block_count": LAYERS}, shapes=shapes)
    return path


def answer(path: Path, **overrides: Any) -> list[int]:
    """What the model at `path` says to the prompt: TOKENS ids."""
    from warmfront.coordinator.engine.engine import Engine

    with Engine.load(str(path), gpu="none", context=64, tuning=False, **overrides) as engine:
        return engine.decode_ids(PROMPT, TOKENS)


def _compile() -> None:
    from warmfront.coordinator.hardware.bandwidth import Bandwidth

    Bandwidth([min(os.sched_getaffinity(0))])  # compiles what measures
    with tempfile.TemporaryDirectory() as folder:
        model = write_model(Path(folder) / "model.gguf")
        ANSWER.write_text(json.dumps(answer(model, workers=1)))
        # Two workers of unequal speed: what decides about moves is compiled too.
        answer(model, workers=2, slow="cpu0:4")


if __name__ == "__main__":
    _compile()
