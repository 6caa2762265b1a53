"""The keys and values of the tokens so far: each thread's heads in the memory of its NUMA node.

Two arrays [layers, kv_heads, context, head_dim padded to 32], float32 for float32 models, else float16.
"""

from typing import Any

import numpy.typing as npt

from warmfront.coordinator.decode.footprint import cache_bytes, cache_kind, head_bytes
from warmfront.coordinator.decode.row_split import portion
from warmfront.shared.machine.core_plan import CorePlan
from warmfront.shared.machine.memory import address, anonymous
from warmfront.shared.machine.numa import bind
from warmfront.shared.model.panels import LANES
from warmfront.shared.model.store import PackedModel

__all__ = ["KvCache"]


class KvCache:
    """The two arrays, and which of their rows are not finite."""

    def __init__(self, model: PackedModel, context: int, cores: CorePlan, cuts: npt.NDArray[Any]) -> None:
        # Weight type of a row.
        self.kind, head = cache_kind(model), head_bytes(model, context)
        # No row before this position is spoiled, and none from `_spoiled_end` on.
        self.clean = self._context = context
        self._spoiled_end = 0
        self._shape = model.spec.layers * model.spec.architecture.attention.kv_heads, context, head // context
        # The last head is read in sixteens of positions.
        size = cache_bytes(model, context) // 2 + head // context * LANES
        self._arrays = anonymous(size), anonymous(size)
        self.keys_at, self.values_at = (address(array) for array in self._arrays)
        heads = model.spec.architecture.attention.kv_heads
        for rank, cpu in enumerate(cores.coordinator):
            node = cores.memory_of(cpu)
            low, high = portion(cuts, heads, 1, rank)
            if node is None or low == high:
                continue
            for layer in range(model.spec.layers):
                for array in self._arrays:
                    bind(array[(layer * heads + low) * head : (layer * heads + high) * head], node)

    def spoil(self, position: int, tokens: int) -> None:
        """A job of `tokens` from `position` on has written keys or values that are not finite."""
        self.clean = min(self.clean, position)
        self._spoiled_end = max(self._spoiled_end, position + tokens)

    def forget(self, position: int) -> None:
        """The text ends at `position` now: zero what is spoiled behind it.

        Rows are read in sixteens, also those behind the end, whose weight is 0; and 0 times infinity is NaN.
        """
        first, end = max(position, self.clean), self._spoiled_end
        if first >= end:
            return
        heads, context, stride = self._shape
        for array in self._arrays:
            array[: heads * context * stride].reshape(heads, context, stride)[:, first:end] = 0
        self._spoiled_end = first
        if first == self.clean:
            self.clean = self._context
