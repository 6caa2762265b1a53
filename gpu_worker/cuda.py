"""The CUDA device, through CuPy: slots and workspace in device memory, the kernels of `ffn.cu` on one own stream.

Whatever crosses the bus goes through pinned staging by asynchronous copies. A call's copies, kernels and events are
enqueued at once; the host then waits for the last one. CuPy is imported when a device is opened, never before.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import numpy.typing as npt

from warmfront.gpu_worker import launch
from warmfront.gpu_worker.device import Bytes, Floats, Ledger, Words, ensure_fits
from warmfront.shared.bundle import BundleLayout
from warmfront.shared.errors import ResourceError

__all__ = ["CudaDevice"]

# Of each of the two pinned buffers that groups pass through: one is filled while the other is copied.
_STAGING_BYTES = 8 << 20

_BLOCK = (launch.THREADS, 1, 1)


class CudaDevice:
    """Card `index` as CUDA numbers the visible ones; raises ResourceError if CuPy or the card is missing."""

    def __init__(self, index: int) -> None:
        self.name = f"cuda:{index}"
        try:
            import cupy
        except ImportError as error:
            raise ResourceError(f"{self.name}: CuPy cannot be imported: install warmfront[cuda]") from error
        self._cuda: Any = cupy.cuda
        self._raw_module: Any = cupy.RawModule
        self._memory: dict[str, Any] = {}
        with self._guard("use"):
            if index >= self._cuda.runtime.getDeviceCount():
                raise ResourceError(f"{self.name}: no such CUDA device: {self._cuda.runtime.getDeviceCount()} visible")
            self._card = self._cuda.Device(index)
            self.name += " " + self._cuda.runtime.getDeviceProperties(index)["name"].decode()
            with self._card:
                self._stream = self._cuda.Stream(non_blocking=True)
                self._begin, self._end = self._cuda.Event(), self._cuda.Event()

    def free_bytes(self) -> int:
        with self._guard("query"), self._card:
            return int(self._cuda.runtime.memGetInfo()[0])

    def ledger(self, layout: BundleLayout, slots: int, max_tokens: int) -> Ledger:
        return {
            "slots": slots * layout.group_bytes,
            "activations": launch.workspace(layout, min(slots, layout.groups), max_tokens).total,
            "partials": launch.partial_rows(layout, max_tokens) * layout.hidden * 4,
        }

    def reserve(self, layout: BundleLayout, activation: int, slots: int, max_tokens: int) -> None:
        plan = self.ledger(layout, slots, max_tokens)
        ensure_fits(self, plan, slots)
        self._layout = layout
        self._offsets = launch.workspace(layout, min(slots, layout.groups), max_tokens)
        with self._guard("allocate"), self._card:
            self._memory = {purpose: self._cuda.memory.Memory(size) for purpose, size in plan.items()}
            # The pinned twin of the workspace, up to the end of `out`.
            self._pinned = self._pin(self._offsets.h)
            self._staging = [self._pin(max(layout.group_bytes, _STAGING_BYTES)) for _ in range(2)]
            self._staged = [self._cuda.Event(disable_timing=True) for _ in self._staging]
        with self._guard("compile kernels on"), self._card:
            module = self._raw_module(code=launch.source(), options=launch.options(layout, activation))
            self._gate_up, self._down, self._reduce = map(module.get_function, ("gate_up", "down", "reduce"))

    def allocated(self) -> Ledger:
        return {purpose: int(memory.size) for purpose, memory in self._memory.items()}

    def store(self, slot: int, group: Bytes) -> None:
        self.store_many(slot, group[None])

    def store_many(self, first_slot: int, groups: Bytes) -> None:
        size = self._layout.group_bytes
        batch = len(self._staging[0]) // size
        with self._guard("write to"), self._card:
            for turn, start in enumerate(range(0, len(groups), batch)):
                part = groups[start : start + batch]
                staging, staged = self._staging[turn % 2], self._staged[turn % 2]
                staged.synchronize()
                staging[: len(part) * size].reshape(part.shape)[:] = part
                self._upload(self._memory["slots"].ptr + (first_slot + start) * size, staging[: len(part) * size])
                staged.record(self._stream)

    def execute(
        self, slots: npt.NDArray[np.int32], x: Floats, sparse: bool, out: Floats, mask: Words | None = None
    ) -> tuple[int, int]:
        tokens, groups = len(x), len(slots)
        if groups == 0:
            out[:] = 0
            return 0, 0
        at, pinned = self._offsets, self._pinned
        row = 4 * tokens * self._layout.hidden
        pinned[at.ids : at.ids + 4 * groups].view(np.int32)[:] = slots
        words = pinned[at.mask : at.mask + 4 * groups].view(np.uint32)
        words[:] = 0xFFFFFFFF if mask is None else mask
        pinned[at.x : at.x + row].view(np.float32).reshape(x.shape)[:] = x
        pinned[at.active : at.active + 8] = 0
        with self._guard("compute on"), self._card:
            base = self._memory["activations"].ptr
            self._begin.record(self._stream)
            # ids, mask, x; then the zeroed counter.
            self._upload(base + at.ids, pinned[at.ids : at.x + row])
            self._upload(base + at.active, pinned[at.active : at.active + 8])
            self._launch(groups, tokens, sparse)
            self._download(pinned[at.active : at.out + row], base + at.active)
            self._end.record(self._stream)
            self._end.synchronize()
            busy = round(self._cuda.get_elapsed_time(self._begin, self._end) * 1e6)
        out[:] = pinned[at.out : at.out + row].view(np.float32).reshape(out.shape)
        active = int(pinned[at.active : at.active + 8].view(np.uint64)[0])
        return active if sparse else int(np.unpackbits(words.view(np.uint8)).sum()) * tokens, busy

    def close(self) -> None:
        self._memory = {}

    def _launch(self, groups: int, tokens: int, sparse: bool) -> None:
        grids = launch.grids(self._layout, groups, tokens)
        at, base = self._offsets, self._memory["activations"].ptr
        slots, ids = np.uint64(self._memory["slots"].ptr), np.uint64(base + at.ids)
        mask, x = np.uint64(base + at.mask), np.uint64(base + at.x)
        h, active, out = (np.uint64(base + offset) for offset in (at.h, at.active, at.out))
        partials = np.uint64(self._memory["partials"].ptr) if grids.segments > 1 else out
        n, t = np.int32(groups), np.int32(tokens)
        arguments = (slots, ids, mask, n, x, t, np.int32(sparse), h, active)
        self._gate_up(grids.gate_up, _BLOCK, arguments, stream=self._stream)
        self._down(grids.down, _BLOCK, (slots, ids, n, h, partials), stream=self._stream)
        if grids.segments > 1:
            length = np.int32(tokens * self._layout.hidden)
            self._reduce(grids.reduce, _BLOCK, (partials, np.int32(grids.segments), length, out), stream=self._stream)

    def _upload(self, to: int, data: Bytes) -> None:
        runtime = self._cuda.runtime
        runtime.memcpyAsync(to, data.ctypes.data, data.nbytes, runtime.memcpyHostToDevice, self._stream.ptr)

    def _download(self, data: Bytes, source: int) -> None:
        runtime = self._cuda.runtime
        runtime.memcpyAsync(data.ctypes.data, source, data.nbytes, runtime.memcpyDeviceToHost, self._stream.ptr)

    def _pin(self, size: int) -> Bytes:
        return np.frombuffer(self._cuda.alloc_pinned_memory(size), np.uint8, size)

    @contextmanager
    def _guard(self, action: str) -> Iterator[None]:
        """Turn CuPy's errors, all kinds of RuntimeError but the compiler's, into one line of ours."""
        try:
            yield
        except (RuntimeError, self._cuda.compiler.CompileException) as error:
            reason = str(error).strip().partition("\n")[0]
            raise ResourceError(f"{self.name}: cannot {action} the device: {reason}") from error
