"""What one text leaves in the KV cache does not reach the next.  pytest tests/coordinator/decode/test_kv_cache.py"""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from warmfront.coordinator.decode.footprint import cache_bytes
from warmfront.coordinator.decode.kv_cache import KvCache
from warmfront.coordinator.decode.row_split import RowSplit
from warmfront.coordinator.packing.packer import ensure_packed
from warmfront.shared.machine.core_plan import CorePlan, WorkerCores
from warmfront.shared.model.store import PackedModel

CONTEXT, LAYERS, KV_HEADS = 40, 2, 2


@pytest.fixture
def cache(tiny_llama: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> KvCache:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with PackedModel(ensure_packed(tiny_llama(), "f16", print, lambda _done, _total: None)) as model:
        made = KvCache(model, CONTEXT, CorePlan((WorkerCores(0, (0,)),)), RowSplit(1, False).cuts)
        assert cache_bytes(model, CONTEXT) == 2 * rows(made)[0].nbytes
    return made


def rows(cache: KvCache) -> list[np.ndarray]:
    """Keys and values: float16 [layers and heads, positions, head_dim padded to 32]."""
    count = LAYERS * KV_HEADS * CONTEXT * 32
    return [array[: 2 * count].view(np.float16).reshape(-1, CONTEXT, 32) for array in cache._arrays]


def spoil(cache: KvCache, position: int, tokens: int) -> None:
    for array in rows(cache):
        array[:, position : position + tokens] = np.inf
    cache.spoil(position, tokens)


def spoiled(cache: KvCache) -> list[int]:
    keys, values = (np.flatnonzero(~np.isfinite(array).all((0, 2))).tolist() for array in rows(cache))
    assert keys == values
    return keys


def test_nothing_is_touched_while_all_is_finite(cache: KvCache) -> None:
    for array in rows(cache):
        array[:] = 1
    assert cache.clean == CONTEXT
    cache.forget(0)
    assert all((array == 1).all() for array in rows(cache))


def test_what_is_spoiled_goes_with_its_text(cache: KvCache) -> None:
    spoil(cache, 10, 5)
    spoil(cache, 20, 1)
    assert cache.clean == 10
    cache.forget(20)  # the text goes on from there, and keeps what it has
    assert spoiled(cache) == [10, 11, 12, 13, 14]
    assert cache.clean == 10
    spoil(cache, 22, 3)
    cache.forget(12)
    assert spoiled(cache) == [10, 11]
    cache.forget(3)
    assert spoiled(cache) == []
    assert cache.clean == CONTEXT


def test_the_last_position_too(cache: KvCache) -> None:
    spoil(cache, CONTEXT - 1, 1)
    cache.forget(0)
    assert spoiled(cache) == []
