"""Where keys and values lie, and that those of one text do not reach the next.

Run: pytest tests/coordinator/decode/test_kv_cache.py
"""

from pathlib import Path

import numpy as np
import pytest

from tests.shared.model.specs import SPEC, changed
from warmfront.coordinator.decode.footprint import attended_bytes, cache_bytes
from warmfront.coordinator.decode.kv_cache import KvCache
from warmfront.coordinator.decode.row_split import RowSplit
from warmfront.shared.machine.core_plan import CorePlan, WorkerCores
from warmfront.shared.machine.memory import address
from warmfront.shared.model.architecture import Attention
from warmfront.shared.model.formats import Kind, row_bytes

CONTEXT = 300  # two spans, the last tile not full
LAYERS, KV_HEADS = SPEC.layers, 2
NUMBERS = 64  # of a head of 40, padded
WIDE = changed(SPEC, "architecture.attention", Attention(heads=4, kv_heads=KV_HEADS, head_dim=40))


def made(kind: Kind, context: int = CONTEXT) -> KvCache:
    return KvCache(WIDE, kind, context, CorePlan((WorkerCores(0, (0,)),)), RowSplit(1, False).cuts)


@pytest.fixture(params=[Kind.F32, Kind.F16, Kind.Q8], ids=lambda kind: kind.name)
def cache(request: pytest.FixtureRequest) -> KvCache:
    return made(request.param)


def positions(cache: KvCache) -> list[np.ndarray]:
    """Numbers or scales of keys and of values, as `kv_layout.py` says: [heads, positions, layers, some of each]."""
    kind, views = Kind(cache.layout.kind), []
    for part, array in enumerate(cache._arrays):
        tiles = array.reshape(KV_HEADS, 2, LAYERS, 8, 32 * row_bytes(kind, NUMBERS))
        if kind == Kind.Q8:
            numbers = tiles[..., 32 * NUMBERS :].view(np.float16).reshape(KV_HEADS, 2, LAYERS, 8, 2, 32)
            by_position = numbers.transpose(0, 1, 3, 5, 2, 4)
        else:
            numbers = tiles.view(np.float32 if kind == Kind.F32 else np.float16)
            if part == 0:
                by_position = numbers.reshape(KV_HEADS, 2, LAYERS, 8, NUMBERS, 32).transpose(0, 1, 3, 5, 2, 4)
            else:
                by_position = numbers.reshape(KV_HEADS, 2, LAYERS, 8, 2, 32, 32).transpose(0, 1, 3, 5, 2, 4, 6)
        views.append(by_position)
    return views


def at(position: int) -> tuple[slice | int, ...]:
    return (slice(None), position // 256, position % 256 // 32, position % 32)


def spoil(cache: KvCache, position: int, tokens: int) -> None:
    for view in positions(cache):
        for each in range(position, position + tokens):
            view[at(each)] = np.inf
    cache.spoil(position, tokens)


def spoiled(cache: KvCache) -> list[int]:
    found: list[list[int]] = []
    for view in positions(cache):
        finite = [np.isfinite(view[at(each)]) for each in range(CONTEXT)]
        found.append([position for position, each in enumerate(finite) if not each.any()])
        assert found[-1] == [position for position, each in enumerate(finite) if not each.all()]
    assert found[0] == found[1]
    return found[0]


def test_nothing_is_touched_while_all_is_finite(cache: KvCache) -> None:
    for array in cache._arrays:
        array[:] = 1
    assert cache.clean == CONTEXT
    cache.forget(0)
    assert all((array == 1).all() for array in cache._arrays)


def test_what_is_spoiled_goes_with_its_text(cache: KvCache) -> None:
    for view in positions(cache):
        view[:] = 1
    spoil(cache, 10, 5)
    spoil(cache, 250, 20)
    assert cache.clean == 10
    cache.forget(270)  # the text goes on from there, and keeps what it has
    assert spoiled(cache) == [10, 11, 12, 13, 14, *range(250, 270)]
    assert cache.clean == 10
    spoil(cache, 272, 3)
    cache.forget(12)
    assert spoiled(cache) == [10, 11]
    for view in positions(cache):
        assert (view[at(9)] == 1).all()
        assert (view[at(280)] == 1).all(), "what was finite is zeroed too"
        assert (view[at(260)] == 0).all()
    cache.forget(3)
    assert spoiled(cache) == []
    assert cache.clean == CONTEXT


def test_the_last_position_too(cache: KvCache) -> None:
    spoil(cache, CONTEXT - 1, 1)
    cache.forget(0)
    assert spoiled(cache) == []


def test_bytes() -> None:
    row = 2 * LAYERS * KV_HEADS * NUMBERS
    assert cache_bytes(WIDE, Kind.F16, CONTEXT) == 2 * row * 512 == sum(a.nbytes for a in made(Kind.F16)._arrays)
    assert cache_bytes(WIDE, Kind.Q8, CONTEXT) == row * 512 * 34 // 32
    assert attended_bytes(WIDE, Kind.F32, 100) == 4 * row * 100
    windowed = changed(WIDE, "architecture.attention.windows", (0, 30))
    assert attended_bytes(windowed, Kind.F32, 100) == 4 * row // LAYERS * 130
    assert attended_bytes(windowed, Kind.F32, 20) == 4 * row * 20


def resident(array: np.ndarray) -> int:
    """Bytes of the array's mapping that memory holds."""
    lines, inside = Path("/proc/self/smaps").read_text(encoding="ascii").splitlines(), False
    for line in lines:
        if "-" in (word := line.split()[0]) and not word.endswith(":"):
            low, high = (int(end, 16) for end in word.split("-"))
            inside = low <= address(array) < high
        elif inside and word == "Rss:":
            return int(line.split()[1]) * 1024
    raise AssertionError("the array is not mapped")


def test_a_long_context_takes_no_memory_before_its_tokens_come() -> None:
    cache = made(Kind.F16, 1 << 20)
    keys, values = cache._arrays
    assert keys.nbytes == (1 << 20) * LAYERS * KV_HEADS * NUMBERS * 2
    for array in (keys, values):
        array.reshape(KV_HEADS, 4096, LAYERS, -1)[:, 0] = 1  # what the first 256 tokens touch
        # Huge pages hold a bit more than one span of each head.
        assert resident(array) <= KV_HEADS * 3 * (2 << 20) < array.nbytes // 8
