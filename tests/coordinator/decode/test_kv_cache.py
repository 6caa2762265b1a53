"""Where keys and values lie, and that what is not finite does not reach the next text.

Run: pytest tests/coordinator/decode/test_kv_cache.py
"""

from pathlib import Path

import numpy as np
import pytest

from tests.shared.model.specs import SPEC, changed
from warmfront.coordinator.decode.footprint import attended_bytes, cache_bytes
from warmfront.coordinator.decode.kv.cache import KvCache
from warmfront.coordinator.decode.row_split import RowSplit
from warmfront.coordinator.decode.team_config import TeamConfig
from warmfront.shared.machine.core_plan import CorePlan, WorkerCores
from warmfront.shared.machine.memory import address
from warmfront.shared.model.architecture import Attention
from warmfront.shared.model.formats import Kind, row_bytes
from warmfront.shared.selector import ALL

CONTEXT = 100  # four pages, the last not full
TEXTS = 2
PAGES = 8
# The second text's.
TABLE = np.array([6, 2, 7, 1])
LAYERS, KV_HEADS = SPEC.layers, 2
NUMBERS = 64  # of a head of 40, padded
WIDE = changed(SPEC, "architecture.attention", Attention(heads=4, kv_heads=KV_HEADS, head_dim=40))


def made(kind: Kind, context: int = CONTEXT, texts: int = TEXTS) -> KvCache:
    plan = CorePlan((WorkerCores(0, (0,)),))
    config = TeamConfig(cores=plan, context=context, texts=texts, cache_kind=kind, selector=ALL)
    return KvCache(WIDE, config, RowSplit(1, False).cuts)


def positions(cache: KvCache) -> list[np.ndarray]:
    """Numbers or scales of keys and of values, as `kv_layout.py` says: [pages, positions, ...]."""
    kind, views = Kind(cache.layout.kind), []
    for part, array in enumerate(cache._arrays):
        tiles = array.reshape(KV_HEADS, PAGES, LAYERS, 32 * row_bytes(kind, NUMBERS))
        if kind == Kind.Q8:
            numbers = tiles[..., 32 * NUMBERS :].view(np.float16)
            views.append(numbers.reshape(KV_HEADS, PAGES, LAYERS, 2, 32).transpose(1, 4, 0, 2, 3))
            continue
        numbers = tiles.view(np.float32 if kind == Kind.F32 else np.float16)
        if part == 0:
            views.append(numbers.reshape(KV_HEADS, PAGES, LAYERS, NUMBERS, 32).transpose(1, 4, 0, 2, 3))
        else:
            views.append(numbers.reshape(KV_HEADS, PAGES, LAYERS, 2, 32, 32).transpose(1, 4, 0, 2, 3, 5))
    return views


@pytest.mark.parametrize("kind", [Kind.F32, Kind.F16, Kind.Q8], ids=lambda kind: kind.name)
@pytest.mark.parametrize(("first", "end"), [(10, 15), (30, 70), (96, 100), (0, 100), (40, 40)])
def test_what_is_scrubbed(kind: Kind, first: int, end: int) -> None:
    """These positions of this text, in all heads and layers, and nothing else."""
    cache = made(kind)
    for view in positions(cache):
        view[:] = np.inf
    cache.scrub(TABLE, first, end)
    wanted = np.zeros((PAGES, 32), bool)
    for position in range(first, end):
        wanted[TABLE[position // 32], position % 32] = True
    for view in positions(cache):
        assert (view[wanted] == 0).all()
        assert np.isinf(view[~wanted]).all()


def test_bytes() -> None:
    row = 2 * LAYERS * KV_HEADS * NUMBERS
    assert cache_bytes(WIDE, Kind.F16, CONTEXT, 2) == 2 * row * 256 == sum(a.nbytes for a in made(Kind.F16)._arrays)
    assert cache_bytes(WIDE, Kind.Q8, CONTEXT) == row * 128 * 34 // 32
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
    cache = made(Kind.F16, 1 << 20, texts=1)
    keys, values = cache._arrays
    assert keys.nbytes == (1 << 20) * LAYERS * KV_HEADS * NUMBERS * 2
    for array in (keys, values):
        array.reshape(KV_HEADS, 1 << 15, LAYERS, -1)[:, :8] = 1  # what the first 256 tokens touch
        # Huge pages hold a bit more than that of each head.
        assert resident(array) <= KV_HEADS * 3 * (2 << 20) < array.nbytes // 8
