"""What a user can wish for of offloading, and what a cache's counters say.

pytest tests/shared/test_offload.py
"""

import pytest

from warmfront.shared.config import EngineConfig
from warmfront.shared.errors import UsageError
from warmfront.shared.offload import PRESETS, CacheCounters, OffloadStrategy


@pytest.mark.parametrize(
    ("wish", "said"),
    [
        ({"ram_share": 0.0}, "a share of 0.0 of the neurons in RAM"),
        ({"gpu_share": 1.5}, "a share of 1.5 of the neurons in GPU"),
        ({"policy": "fifo"}, "no policy 'fifo'"),
        ({"window": -1}, "a window of -1 tokens"),
    ],
)
def test_a_strategy_that_cannot_be_is_refused(wish: dict[str, float], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        OffloadStrategy(**wish)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("wish", "said"),
    [
        ({"offload": "fastest"}, "no preset 'fastest'"),
        ({"offload": "balanced", "ram_budget": 1}, "--offload with --ram-budget"),
        ({"ram_budget": 0}, "a RAM budget of 0 bytes"),
        ({"offload_policy": "fifo"}, "no policy 'fifo'"),
        ({"offload_window": -1}, "a window of -1 tokens"),
        ({"offload": 0.4}, "offload=0.4: it must be of type"),
    ],
)
def test_a_run_that_cannot_be_is_refused(wish: dict[str, object], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        EngineConfig(**wish)  # type: ignore[arg-type]


def test_presets() -> None:
    assert {name: (preset.ram_share, preset.policy) for name, preset in PRESETS.items()} == {
        "max-speed": (None, "balance"),
        "balanced": (0.4, "balance"),
        "min-memory": (0.2, "window"),
    }
    for preset in PRESETS:
        assert EngineConfig(offload=preset).offload == preset


def test_counters() -> None:
    # 100 tokens: 98 missed nothing, one a tenth, one nearly all.
    shares = [0] * 101
    shares[0], shares[10], shares[97] = 98, 1, 1
    counters = CacheCounters.of([90, 10, 8, 20, 3_000_000, 2_000_000, 500_000_000, 100, *shares])
    assert counters.hit_share == 0.9
    assert (counters.miss_share(0.5), counters.miss_share(0.99), counters.miss_share(1)) == (0, 0.1, 0.97)
    assert counters.bandwidth == 1.5e9
    assert counters.described() == (
        "from the disk 0.0 MB a token at 1500 MB/s · 90.0% of the neurons were in memory, of 99 % of the tokens 90% or "
        "more · waited 5.0 ms a token"
    )
    later = CacheCounters.of([90, 20, 8, 20, 3_000_000, 2_000_000, 600_000_000, 101, *shares[:-1], 1])
    since = later.since(counters)
    assert (since.hits, since.misses, since.stall_ns, since.tokens) == (0, 10, 100_000_000, 1)
    assert since.shares == (*[0] * 100, 1)
    nothing = CacheCounters.of([0] * (8 + 101))
    assert (nothing.hit_share, nothing.miss_share(0.99), nothing.bandwidth) == (0, 0, 0)
