"""The CUDA device, through CuPy: slots and workspace in device memory, the kernels of `ffn.cu` on one own stream.

Whatever crosses the bus goes through pinned staging by asynchronous copies, but for large vectors in a mapping that is
pinned itself. A call's copies, kernels and events are enqueued at once; the host then waits for the last one. Slots are
filled on a second stream, whose copies run beside the kernels; neither stream waits for the other, and nothing waits
for the whole device. CuPy is imported when a device is opened, never before.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import numpy as np
import numpy.typing as npt

from warmfront.gpu_worker import launch
from warmfront.gpu_worker.device import (
    STAGING_BYTES,
    Bytes,
    Floats,
    Ints,
    Ledger,
    Longs,
    Words,
    ensure_fits,
    inside,
    runs,
)
from warmfront.shared.errors import ResourceError
from warmfront.shared.kernels.exact_sums import round_to_sums
from warmfront.shared.machine.driver import cupy_extra
from warmfront.shared.machine.memory import address
from warmfront.shared.model.architecture import FeedForward
from warmfront.shared.model.bundle import GROUP, BundleLayout
from warmfront.shared.model.panels import LANES, whole_panels
from warmfront.shared.selector import Work

__all__ = ["CudaDevice"]

# A vector of at least this many bytes is worth a copy of its own: a call of 10 to 17 us, in which the host could copy
# as much to the staging, from where it goes together with the rest.
_WORTH_A_COPY = 128 << 10

_BLOCK = (launch.THREADS, 1, 1)


class CudaDevice:
    """Card `index` as CUDA numbers the visible ones; raises ResourceError if CuPy or the card is missing."""

    def __init__(self, index: int) -> None:
        self.name = f"cuda:{index}"
        try:
            import cupy
        except ImportError as error:
            raise ResourceError(f"{self.name}: CuPy cannot be imported ({error}): {cupy_extra()}") from error
        self._cuda: Any = cupy.cuda
        self._raw_module: Any = cupy.RawModule
        self._memory: dict[str, Any] = {}
        self._locked: Bytes | None = None
        with self._guard("use"):
            if index >= self._cuda.runtime.getDeviceCount():
                raise ResourceError(f"{self.name}: no such CUDA device: {self._cuda.runtime.getDeviceCount()} visible")
            self._card = self._cuda.Device(index)
            self.name += " " + self._cuda.runtime.getDeviceProperties(index)["name"].decode()
            with self._card:
                self._stream, self._filling = (self._cuda.Stream(non_blocking=True) for _ in range(2))
                self._begin, self._end = self._cuda.Event(), self._cuda.Event()
                # The thread that fills sleeps until its copies are done; the one that computes does not.
                self._filled = self._cuda.Event(block=True, disable_timing=True)

    def free_bytes(self) -> int:
        with self._guard("query"), self._card:
            return int(self._cuda.runtime.memGetInfo()[0])

    def ledger(self, layout: BundleLayout, slots: int, max_tokens: int) -> Ledger:
        return {
            "slots": slots * layout.group_bytes,
            "activations": launch.workspace(layout, min(slots, layout.groups), max_tokens).total,
            "partials": launch.partial_rows(layout, max_tokens) * layout.hidden * 4,
        }

    def reserve(
        self, layout: BundleLayout, feed_forward: FeedForward, slots: int, max_tokens: int, work: Work = Work.MASK
    ) -> None:
        plan = self.ledger(layout, slots, max_tokens)
        ensure_fits(self, plan, slots)
        self._layout = layout
        self._offsets = launch.workspace(layout, min(slots, layout.groups), max_tokens)
        with self._guard("allocate"), self._card:
            self._memory = {purpose: self._cuda.memory.Memory(size) for purpose, size in plan.items()}
            # The pinned twin of the workspace, up to the end of `out`.
            self._pinned = self._pinned_bytes(self._offsets.h)
            shape = (2, max(1, STAGING_BYTES // layout.group_bytes), layout.group_bytes)
            self._staging = self._pinned_bytes(shape[0] * shape[1] * shape[2]).reshape(shape)
            self._copied = [self._cuda.Event(block=True, disable_timing=True) for _ in self._staging]
        with self._guard("compile kernels on"), self._card:
            module = self._raw_module(code=launch.source(), options=launch.options(layout, feed_forward))
            names = ("gate_up", "down", "reduce", "gate_up_many", "down_many")
            self._gate_up, self._down, self._reduce, self._gate_up_many, self._down_many = map(
                module.get_function, names
            )

    def allocated(self) -> Ledger:
        return {purpose: int(memory.size) for purpose, memory in self._memory.items()}

    def pin(self, mapping: Bytes) -> bool:
        try:
            with self._card:
                self._cuda.runtime.hostRegister(address(mapping), mapping.nbytes, 0)
        except RuntimeError:  # memory that may not be locked, or no more of it
            return False
        self._locked = mapping
        return True

    @property
    def batch(self) -> int:
        return int(self._staging.shape[1])

    def staging(self, count: int) -> Bytes:
        assert count <= self.batch
        return self._staging[0, :count]

    def fill(self, slots: Ints, groups: Bytes) -> int:
        started = time.perf_counter_ns()
        with self._guard("write to"), self._card:
            if inside(groups, self._staging):
                self._scatter(slots, groups)
            else:
                for turn, start in enumerate(range(0, len(groups), self.batch)):
                    part = groups[start : start + self.batch]
                    staged, copied = self._staging[turn % 2, : len(part)], self._copied[turn % 2]
                    copied.synchronize()
                    staged[:] = part
                    self._scatter(slots[start : start + self.batch], staged)
                    copied.record(self._filling)
            self._filled.record(self._filling)
            self._filled.synchronize()
        return time.perf_counter_ns() - started

    def _scatter(self, slots: Ints, staged: Bytes) -> None:
        """Enqueue copies of staged groups into slots, one for each run of neighbours: what costs is their number."""
        base, size = self._memory["slots"].ptr, self._layout.group_bytes
        for low, high in runs(slots):
            self._upload(base + int(slots[low]) * size, staged[low:high], self._filling)

    def execute(
        self,
        slots: Ints,
        x: Floats,
        inverse: Floats,
        sparse: bool,
        out: Longs,
        mask: Words | None = None,
        computed: Words | None = None,
    ) -> tuple[int, int]:
        tokens, groups = len(x), len(slots)
        if groups == 0:
            out[:] = 0
            return 0, 0
        at, pinned = self._offsets, self._pinned
        out_ends = at.out + x.nbytes
        passed = at.out - (groups * GROUP * tokens if sparse else 0)
        words = pinned[at.mask : at.mask + 4 * groups].view(np.uint32)
        words[:] = 0xFFFFFFFF if mask is None else mask
        with self._timed() as busy:
            self._send(slots, x)
            self._launch(groups, tokens, sparse, self._memory["activations"].ptr + passed)
            self._download(pinned[passed:out_ends], passed)
        self._round(inverse, 1, out)
        if not sparse:
            if computed is not None:
                computed[:] = words
            return int(np.bitwise_count(words).sum()) * tokens, busy[0]
        whole = pinned[passed : at.out].view(np.bool_)
        if computed is not None:
            computed[:] = np.packbits(whole, bitorder="little").view(np.uint32)
        return int(np.count_nonzero(whole)), busy[0]

    def execute_many(self, slots: Ints, x: Floats, inverse: Floats, tokens: int, out: Longs) -> tuple[int, int]:
        if len(slots) == 0:
            out[:] = 0
            return 0, 0
        at = self._offsets
        with self._timed() as busy:
            self._send(slots, x)
            self._launch_many(len(slots), tokens)
            self._download(self._pinned[at.out : at.out + x.nbytes], at.out)
        self._round(inverse, LANES, out)
        return len(slots) * GROUP * tokens, busy[0]

    def _round(self, inverse: Floats, lanes: int, out: Longs) -> None:
        """The float32 sums that came back, in units of the tokens: the device's own order of adding stays in them."""
        start = self._offsets.out
        sums = self._pinned[start : start + out.nbytes // 2].view(np.float32)
        round_to_sums(sums, inverse, lanes, out.reshape(-1))

    def _send(self, slots: Ints, x: Floats) -> None:
        """Enqueue the copy of slots, mask and x; x goes from where it lies if that is worth it."""
        at, pinned, base = self._offsets, self._pinned, self._memory["activations"].ptr
        pinned[at.ids : at.ids + slots.nbytes].view(np.int32)[:] = slots
        ends = at.mask + slots.nbytes
        if self._straight(x, _WORTH_A_COPY):
            self._upload(base + at.x, x, self._stream)
        else:
            ends = at.x + x.nbytes
            pinned[at.x : ends].view(np.float32).reshape(x.shape)[:] = x
        self._upload(base + at.ids, pinned[at.ids : ends], self._stream)

    @contextmanager
    def _timed(self) -> Iterator[list[int]]:
        """Wait for what is enqueued in the block; then the list has the ns that it took."""
        busy: list[int] = []
        with self._guard("compute on"), self._card:
            self._begin.record(self._stream)
            yield busy
            self._end.record(self._stream)
            self._end.synchronize()
            busy.append(round(self._cuda.get_elapsed_time(self._begin, self._end) * 1e6))

    def close(self) -> None:
        if self._locked is not None:
            with suppress(RuntimeError), self._card:  # after an error of the device every call of it fails
                self._cuda.runtime.hostUnregister(address(self._locked))
            self._locked = None
        self._memory = {}

    def _straight(self, vectors: Floats, min_bytes: int) -> bool:
        """Whether to copy `vectors`, if of `min_bytes` bytes, from or to where they lie."""
        return self._locked is not None and vectors.nbytes >= min_bytes and inside(vectors, self._locked)

    def _launch(self, groups: int, tokens: int, sparse: bool, passed_at: int) -> None:
        """Neurons by the mask, each token for itself."""
        grids = launch.grids(self._layout, groups, tokens)
        at, base = self._offsets, self._memory["activations"].ptr
        slots, ids = np.uint64(self._memory["slots"].ptr), np.uint64(base + at.ids)
        mask, x = np.uint64(base + at.mask), np.uint64(base + at.x)
        h, passed = np.uint64(base + at.h), np.uint64(passed_at)
        n, t = np.int32(groups), np.int32(tokens)
        arguments = (slots, ids, mask, n, x, t, np.int32(sparse), h, passed)
        self._gate_up(grids.gate_up, _BLOCK, arguments, stream=self._stream)
        self._down(grids.down, _BLOCK, (slots, ids, n, h, self._sums_at(grids)), stream=self._stream)
        self._add_up(grids, tokens * self._layout.hidden)

    def _launch_many(self, groups: int, tokens: int) -> None:
        """All neurons, as products of matrices, in panels."""
        grids = launch.many_grids(self._layout, groups, tokens)
        at, base = self._offsets, self._memory["activations"].ptr
        slots, ids = np.uint64(self._memory["slots"].ptr), np.uint64(base + at.ids)
        x, h = np.uint64(base + at.x), np.uint64(base + at.h)
        n, t, per = np.int32(groups), np.int32(tokens), np.int32(grids.per)
        self._gate_up_many(grids.gate_up, _BLOCK, (slots, ids, n, x, t, per, h), stream=self._stream)
        arguments = (slots, ids, n, h, t, per, self._sums_at(grids))
        self._down_many(grids.down, _BLOCK, arguments, stream=self._stream)
        self._add_up(grids, whole_panels(tokens) * self._layout.hidden)

    def _sums_at(self, grids: launch.Grids | launch.ManyGrids) -> np.uint64:
        """Where sums over segments go: one segment's are the output."""
        out = self._memory["activations"].ptr + self._offsets.out
        return np.uint64(self._memory["partials"].ptr if grids.segments > 1 else out)

    def _add_up(self, grids: launch.Grids | launch.ManyGrids, length: int) -> None:
        if grids.segments > 1:
            out = np.uint64(self._memory["activations"].ptr + self._offsets.out)
            arguments = (self._sums_at(grids), np.int32(grids.segments), np.int32(length), out)
            self._reduce(grids.reduce, _BLOCK, arguments, stream=self._stream)

    def _upload(self, to: int, data: npt.NDArray[Any], stream: Any) -> None:
        runtime = self._cuda.runtime
        runtime.memcpyAsync(to, address(data), data.nbytes, runtime.memcpyHostToDevice, stream.ptr)

    def _download(self, data: npt.NDArray[Any], offset: int) -> None:
        """From so far into the workspace."""
        runtime, source = self._cuda.runtime, self._memory["activations"].ptr + offset
        runtime.memcpyAsync(address(data), source, data.nbytes, runtime.memcpyDeviceToHost, self._stream.ptr)

    def _pinned_bytes(self, size: int) -> Bytes:
        return np.frombuffer(self._cuda.alloc_pinned_memory(size), np.uint8, size)

    @contextmanager
    def _guard(self, action: str) -> Iterator[None]:
        """Turn CuPy's errors, all kinds of RuntimeError but the compiler's, into one line."""
        try:
            yield
        except (RuntimeError, self._cuda.compiler.CompileException) as error:
            reason = str(error).strip().partition("\n")[0]
            if "InsufficientDriver" in reason:
                reason += f"; {cupy_extra()}"
            raise ResourceError(f"{self.name}: cannot {action} the device: {reason}") from error
