"""Read bandwidth, with little memory, and cpus taken away.  pytest tests/coordinator/hardware/test_bandwidth.py"""

import os
from dataclasses import replace

import numpy as np
import pytest

from warmfront.coordinator.hardware import bandwidth
from warmfront.coordinator.hardware.bandwidth import Bandwidth
from warmfront.shared.errors import ResourceError
from warmfront.shared.kernels.jit import kernel
from warmfront.shared.machine.memory import address
from warmfront.shared.machine.topology import Cache, read_topology
from warmfront.shared.wire.handoff import Barrier

CPUS = sorted(os.sched_getaffinity(0))


@pytest.fixture
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    """A cgroup that leaves 64 MB."""
    little = replace(read_topology(), memory_limit=64 << 20)
    monkeypatch.setattr(bandwidth, "read_topology", lambda: little)


@pytest.mark.usefixtures("_small")
def test_the_block_leaves_room_for_others() -> None:
    meter = Bandwidth(CPUS)
    assert (8 << 20) - (16384 * len(CPUS)) < meter._block.nbytes <= 8 << 20
    assert (meter._block == 1).all()
    assert meter.measure() > 0.1


def test_the_block_is_twice_the_caches(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is not touched, so that it costs nothing."""
    monkeypatch.setattr(Bandwidth, "_each", lambda *_: None)
    monkeypatch.setattr(bandwidth, "free_on", lambda _node: 1 << 60)
    monkeypatch.setattr(bandwidth, "bind", lambda *_: None)
    for caches, size in (([], 1 << 30), ([Cache(2, 1 << 20, 4), Cache(3, 3 << 28, 2)], (3 << 30) + (8 << 20))):
        monkeypatch.setattr(bandwidth, "read_caches", lambda allowed, found=caches: tuple(found))
        assert size - (1 << 20) < Bandwidth([0, 1, 2], node=0)._block.nbytes <= size


@pytest.mark.parametrize("way", range(len(bandwidth._WAYS)))
def test_every_way_reads_every_byte(way: int) -> None:
    """Against numpy's sum; the bytes beside those that are read are others."""
    chunks = 11
    around = np.random.default_rng(way).integers(0, 256, (chunks * 4 + 2) * bandwidth._CHUNK, dtype=np.uint8)
    inner = around[bandwidth._CHUNK : -bandwidth._CHUNK]

    @kernel
    def read(way: int, at: int, size: int) -> int:
        return bandwidth._read(way, at, size)

    assert read(way, address(inner), inner.nbytes) == inner.view(np.int32).sum(dtype=np.int32)


def test_a_pass_reads_its_part() -> None:
    """Four laps around the block, one thread; each part is read in turn, and the clock goes on."""
    block = np.random.default_rng(0).integers(0, 99, bandwidth._PARTS * 4096, dtype=np.uint8)
    parts = block.view(np.int32).reshape(bandwidth._PARTS, -1).sum(1, dtype=np.int32)
    times = np.zeros((11, 2), np.int64)
    total = bandwidth._passes(Barrier(0, 1, 0, 0), address(block), block.nbytes, times)
    assert total == sum(int(parts[i % bandwidth._PARTS]) for i in range(11))
    assert (np.diff(times.ravel()) >= 0).all()
    assert times[0, 0] > 0


@pytest.mark.usefixtures("_small")
def test_the_caller_stays_where_it_was() -> None:
    Bandwidth(CPUS[:1]).measure()
    assert sorted(os.sched_getaffinity(0)) == CPUS


@pytest.mark.usefixtures("_small")
@pytest.mark.parametrize("cpus", [[4000], [CPUS[0], 4000], [4000, CPUS[0]]])
def test_a_cpu_that_went_away_is_named(cpus: list[int]) -> None:
    with pytest.raises(ResourceError, match=r"cannot run on cpus \[4000\]"):
        Bandwidth(cpus)
