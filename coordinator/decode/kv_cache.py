"""The keys and values of the tokens so far: each thread's heads in the memory of its NUMA node.

Two arrays of tiles (`shared/model/kv_layout.py`) in huge pages, none of which is touched before a token needs it.
"""

from typing import Any

import numpy as np
import numpy.typing as npt

from warmfront.coordinator.decode.footprint import cache_bytes
from warmfront.coordinator.decode.network import Cache
from warmfront.coordinator.decode.row_split import portion
from warmfront.shared.machine.core_plan import CorePlan
from warmfront.shared.machine.memory import address, anonymous
from warmfront.shared.machine.numa import bind
from warmfront.shared.model.formats import Kind
from warmfront.shared.model.kv_layout import SPAN, TILE, padded, tile_bytes, whole_spans
from warmfront.shared.model.spec import ModelSpec

__all__ = ["KvCache"]


class KvCache:
    """The two arrays, and which of their positions are not finite."""

    def __init__(
        self, spec: ModelSpec, kind: Kind, context: int, cores: CorePlan, cuts: npt.NDArray[Any], ahead: int = 0
    ) -> None:
        """`ahead`: how many bytes ahead to fetch while one token attends."""
        attention = spec.architecture.attention
        # No position before this one is spoiled, and none from `_spoiled_end` on.
        self.clean = self._context = context
        self._spoiled_end = 0
        self._kind, self._head = kind, padded(attention.head_dim)
        size, spans = cache_bytes(spec, kind, context) // 2, whole_spans(context) // SPAN
        self._arrays = keys, values = anonymous(size, huge=True), anonymous(size, huge=True)
        # As the compiled pass reads it.
        tile = tile_bytes(kind, attention.head_dim)
        self.layout = Cache(
            kind=int(kind),
            keys_at=address(keys),
            values_at=address(values),
            tile_bytes=tile,
            layers=spec.layers,
            spans=spans,
            ahead=-(-ahead // tile),
        )
        head = size // attention.kv_heads
        for rank, cpu in enumerate(cores.coordinator):
            node = cores.memory_of(cpu)
            low, high = portion(cuts, attention.kv_heads, 1, rank)
            if node is not None and low < high:
                for array in self._arrays:
                    bind(array[low * head : high * head], node)

    def spoil(self, position: int, tokens: int) -> None:
        """A job of `tokens` from `position` on has written keys or values that are not finite."""
        self.clean = min(self.clean, position)
        self._spoiled_end = max(self._spoiled_end, position + tokens)

    def forget(self, position: int) -> None:
        """The text ends at `position` now: zero what is spoiled behind it.

        Whole tiles are read, also what is behind the end in them, whose weight is 0; and 0 times infinity is NaN.
        """
        first, end = max(position, self.clean), self._spoiled_end
        if first >= end:
            return
        for tile in range(first // TILE, -(-end // TILE)):
            for numbers in self._finite_by(tile):
                numbers[..., max(first - tile * TILE, 0) : end - tile * TILE] = 0
        self._spoiled_end = first
        if first == self.clean:
            self.clean = self._context

    def _finite_by(self, tile: int) -> list[npt.NDArray[Any]]:
        """Numbers or scales [..., positions] of a tile, which are finite if its positions are: of keys, of values."""
        span, place = divmod(tile * TILE, SPAN)
        tiles = [
            array.reshape(-1, self.layout.spans, self.layout.layers, SPAN // TILE, self.layout.tile_bytes)[
                :, span, :, place // TILE
            ]
            for array in self._arrays
        ]
        if self._kind == Kind.Q8:
            both = [each[..., self._head * TILE :].view(np.float16) for each in tiles]
            return [each.reshape(*each.shape[:2], -1, TILE) for each in both]
        number = np.float16 if self._kind == Kind.F16 else np.float32
        keys, values = (each.view(number).reshape(*each.shape[:2], -1, TILE, TILE) for each in tiles)
        return [keys, values.swapaxes(-1, -2)]
