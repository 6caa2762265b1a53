"""Writes a ReLU-gated Llama with random weights: any shape and sparsity, an exact low-rank predictor, several formats.

    python scripts/make_synthetic_model.py OUT_FOLDER [--hidden 2048] [--layers 20] [--ffn 8192] [--active 0.10] ...

OUT_FOLDER gets `hf/` (a Hugging Face folder and `predictor.safetensors`), `powerinfer-f16.gguf` (PowerInfer's format)
and `f16.gguf`, `q8_0.gguf`, `q4_0.gguf` (the same weights for llama.cpp, which computes SiLU: for speed only). The
last line of stdout is JSON. The same arguments give the same bytes on the same machine.

What makes the model behave like a sparse one:

- Channel 0 of the residual stream is constant: the embedding sets it and no layer writes it, so it acts as a bias.
- A gate row is U P - b e0, with P of `--rank` orthonormal rows. The sign of the gate is that of U P x - b x0, so the
  predictor fc1 = [P, -P, e0], ReLU, fc2 = [U, -U, -b] is exact on the residual stream before the norm. fc1 and fc2
  are padded with zeros to a multiple of 64, which PowerInfer's CUDA kernels assume.
- b is a quantile of U P x / x0 over sample texts, so that neuron i fires with probability p_i in every layer. The p_i
  follow a power law: their mean is `--active`, and a fifth of the neurons, at random places, makes 80 % of the firing.
- The head's row of a word is the embedding of the word before it on a random cycle through the words, so greedy text
  follows the cycle with wide margins. Bytes and special tokens look like words to the layers, but have no row in the
  head: text has words only. A lower `--logit` than the usual one makes margins narrow, so that errors can be measured
  by the perplexity of text that the model writes at temperature 1.
- With `--topics T`, word w belongs to topic (w - 259) % T, its embedding leans to the topic's direction, which every P
  sees, and cycles stay within topics: which neurons are hot depends on the topic.

With `--experts E --used K` it is a mixture of experts instead, a Mixtral with SiLU, which all formats and programs
compute alike; there are no predictors and no `powerinfer-f16.gguf`. The router's rows are made as those of gates are,
positive as often as their expert is to be used: `--skew S` of the choices fall on a tenth of the experts, or as near
to that as the shape allows; about a tenth is flat. `firing` in the JSON is what they got in each layer. With
`--expert-activation relu` it is a Mixtral with ReLU, of whose experts' neurons `--active` fire for any token; programs
that read GGUF take it for SiLU.
"""

import argparse
import errno
import json
import math
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import NoReturn, Protocol

import torch
from gguf import GGMLQuantizationType as Type
from synthetic.gguf_file import Gguf
from synthetic.hf_folder import open_hf
from synthetic.shape import PREDICTOR, Shape, firing_rates
from synthetic.weights import Maker
from torch import Tensor

FORMATS = ("hf", "powerinfer", "gguf-f16", "gguf-q8_0", "gguf-q4_0")
DTYPES = {"f16": torch.float16, "f32": torch.float32, "bf16": torch.bfloat16}


class Sink(Protocol):
    """A file that takes the tensors as they are made."""

    nbytes: int

    def write(self, name: str, values: Tensor) -> None:
        """Write the tensor if the file has it; they must come in the order of `Shape.tensors`."""

    def close(self) -> None:
        """Close the file, whole or not."""


def open_sink(folder: Path, name: str, shape: Shape, dtype: torch.dtype) -> Sequence[Sink]:
    """The files of one of FORMATS, open and without weights yet."""
    if name == "hf":
        return open_hf(folder / "hf", shape, dtype)
    if name == "powerinfer":
        return [Gguf(folder / "powerinfer-f16.gguf", shape, Type.F16, predictor=True)]
    kind = name.removeprefix("gguf-")
    return [Gguf(folder / f"{kind}.gguf", shape, Type[kind.upper()], predictor=False)]


def write_model(folder: Path, maker: Maker, formats: Sequence[str]) -> None:
    """Write the model in all `formats` to `folder`; raises OSError where there is no room, or where writing fails."""
    with ExitStack() as stack:
        sinks = [sink for name in formats for sink in open_sink(folder, name, maker.shape, maker.dtype)]
        for sink in sinks:
            stack.callback(sink.close)
        needed, free = sum(sink.nbytes for sink in sinks), shutil.disk_usage(folder).free
        if needed > free:
            raise OSError(errno.ENOSPC, f"{needed / 1e9:.1f} GB are needed and {free / 1e9:.1f} GB are free")
        started = time.perf_counter()
        for name, values in maker.weights():
            for sink in sinks:
                sink.write(name, values)
            # The last of a layer.
            if name.endswith((".fc2", f".experts.{maker.shape.experts - 1}.down")):
                done, seconds = len(maker.firing), time.perf_counter() - started
                what = "firing" if not maker.shape.experts else "of the choices fall on a tenth of the experts"
                print(f"layer {done}/{maker.shape.layers}: {maker.firing[-1]:.1%} {what}, {seconds:.0f} s", flush=True)


class Parser(argparse.ArgumentParser):
    """A parser whose errors are one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}\n")


def parse(arguments: Sequence[str] | None) -> tuple[argparse.Namespace, Shape]:
    """The options and the shape that they give; exits with code 2 if they make no model."""
    parser = Parser(
        prog="make_synthetic_model.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path, metavar="OUT_FOLDER", help="is created; it must not exist, or be empty")
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--layers", type=int, default=20)
    parser.add_argument("--ffn", type=int, default=8192)
    parser.add_argument("--heads", type=int, default=16)
    parser.add_argument("--kv-heads", type=int, default=16)
    parser.add_argument("--vocab", type=int, default=32000)
    parser.add_argument("--rank", type=int, default=63, help="of the gate matrices")
    parser.add_argument("--active", type=float, default=0.10, help="share of the neurons that a token fires")
    parser.add_argument("--topics", type=int, default=1)
    parser.add_argument("--logit", type=float, default=20.0, help="of the next word; about 10: errors change the text")
    parser.add_argument("--experts", type=int, default=0, help="of a layer; 0: it is no mixture")
    parser.add_argument("--used", type=int, default=0, help="experts that a token uses")
    parser.add_argument("--expert-activation", choices=("silu", "relu"), default="silu", help="relu: --active fire")
    parser.add_argument("--skew", type=float, default=0.8, help="share of the choices that a tenth of the experts gets")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--context", type=int, default=4096)
    parser.add_argument("--dtype", choices=DTYPES, default="f16", help="of hf/, which the other files are made from")
    parser.add_argument("--formats", default=",".join(FORMATS), help="default: %(default)s")
    options = parser.parse_args(arguments)
    names = list(Shape.__dataclass_fields__)
    shape = Shape(**{name: getattr(options, name) for name in names})
    problem = shape.check()
    options.formats = [name for name in options.formats.split(",") if name]
    if shape.experts > 0:
        options.formats = [name for name in options.formats if name != "powerinfer"]
    unknown = [name for name in options.formats if name not in FORMATS]
    if problem:
        parser.error(problem)
    if not 0.005 <= options.active <= 0.5:
        parser.error("--active must be between 0.005 and 0.5")
    if not 0.1 <= options.skew <= 0.95:
        parser.error("--skew must be between 0.1 and 0.95")
    if options.seed < 0:
        parser.error("--seed must not be negative")
    if unknown or not options.formats:
        parser.error(f"--formats: '{','.join(unknown)}' is not one of {', '.join(FORMATS)}")
    if options.out.exists() and (not options.out.is_dir() or any(options.out.iterdir())):
        parser.error(f"{options.out} exists already")
    if not options.out.absolute().parent.is_dir():
        parser.error(f"{options.out.parent} is not a folder")
    return options, shape


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the model; returns the exit code."""
    options, shape = parse(arguments)
    started = time.perf_counter()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the order of sums, and so their last bits, depends on how many there are
    folder = None
    try:
        # Beside its final place, so that one rename brings the whole folder there.
        folder = Path(tempfile.mkdtemp(prefix=f".{options.out.name}.", dir=options.out.absolute().parent))
        rates = firing_rates(shape.ffn, options.active)
        uses = firing_rates(shape.experts, shape.used / shape.experts, 0.1, options.skew) if shape.experts else rates
        maker = Maker(shape, rates, uses, options.seed, DTYPES[options.dtype])
        with torch.inference_mode():
            write_model(folder, maker, list(dict.fromkeys(options.formats)))
        sizes = {str(p.relative_to(folder)): p.stat().st_size for p in sorted(folder.rglob("*")) if p.is_file()}
        folder.chmod(0o755)
        os.rename(folder, options.out)
    except OSError as error:
        reason = error.strerror or "the disk did not take all of it"  # numpy's errors have no text
        print(f"make_synthetic_model.py: cannot write {options.out}: {reason}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("make_synthetic_model.py: interrupted", file=sys.stderr)
        return 130
    finally:
        torch.set_num_threads(threads)
        if folder is not None:
            shutil.rmtree(folder, ignore_errors=True)
    count = sum(math.prod(size) for name, size in shape.tensors() if name.rpartition(".")[2] not in PREDICTOR)
    result = {
        "parameters": count,
        "firing": [round(share, 4) for share in maker.firing],
        "seconds": round(time.perf_counter() - started, 1),
        "bytes": sizes,
    }
    print(json.dumps(result))
    return 0


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that `finally` removes what is half written
    sys.exit(main())
