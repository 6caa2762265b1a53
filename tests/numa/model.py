"""A small random model for the emulated machine; run as a program, it compiles the kernels for it.

python -m tests.numa.model       beforehand, on any machine; the kernels go to the cache folder
"""

import os
import tempfile
from pathlib import Path

from tests.conftest import GGUF_SHAPES, write_gguf

LAYERS, VOCAB = 2, 2048
PROMPT = [300, 301, 302, 400, 333]


def write_model(path: Path) -> Path:
    """A GGUF file in float16: 0.8 MB of neurons a layer, 1 MB in the embedding. A token takes 50 ms there."""
    shapes = GGUF_SHAPES | {"token_embd.weight": (VOCAB, 256)}
    parts = {name.removeprefix("blk.0."): shape for name, shape in shapes.items() if name.startswith("blk.0.")}
    shapes |= {f"blk.{layer}.{part}": shape for layer in range(1, LAYERS) for part, shape in parts.items()}
    write_gguf(path, fields={"llama.block_count": LAYERS}, shapes=shapes)
    return path


def _compile() -> None:
    from warmfront.coordinator.engine.engine import Engine
    from warmfront.coordinator.hardware.bandwidth import Bandwidth

    Bandwidth([min(os.sched_getaffinity(0))])  # compiles what measures
    with tempfile.TemporaryDirectory() as folder:
        model = write_model(Path(folder) / "model.gguf")
        with Engine.load(str(model), threads=1, gpu="none", context=64, tuning=False) as engine:
            engine.decode_ids(PROMPT, 2)


if __name__ == "__main__":
    _compile()
