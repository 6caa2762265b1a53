"""Writing into the KV cache, whose layout is that of `shared/model/kv_layout.py`."""

import numpy as np
import numpy.typing as npt
from numba import carray

from warmfront.coordinator.decode.network import POSITION, TOKENS, Network, State
from warmfront.shared.kernels.atomics import bytes_at, floats_at, shorts_at
from warmfront.shared.kernels.fp16 import from_half, to_half
from warmfront.shared.kernels.jit import apart, inlined, kernel
from warmfront.shared.model.formats import BLOCK, Kind
from warmfront.shared.model.kv_layout import PAGE, TILE
from warmfront.shared.wire.handoff import barrier

__all__ = ["cache_head", "cache_panels", "tile_at"]

_F16, _Q8 = int(Kind.F16), int(Kind.Q8)
# Exponent bits of a float16, all ones in infinities and NaN.
_F16_EXPONENT = 0x7C00
Floats = npt.NDArray[np.float32]


@kernel
def tile_at(st: State, row: int, part: int, head: int, layer: int, position: int) -> int:
    """Address of the tile of a position's keys (part 0) or values (1), of the text whose pages are in row `row`."""
    cache = st.cache
    page = ((head * cache.pages + st.tables[row, position // PAGE]) * cache.layers + layer) * (PAGE // TILE)
    offset = (page + position % PAGE // TILE) * cache.tile_bytes
    return int((cache.values_at if part else cache.keys_at) + offset)


@kernel
def _place(part: int, number: int, column: int) -> int:
    """Where a tile of floats has a number of a position: of the keys (part 0) or of the values (1)."""
    if part == 0:
        return number * TILE + column
    return number // TILE * TILE * TILE + column * TILE + number % TILE


@kernel
def _byte_place(part: int, number: int, column: int) -> int:
    """The same of a tile of Q8."""
    if part == 0:
        return number // 4 * 4 * TILE + column * 4 + number % 4
    return number // TILE * TILE * TILE + column // 4 * 4 * TILE + number % TILE * 4 + column % 4


@kernel
def _write_bytes(values: Floats, step: int, tile_at: int, part: int, column: int) -> bool:
    """Round every `step`th of `values` to 8 bits into a tile; returns whether one is not finite.

    As `formats.pack` does: the numbers make up for the rounding of the scale.
    """
    count = (len(values) + step - 1) // step
    blocks = (count + BLOCK - 1) // BLOCK
    tile = carray(bytes_at(tile_at), (blocks * BLOCK * TILE,))
    scales = carray(shorts_at(tile_at + blocks * BLOCK * TILE), (blocks * TILE,))
    spoiled = False
    for block in range(blocks):
        first, last = block * BLOCK, min(block * BLOCK + BLOCK, count)
        top = np.float32(0)
        finite = True
        for number in range(first, last):
            value = abs(values[number * step])
            finite &= value < np.float32(np.inf)
            top = max(top, value)
        scale = to_half(top / np.float32(127) if finite else np.float32(np.inf))
        scales[block * TILE + column] = scale
        whole = from_half(scale)
        spoiled |= not whole < np.float32(np.inf)
        inverse = np.float32(1) / whole if whole > 0 else np.float32(0)
        for number in range(first, last):
            scaled = np.rint(values[number * step] * inverse) if finite else np.float32(0)
            whole_number = np.int64(min(max(scaled, np.float32(-127)), np.float32(127)))
            tile[_byte_place(part, number, column)] = np.uint8((whole_number + (128 if part == 0 else 0)) & 255)
    return spoiled


@kernel
def _write_floats(kind: int, values: Floats, step: int, tile_at: int, part: int, column: int) -> bool:
    """Write every `step`th of `values` into a tile of float16 or float32; returns whether one is not finite."""
    count, spoiled = (len(values) + step - 1) // step, False
    if kind == _F16:
        halves = carray(shorts_at(tile_at), (1,))
        for number in range(count):
            bits = to_half(values[number * step])
            halves[_place(part, number, column)] = bits
            spoiled |= bits & _F16_EXPONENT == _F16_EXPONENT
    else:
        floats = carray(floats_at(tile_at), (1,))
        for number in range(count):
            floats[_place(part, number, column)] = values[number * step]
            spoiled |= not np.isfinite(values[number * step])
    return spoiled


@apart
def cache_head(net: Network, st: State, layer: int, head: int, panel: int, lanes: int) -> None:
    """Write one head's keys and values of a panel of tokens into the cache.

    Notes of which tokens one is not finite: it would reach texts that later have the page (`KvCache.scrub`).
    """
    cache, rows, size = st.cache, (net.heads + 2 * net.kv_heads) * net.head_dim, net.head_dim * lanes
    for lane in range(min(lanes, st.job[TOKENS] - panel * lanes)):
        row = panel if lanes == 1 else 0
        position = st.positions[panel] if lanes == 1 else st.job[POSITION] + panel * lanes + lane
        column, spoiled = position % TILE, False
        for part in range(2):
            start = panel * rows * lanes + (net.heads + part * net.kv_heads + head) * size
            values = st.qkv[start + lane : start + size]
            at = tile_at(st, row, part, head, layer, position)
            if cache.kind == _Q8:
                spoiled |= _write_bytes(values, lanes, at, part, column)
            else:
                spoiled |= _write_floats(cache.kind, values, lanes, at, part, column)
        if spoiled:
            st.spoiled[panel * lanes + lane] = 1


@inlined
def cache_panels(net: Network, st: State, layer: int, rank: int, panels: int, lanes: int) -> int:
    """Write the keys and values of several tokens into the cache: this thread's (key-value head, panel) pairs; then
    wait for the others. Returns DONE or ABORTED."""
    for task in range(rank, net.kv_heads * panels, st.threads):
        cache_head(net, st, layer, task % net.kv_heads, task // net.kv_heads, lanes)
    return barrier(st.barrier)
