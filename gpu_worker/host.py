"""The host in place of a GPU: a bounded "device memory" and one thread of the CPU's kernels. Emulated, and says so.

Everything around the kernels (slots, migrations, ledger, protocol) runs here as it does on CUDA; speeds measured
here say nothing about a GPU.
"""

import time
from typing import Any

import numpy as np
import numpy.typing as npt

from warmfront.gpu_worker.arithmetic import HostWorkspace, Tokens, add_masked, add_whole
from warmfront.gpu_worker.device import STAGING_BYTES, Bytes, Floats, Ints, Ledger, Longs, Words, ensure_fits, runs
from warmfront.shared.kernels.by_address.records import by_address
from warmfront.shared.kernels.byte_dot import quantised_bytes
from warmfront.shared.kernels.feed_forward.bundles import arrange_group, bundles_at
from warmfront.shared.kernels.feed_forward.ffn import batch_scratch_bytes
from warmfront.shared.kernels.jit import compile_for
from warmfront.shared.kernels.prefill.dense_groups import scratch_bytes
from warmfront.shared.machine.memory import address, anonymous
from warmfront.shared.machine.topology import read_topology
from warmfront.shared.model.architecture import FeedForward
from warmfront.shared.model.bundle import GROUP, BundleLayout
from warmfront.shared.model.panels import LANES
from warmfront.shared.selector import Work

__all__ = ["HostDevice"]


class HostDevice:
    """Slots in host memory, at most `capacity` bytes of it; by default half of what is available."""

    name = "host (emulated GPU)"

    def __init__(self, capacity: int | None = None) -> None:
        available = read_topology().available_bytes
        self._capacity = available // 2 if capacity is None else capacity
        self._memory: dict[str, npt.NDArray[Any]] = {}

    def free_bytes(self) -> int:
        return max(0, self._capacity - sum(self.allocated().values()))

    def ledger(self, layout: BundleLayout, slots: int, max_tokens: int) -> Ledger:
        return {
            "slots": slots * layout.group_bytes,
            # The neurons to compute, and their gates; x quantised; widened rows and the like.
            "partials": 8 * layout.groups * GROUP
            + quantised_bytes(layout.hidden)
            + max(batch_scratch_bytes(layout.hidden), scratch_bytes(layout.hidden, layout.groups, max_tokens)),
        }

    def reserve(
        self, layout: BundleLayout, feed_forward: FeedForward, slots: int, max_tokens: int, work: Work = Work.MASK
    ) -> None:
        plan = self.ledger(layout, slots, max_tokens)
        ensure_fits(self, plan, slots)
        self._memory = {purpose: anonymous(size, huge=purpose == "slots") for purpose, size in plan.items()}
        self._group_bytes = layout.group_bytes
        self._staging = anonymous(max(1, STAGING_BYTES // layout.group_bytes) * layout.group_bytes)
        partials = self._memory["partials"]
        listed_bytes = 4 * layout.groups * GROUP
        self._listed = partials[:listed_bytes].view(np.int32)
        quantised_at = address(partials) + 2 * listed_bytes
        self._work = by_address(
            HostWorkspace(
                bundles=bundles_at(
                    address(self._memory["slots"]),
                    layout,
                    feed_forward,
                    whole=work is Work.DENSE,
                    apart=work is Work.GATES,
                ),
                gates=partials[listed_bytes : 2 * listed_bytes].view(np.float32),
                quantised_at=quantised_at,
                scratch_at=quantised_at + quantised_bytes(layout.hidden),
            )
        )
        # What stands for a mask of everything, and for bits that nobody asked for.
        self._all_ones, self._ignored = np.full((2, layout.groups), 0xFFFFFFFF, np.uint32)
        words, none, inverse = self._all_ones, np.zeros(0, np.int32), np.zeros(LANES, np.float32)
        row, panel = (1, layout.hidden), (1, layout.hidden, LANES)
        one, many = (Tokens(np.zeros(s, np.float32), inverse, np.zeros(s, np.int64)) for s in (row, panel))
        compile_for(add_masked, self._work, none, self._listed, one, True, words, words)
        compile_for(add_whole, self._work, none, many)

    def allocated(self) -> Ledger:
        return {purpose: buffer.nbytes for purpose, buffer in self._memory.items()}

    def pin(self, mapping: Bytes) -> bool:
        return False

    @property
    def batch(self) -> int:
        return len(self._staging) // self._group_bytes

    def staging(self, count: int) -> Bytes:
        assert count <= self.batch
        return self._staging[: count * self._group_bytes].reshape(count, -1)

    def fill(self, slots: Ints, groups: Bytes) -> int:
        started = time.perf_counter_ns()
        places = self._memory["slots"].reshape(-1, self._group_bytes)
        for low, high in runs(slots):
            first = int(slots[low])
            places[first : first + high - low] = groups[low:high]
            for slot in range(first, first + high - low):
                arrange_group(self._work.bundles, address(places[slot]))
        return time.perf_counter_ns() - started

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
        started = time.perf_counter_ns()
        words, bits = self._all_ones if mask is None else mask, self._ignored if computed is None else computed
        count = add_masked(self._work, slots, self._listed, Tokens(x, inverse, out), sparse, words, bits)
        return count, time.perf_counter_ns() - started

    def execute_many(self, slots: Ints, x: Floats, inverse: Floats, tokens: int, out: Longs) -> tuple[int, int]:
        started = time.perf_counter_ns()
        add_whole(self._work, slots, Tokens(x, inverse, out))
        return len(slots) * GROUP * tokens, time.perf_counter_ns() - started

    def close(self) -> None:
        self._memory = {}
