"""The host in the GPU's stead: numpy and a bounded "device memory". It is emulated, and says so.

Everything around the kernels (slots, migrations, ledger, protocol) runs here as it does on CUDA; speeds measured
here say nothing about a GPU. Weights rest packed as they arrive and are widened for one call at a time.
"""

import math
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from warmfront.gpu_worker.device import Bytes, Floats, Ledger
from warmfront.shared.bundle import GROUP, BundleLayout
from warmfront.shared.errors import ResourceError
from warmfront.shared.model import ACTIVATIONS
from warmfront.shared.weights import Kind, row_bytes, unpack

__all__ = ["HostDevice"]


class HostDevice:
    """Slots in host memory, at most `capacity` bytes of it; by default half of what is available."""

    name = "host (emulated GPU)"

    def __init__(self, capacity: int | None = None) -> None:
        self._capacity = _available_bytes() // 2 if capacity is None else capacity
        self._memory: dict[str, npt.NDArray[Any]] = {}

    def free_bytes(self) -> int:
        return max(0, self._capacity - sum(self.allocated().values()))

    def ledger(self, layout: BundleLayout, slots: int, max_tokens: int) -> Ledger:
        hidden = 2 * 4 * max_tokens * min(slots, layout.groups) * GROUP
        return {"slots": slots * layout.group_bytes, "activations": hidden, "partials": 0}

    def reserve(self, layout: BundleLayout, activation: int, slots: int, max_tokens: int) -> None:
        plan = self.ledger(layout, slots, max_tokens)
        needed, free = sum(plan.values()), self.free_bytes()
        if needed > free:
            raise ResourceError(
                f"{self.name}: {slots} slots need {needed / 2**20:.1f} MiB, {free / 2**20:.1f} MiB are free: "
                "lower the GPU's memory budget"
            )
        self._layout = layout
        self._activation = _ACTIVATIONS[ACTIVATIONS[activation]]
        self._memory = {
            "slots": np.zeros((slots, GROUP, layout.bundle_bytes), np.uint8),
            # Gates and ups, [tokens, neurons] each.
            "activations": np.empty((2, plan["activations"] // 8), np.float32),
            "partials": np.empty(0),
        }

    def allocated(self) -> Ledger:
        return {purpose: buffer.nbytes for purpose, buffer in self._memory.items()}

    def store(self, slot: int, group: Bytes) -> None:
        self._memory["slots"][slot] = group

    def store_many(self, first_slot: int, groups: Bytes) -> None:
        self._memory["slots"][first_slot : first_slot + len(groups)] = groups

    def execute(self, slots: npt.NDArray[np.int32], x: Floats, sparse: bool, out: Floats) -> tuple[int, int]:
        start = time.perf_counter_ns()
        layout, tokens = self._layout, len(x)
        neurons = _neurons(slots)
        gates = self._scratch(0, tokens, len(slots) * GROUP)
        np.matmul(x, self._rows(neurons, 0, layout.gate_kind).T, out=gates)
        computed = gates.size
        if sparse:
            closed = gates <= 0
            computed -= int(np.count_nonzero(closed))
            gates[closed] = 0
            needed = np.flatnonzero(~closed.all(0))
            gates = gates[:, needed]
            neurons = needed + neurons.start if isinstance(neurons, slice) else neurons[needed]
        weights = self._activation(gates)
        ups = self._scratch(1, *gates.shape)
        weights *= np.matmul(x, self._rows(neurons, layout.up_offset, layout.gate_kind).T, out=ups)
        np.matmul(weights, self._rows(neurons, layout.down_offset, layout.down_kind), out=out)
        return computed, time.perf_counter_ns() - start

    def close(self) -> None:
        self._memory = {}

    def _scratch(self, index: int, tokens: int, neurons: int) -> Floats:
        return self._memory["activations"][index, : tokens * neurons].reshape(tokens, neurons)

    def _rows(self, neurons: slice | npt.NDArray[np.int64], offset: int, kind: Kind) -> Floats:
        """The rows at `offset` of some neurons' bundles, float32 [neurons, hidden]."""
        size = row_bytes(kind, self._layout.hidden)
        bundles = self._memory["slots"].reshape(-1, self._layout.bundle_bytes)
        return _widen(bundles[:, offset : offset + size][neurons], kind, self._layout.hidden)


def _neurons(slots: npt.NDArray[np.int32]) -> slice | npt.NDArray[np.int64]:
    """The neurons of some slots, as an index into all slots' neurons: a slice, which copies nothing, if it can be."""
    if len(slots) == 0 or np.all(np.diff(slots) == 1):
        first = int(slots[0]) if len(slots) else 0
        return slice(first * GROUP, (first + len(slots)) * GROUP)
    return (slots.astype(np.int64)[:, None] * GROUP + np.arange(GROUP)).ravel()


def _widen(rows: Bytes, kind: Kind, cols: int) -> Floats:
    """`unpack` without a copy where the type allows."""
    if kind == Kind.F32:
        return rows.view(np.float32)
    if kind == Kind.F16:
        return rows.view(np.float16).astype(np.float32)
    return unpack(rows, kind, cols)


def _silu(gates: Floats) -> Floats:
    # By tanh: exp(-x) overflows where the result is a plain 0.
    return gates * (0.5 + 0.5 * np.tanh(0.5 * gates))


def _relu(gates: Floats) -> Floats:
    return np.maximum(gates, 0)


def _gelu(gates: Floats) -> Floats:
    erf = np.fromiter(map(math.erf, (gates * math.sqrt(0.5)).ravel()), np.float32, gates.size)
    return 0.5 * gates * (1 + erf.reshape(gates.shape))


def _gelu_tanh(gates: Floats) -> Floats:
    return 0.5 * gates * (1 + np.tanh(math.sqrt(2 / math.pi) * (gates + 0.044715 * gates**3)))


_ACTIVATIONS: dict[str, Callable[[Floats], Floats]] = {
    "silu": _silu,
    "relu": _relu,
    "gelu": _gelu,
    "gelu_tanh": _gelu_tanh,
}


def _available_bytes() -> int:
    """Memory that can be had without swapping."""
    with open("/proc/meminfo", encoding="ascii") as file:
        fields = dict(line.split(":", 1) for line in file)
    return int(fields["MemAvailable"].split()[0]) * 1024
