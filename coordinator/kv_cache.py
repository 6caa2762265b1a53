"""The keys and values of the tokens so far: each thread's heads in the memory of its NUMA node.

Two arrays [layers, kv_heads, context, head_dim padded to 32], float32 for float32 models, else float16.
"""

from typing import Any

import numpy.typing as npt

from warmfront.coordinator.shares import portion
from warmfront.shared.core_plan import CorePlan
from warmfront.shared.gemm import LANES
from warmfront.shared.memory import address, anonymous
from warmfront.shared.numa import bind
from warmfront.shared.store import PackedModel
from warmfront.shared.weights import Kind

__all__ = ["KvCache", "cache_bytes"]


def _head_bytes(model: PackedModel, context: int) -> tuple[Kind, int]:
    """Weight type, and bytes of one head's keys of one layer."""
    kind = Kind.F32 if model.entries["embed"].kind == Kind.F32 else Kind.F16
    padded = -(-model.spec.head_dim // 32) * 32
    return kind, context * padded * (4 if kind == Kind.F32 else 2)


def cache_bytes(model: PackedModel, context: int) -> int:
    """Bytes of the cache for `context` tokens."""
    return 2 * model.spec.layers * model.spec.kv_heads * _head_bytes(model, context)[1]


class KvCache:
    """`kind`: its weight type; `keys_at`, `values_at`: addresses."""

    def __init__(self, model: PackedModel, context: int, cores: CorePlan, cuts: npt.NDArray[Any]) -> None:
        self.kind, head = _head_bytes(model, context)
        # The last head is read in sixteens of positions.
        size = cache_bytes(model, context) // 2 + head // context * LANES
        self._arrays = anonymous(size), anonymous(size)
        self.keys_at, self.values_at = (address(array) for array in self._arrays)
        heads = model.spec.kv_heads
        for member, cpu in enumerate(cores.coordinator):
            node = cores.memory_of(cpu)
            low, high = portion(cuts, heads, 1, member)
            if node is None or low == high:
                continue
            for layer in range(model.spec.layers):
                for array in self._arrays:
                    bind(array[(layer * heads + low) * head : (layer * heads + high) * head], node)
