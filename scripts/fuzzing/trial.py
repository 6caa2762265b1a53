"""A model file read, packed and its tokenizer tried in a child with bounds on its memory and time."""

import os
import resource
import signal
import tempfile
import time
import traceback
from dataclasses import dataclass
from pathlib import Path

import numpy as np

import warmfront.coordinator.models.gguf.reader
import warmfront.coordinator.models.hf.reader  # noqa: F401  # both are imported late elsewhere: not anew in every child
from warmfront.coordinator.models.packed_tokenizer import Tables
from warmfront.coordinator.packing.packer import ensure_packed
from warmfront.coordinator.text.merging_kernels import merge_words
from warmfront.coordinator.text.tokenizer import Tokenizer
from warmfront.shared.errors import WarmfrontError
from warmfront.shared.kernels.jit import compile_for
from warmfront.shared.model.formats import row_cols, unpack
from warmfront.shared.model.store import PackedModel

__all__ = ["Outcome", "attempt"]

MEMORY, SECONDS = 1 << 30, 10.0

# Once, not in every child, whose caches are empty.
_ids, _words = np.empty(0, np.int32), np.empty(0, np.uint32)
compile_for(merge_words, _ids, _ids, Tables(*[_words] * 6, texts=np.empty(0, np.uint8)), False)


@dataclass
class Outcome:
    """How a child ended: `kind` is packed, refused, or a violation; `said` is what it wrote to stderr."""

    kind: str
    said: str

    @property
    def violation(self) -> bool:
        return self.kind not in ("packed", "refused")


def attempt(path: Path, dtype: str, cache: Path) -> Outcome:
    """Read and pack the model at `path` in a child."""
    with tempfile.TemporaryFile() as output:
        pid = os.fork()
        if pid == 0:
            os._exit(_child(path, dtype, cache, output.fileno()))
        deadline = time.monotonic() + SECONDS
        while not (done := os.waitpid(pid, os.WNOHANG))[0]:
            if time.monotonic() > deadline:
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
                return Outcome("hang", "")
            time.sleep(0.001)
        output.seek(0)
        said = output.read().decode(errors="replace")
    code = os.waitstatus_to_exitcode(done[1])
    if code < 0:
        return Outcome(f"signal {-code}", said)
    if "MemoryError" in said:
        return Outcome("memory", said)
    lines = said.splitlines()
    if (code == 0 and lines) or (code == 1 and (len(lines) != 1 or not lines[0].isprintable())):
        return Outcome("not one line", said)
    return Outcome({0: "packed", 1: "refused"}.get(code, "traceback"), said)


def _child(path: Path, dtype: str, cache: Path, output: int) -> int:
    """The exit code: 0 packed, 1 refused in a line on stderr, 2 ended with a traceback there."""
    os.dup2(output, 2)
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
    limit = pages * resource.getpagesize() + MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    os.environ["XDG_CACHE_HOME"] = str(cache)
    try:
        with PackedModel(ensure_packed(path, dtype, lambda line: None, lambda done, total: None)) as packed:
            _check_numbers(packed)
            tokenizer = Tokenizer(packed)
            if tokenizer.present:
                tokenizer.decode(tokenizer.encode("w3 w4 abc <s1>" + "a" * 40 + "!"))
    except WarmfrontError as error:
        os.write(2, f"{error}\n".encode(errors="replace"))
        return 1
    except BaseException:
        os.write(2, traceback.format_exc().encode(errors="replace"))
        return 2
    return 0


def _check_numbers(packed: PackedModel) -> None:
    """Fail unless what was read without complaint makes sense: finite numbers, ids within the vocabulary."""
    spec, ids = packed.spec, [packed.text.get("bos_id"), *packed.text.get("eos_ids", ())]
    epsilon, rotary = spec.architecture.norm.epsilon, spec.architecture.positions.rotary
    assert 0 < epsilon < float("inf"), epsilon
    assert all(0 < frequency < float("inf") for table in rotary for frequency in table.frequencies), rotary
    assert all(0 <= i < spec.vocab for i in ids if i is not None), packed.text
    for name, entry in packed.entries.items():
        if entry.element == "F32":
            assert np.isfinite(packed.floats(name)).all(), name
        elif entry.kind is not None:
            rows = packed.bytes_of(name).reshape(entry.shape)
            cols = row_cols(entry.kind, entry.shape[1])
            assert np.isfinite(unpack(rows, entry.kind, cols)).all(), name
