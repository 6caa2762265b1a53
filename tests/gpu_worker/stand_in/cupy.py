"""A stand-in for CuPy where there is no GPU: put this folder on the import path and `import cupy` finds it.

It has just the calls of CuPy that `CudaDevice` makes, over host memory, and runs the kernels of ffn.cu compiled for the
CPU (cuda_on_cpu.cpp) under the undefined-behaviour sanitizer, which reports misaligned loads. What is enqueued on a
stream is put off until an event behind it is waited for: who reads or overwrites too early gets wrong numbers. It notes
`copies` (to, from, bytes, stream) and `locked` (at, bytes). What passes on it has run on no card.
"""

import ctypes
import hashlib
import subprocess
import tempfile
from collections import deque
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

__version__ = "0+cpu"

# A folder that keeps compiled kernels, if it is set.
compiled = ""
copies: list[tuple[int, int, int, int]] = []
locked: list[tuple[int, int]] = []
streams: list["Stream"] = []


class Memory:
    def __init__(self, size: int) -> None:
        self.size = size
        # Freed bytes and unwritten bytes are NaN in every weight type.
        self._bytes = np.full(size + 64, 0xFF, np.uint8)
        self.ptr = self._bytes.ctypes.data + -self._bytes.ctypes.data % 64


class Stream:
    """What is enqueued waits in `later` until somebody waits for an event."""

    def __init__(self, non_blocking: bool) -> None:
        assert non_blocking
        self.ptr = len(streams)
        self.later: deque[Callable[[], object]] = deque()
        self.enqueued = self.done = 0
        streams.append(self)

    def enqueue(self, work: Callable[[], object]) -> None:
        self.later.append(work)
        self.enqueued += 1

    def run(self, until: int) -> None:
        while self.done < until:
            self.later.popleft()()
            self.done += 1


class Event:
    def __init__(self, block: bool = False, disable_timing: bool = False) -> None:
        self._recorded: tuple[Stream, int] | None = None

    def record(self, stream: Stream) -> None:
        self._recorded = stream, stream.enqueued

    def synchronize(self) -> None:
        if self._recorded is not None:
            stream, until = self._recorded
            stream.run(until)


def copy(to: int, source: int, size: int, kind: int, stream: int) -> None:
    copies.append((to, source, size, stream))
    streams[stream].enqueue(lambda: ctypes.memmove(to, source, size))


class Kernel:
    def __init__(self, function: Any) -> None:
        self._function = function

    def __call__(self, grid: tuple[int, ...], block: tuple[int, ...], args: tuple[Any, ...], stream: Stream) -> None:
        assert block == (256, 1, 1)
        types = {np.uint64: ctypes.c_void_p, np.int32: ctypes.c_int}
        values = [types[type(arg)](int(arg)) for arg in args]
        stream.enqueue(lambda: self._function((ctypes.c_uint * 3)(*grid), *values))


class RawModule:
    def __init__(self, *, code: str, options: tuple[str, ...]) -> None:
        with tempfile.TemporaryDirectory() as scratch:
            name = hashlib.sha256("\0".join((code, *options)).encode()).hexdigest()
            target = Path(compiled or scratch) / f"{name}.so"
            if not target.exists():
                (Path(scratch) / "ffn.cu").write_text(code)
                sanitize = "-fsanitize=alignment,bounds,shift,signed-integer-overflow"
                flags = ("-O1", "-shared", "-fPIC", sanitize, f"-I{scratch}", *options[1:], "-std=c++20")
                source = Path(__file__).parents[1] / "cuda_on_cpu.cpp"
                subprocess.run(["g++", *flags, str(source), "-o", str(target)], check=True)
            self._library = ctypes.CDLL(str(target))

    def get_function(self, name: str) -> Kernel:
        return Kernel(self._library[f"run_{name}"])


runtime = SimpleNamespace(
    getDeviceCount=lambda: 1,
    getDeviceProperties=lambda index: {"name": b"CPU stand-in"},
    memGetInfo=lambda: (1 << 26, 1 << 26),
    memcpyAsync=copy,
    hostRegister=lambda at, size, flags: locked.append((at, size)),
    hostUnregister=lambda at: locked.remove(next(part for part in locked if part[0] == at)),
    memcpyHostToDevice=1,
    memcpyDeviceToHost=2,
)


class Device:
    def __init__(self, index: int) -> None: ...
    def __enter__(self) -> None: ...
    def __exit__(self, *error: object) -> None: ...


cuda: Any = SimpleNamespace(
    runtime=runtime,
    Device=Device,
    Event=Event,
    Stream=Stream,
    memory=SimpleNamespace(Memory=Memory),
    alloc_pinned_memory=bytearray,
    get_elapsed_time=lambda begin, end: 0.5,
    compiler=SimpleNamespace(CompileException=type("CompileException", (Exception,), {})),
)
