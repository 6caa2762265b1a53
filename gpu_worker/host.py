"""The host in the GPU's stead: a bounded "device memory" and one thread of the CPU's kernels. Emulated, and says so.

Everything around the kernels (slots, migrations, ledger, protocol) runs here as it does on CUDA; speeds measured
here say nothing about a GPU.
"""

import time
from typing import Any

import numpy as np
import numpy.typing as npt

from warmfront.gpu_worker.device import Bytes, Floats, Ledger, Words, ensure_fits
from warmfront.shared.bundle import GROUP, BundleLayout
from warmfront.shared.ffn import bundles_at, dense_groups, list_masked, listed_neurons, scratch_floats
from warmfront.shared.gemm import LANES
from warmfront.shared.kernels import quantise, quantised_bytes
from warmfront.shared.memory import address, anonymous
from warmfront.shared.topology import read_topology

__all__ = ["HostDevice"]


class HostDevice:
    """Slots in host memory, at most `capacity` bytes of it; by default half of what is available."""

    name = "host (emulated GPU)"

    def __init__(self, capacity: int | None = None) -> None:
        available = sum(node.available_bytes for node in read_topology().nodes)
        self._capacity = available // 2 if capacity is None else capacity
        self._memory: dict[str, npt.NDArray[Any]] = {}

    def free_bytes(self) -> int:
        return max(0, self._capacity - sum(self.allocated().values()))

    def ledger(self, layout: BundleLayout, slots: int, max_tokens: int) -> Ledger:
        panels = -(-max_tokens // LANES)
        return {
            "slots": slots * layout.group_bytes,
            # x and the sums, in panels.
            "activations": 2 * 4 * panels * LANES * layout.hidden,
            # The neurons to compute; x quantised; widened rows and the like.
            "partials": 4 * layout.groups * GROUP
            + quantised_bytes(layout.hidden)
            + 4 * scratch_floats(layout.hidden, max_tokens),
        }

    def reserve(self, layout: BundleLayout, activation: int, slots: int, max_tokens: int) -> None:
        plan = self.ledger(layout, slots, max_tokens)
        ensure_fits(self, plan, slots)
        self._layout = layout
        self._memory = {purpose: anonymous(size, huge=purpose == "slots") for purpose, size in plan.items()}
        floats = self._memory["activations"].view(np.float32)
        self._x, self._sums = np.split(floats, 2)
        partials = self._memory["partials"]
        neurons = layout.groups * GROUP
        self._listed = partials[: 4 * neurons].view(np.int32)
        self._quantised_at = address(partials[4 * neurons :])
        self._scratch_at = self._quantised_at + quantised_bytes(layout.hidden)
        self._bundles = bundles_at(address(self._memory["slots"]), layout, activation)

    def allocated(self) -> Ledger:
        return {purpose: buffer.nbytes for purpose, buffer in self._memory.items()}

    def store(self, slot: int, group: Bytes) -> None:
        self.store_many(slot, group[None])

    def store_many(self, first_slot: int, groups: Bytes) -> None:
        size = self._layout.group_bytes
        start = first_slot * size
        self._memory["slots"][start : start + groups.nbytes] = groups.reshape(-1)

    batch = 16

    def pin(self, mapping: Bytes) -> None:
        pass

    def staging(self, count: int) -> Bytes:
        return np.empty((count, self._layout.group_bytes), np.uint8)

    def fill(self, slots: npt.NDArray[np.int32], groups: Bytes) -> int:
        for slot, group in zip(slots, groups, strict=True):
            self.store(int(slot), group)
        return 0

    def execute(
        self,
        slots: npt.NDArray[np.int32],
        x: Floats,
        sparse: bool,
        out: Floats,
        mask: Words | None = None,
        fired: Words | None = None,
    ) -> tuple[int, int]:
        start = time.perf_counter_ns()
        tokens, hidden = len(x), self._layout.hidden
        b, x_at, sums_at = self._bundles, address(self._x), address(self._sums)
        self._sums[:] = 0
        if sparse or mask is not None or tokens == 1:
            words = np.full(len(slots), 0xFFFFFFFF, np.uint32) if mask is None else mask
            count = list_masked(words, len(slots), self._listed)
            computed = 0
            bits = np.zeros(len(slots), np.uint32) if fired is None else fired
            for token in range(tokens):
                self._x[:hidden], self._sums[:hidden] = x[token], 0
                q_at = quantise(x_at, self._quantised_at, hidden)
                computed += listed_neurons(
                    b, slots, self._listed, 0, count, sparse, x_at, q_at, sums_at, self._scratch_at, bits
                )
                out[token] = self._sums[:hidden]
        else:
            panels = -(-tokens // LANES)
            padded = np.zeros((panels * LANES, hidden), np.float32)
            padded[:tokens] = x
            size = padded.size
            self._x[:size] = padded.reshape(panels, LANES, hidden).transpose(0, 2, 1).ravel()
            dense_groups(
                b, slots, 0, len(slots), x_at, panels, sums_at, self._scratch_at, slots, np.zeros((0, 32, 0), np.uint16)
            )
            wide = self._sums[:size].reshape(panels, hidden, LANES).transpose(0, 2, 1).reshape(-1, hidden)
            out[:] = wide[:tokens]
            computed = len(slots) * GROUP * tokens
        return computed, time.perf_counter_ns() - start

    def close(self) -> None:
        self._memory = {}
