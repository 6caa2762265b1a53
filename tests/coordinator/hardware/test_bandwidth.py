"""Read bandwidth, with little memory, and cpus taken away.  pytest tests/coordinator/hardware/test_bandwidth.py"""

import os
from dataclasses import replace

import pytest

from warmfront.coordinator.hardware import bandwidth
from warmfront.coordinator.hardware.bandwidth import Bandwidth
from warmfront.shared.errors import ResourceError
from warmfront.shared.machine.topology import read_topology

CPUS = sorted(os.sched_getaffinity(0))


@pytest.fixture
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    """A cgroup that leaves 64 MB."""
    little = replace(read_topology(), memory_limit=64 << 20)
    monkeypatch.setattr(bandwidth, "read_topology", lambda: little)


@pytest.mark.usefixtures("_small")
def test_the_block_leaves_room_for_others() -> None:
    meter = Bandwidth(CPUS)
    assert meter._block.nbytes == 8 << 20
    assert (meter._block.view("i8") == 1).all()
    assert meter.measure() > 0.1


@pytest.mark.usefixtures("_small")
def test_the_caller_stays_where_it_was() -> None:
    Bandwidth(CPUS[:1]).measure()
    assert sorted(os.sched_getaffinity(0)) == CPUS


@pytest.mark.usefixtures("_small")
@pytest.mark.parametrize("cpus", [[4000], [CPUS[0], 4000], [4000, CPUS[0]]])
def test_a_cpu_that_went_away_is_named(cpus: list[int]) -> None:
    with pytest.raises(ResourceError, match=r"cannot run on cpus \[4000\]"):
        Bandwidth(cpus)
