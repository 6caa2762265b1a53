"""The memory of keys and values: pages, each thread's heads in the memory of its NUMA node.

Two arrays of tiles (`shared/model/kv_layout.py`) in huge pages, none of which is touched before a token needs it. Which
page holds what is for others to know.
"""

from typing import Any

import numpy as np
import numpy.typing as npt

from warmfront.coordinator.decode.footprint import cache_bytes
from warmfront.coordinator.decode.network import Cache
from warmfront.coordinator.decode.row_split import portion
from warmfront.coordinator.decode.team_config import TeamConfig
from warmfront.shared.machine.memory import address, anonymous
from warmfront.shared.machine.numa import bind
from warmfront.shared.model.formats import Kind
from warmfront.shared.model.kv_layout import PAGE, TILE, padded, pages_of, tile_bytes
from warmfront.shared.model.spec import ModelSpec

__all__ = ["KvCache"]

_TILES = PAGE // TILE


class KvCache:
    """The two arrays."""

    def __init__(self, spec: ModelSpec, config: TeamConfig, cuts: npt.NDArray[Any], ahead: int = 0) -> None:
        """`cuts`: see `RowSplit`; `ahead`: how many bytes ahead to fetch while one token attends."""
        attention, kind = spec.architecture.attention, config.cache_kind
        self._kind, self._head = kind, padded(attention.head_dim)
        size = cache_bytes(spec, kind, config.context, config.texts) // 2
        self._arrays = keys, values = anonymous(size, huge=True), anonymous(size, huge=True)
        # As the compiled pass reads it.
        tile = tile_bytes(kind, attention.head_dim)
        self.layout = Cache(
            kind=int(kind),
            keys_at=address(keys),
            values_at=address(values),
            tile_bytes=tile,
            layers=spec.layers,
            pages=config.texts * pages_of(config.context),
            ahead=-(-ahead // tile),
        )
        head = size // attention.kv_heads
        for rank, cpu in enumerate(config.cores.coordinator):
            node = config.cores.memory_of(cpu)
            low, high = portion(cuts, attention.kv_heads, 1, rank)
            if node is not None and low < high:
                for array in self._arrays:
                    bind(array[low * head : high * head], node)

    def scrub(self, table: npt.NDArray[np.int64], first: int, end: int) -> None:
        """Zero what positions `first` to `end` of the text in the pages `table` have left that may not be finite.

        Whole tiles are read, also what is behind the end of a text in them, whose weight is 0; and 0 times infinity is
        NaN.
        """
        for tile in range(first // TILE, -(-end // TILE)):
            for numbers in self._finite_by(int(table[tile // _TILES]), tile % _TILES):
                numbers[..., max(first - tile * TILE, 0) : end - tile * TILE] = 0

    def _finite_by(self, page: int, tile: int) -> list[npt.NDArray[Any]]:
        """Numbers or scales [..., positions] of a tile, which are finite if its positions are: of keys, of values."""
        shape = -1, self.layout.pages, self.layout.layers, _TILES, self.layout.tile_bytes
        tiles = [array.reshape(shape)[:, page, :, tile] for array in self._arrays]
        if self._kind == Kind.Q8:
            both = [each[..., self._head * TILE :].view(np.float16) for each in tiles]
            return [each.reshape(*each.shape[:2], -1, TILE) for each in both]
        number = np.float16 if self._kind == Kind.F16 else np.float32
        keys, values = (each.view(number).reshape(*each.shape[:2], -1, TILE, TILE) for each in tiles)
        return [keys, values.swapaxes(-1, -2)]
