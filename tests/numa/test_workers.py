"""Workers on their nodes: where their weights are, and that the answer does not depend on it.

scripts/numa_vm.sh pytest -m numa tests/numa/test_workers.py
"""

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from tests.numa.model import PROMPT
from warmfront.coordinator.balancing.baselines import Static
from warmfront.coordinator.decode.thread_team import ThreadTeam
from warmfront.coordinator.engine.engine import Engine
from warmfront.cpu_worker.worker import CpuWorker
from warmfront.shared.errors import ResourceError
from warmfront.shared.machine.memory import anonymous
from warmfront.shared.machine.numa import free_on
from warmfront.shared.machine.topology import Topology

TOKENS = 32
LOCAL = 0.99

pytestmark = pytest.mark.numa


def load(model: Path, **overrides: Any) -> Engine:
    return Engine.load(str(model), gpu="none", context=64, verify=True, tuning=False, **overrides)


def assert_memory_is_local(engine: Engine) -> None:
    """Each worker's weights are on its node, and so are the rows of the coordinator's threads there."""
    for worker, cores in zip(engine.statistics.workers(), engine.plan.cores.workers, strict=True):
        assert worker.nodes.get(f"node{cores.memory}", 0) >= LOCAL * sum(worker.nodes.values()) > 0
    team = engine.session.runtime.team
    assert isinstance(team, ThreadTeam)
    for cpu, pages in zip(engine.plan.cores.coordinator, team.pages(), strict=True):
        assert pages.get(engine.plan.cores.memory_of(cpu) or 0, 0) >= LOCAL * sum(pages.values()) > 0


@pytest.fixture(scope="module")
def expected(two_nodes: Topology, model: Path) -> list[int]:
    """The answer of a single worker."""
    with load(model, workers=1, threads=1) as engine:
        answer = engine.decode_ids(PROMPT, TOKENS)
    assert len(set(answer)) > 10
    return answer


@pytest.fixture(scope="module")
def engine(two_nodes: Topology, model: Path) -> Iterator[Engine]:
    """A worker on each node, the first of them slowed down, so that groups move away from it."""
    with load(model, slow="cpu0:4") as engine:
        yield engine


def test_each_worker_has_its_memory_on_its_node(engine: Engine) -> None:
    assert [worker.node for worker in engine.plan.cores.workers] == [0, 1]
    assert [worker.memory for worker in engine.plan.cores.workers] == [0, 1]
    assert_memory_is_local(engine)


def test_two_workers_answer_as_one(engine: Engine, expected: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine.ownership, "_policy", Static(np.zeros(engine.ownership.home.shape), 1))
    engine.reset()
    assert engine.decode_ids(PROMPT, TOKENS) == expected
    assert engine.ownership.flow.moves == 0


def test_groups_that_move_between_the_nodes_change_nothing(engine: Engine, expected: list[int]) -> None:
    first = engine.ownership.home.copy()
    engine.reset()
    assert engine.decode_ids(PROMPT, TOKENS) == expected
    assert engine.ownership.flow.moves > 0
    assert np.count_nonzero(engine.ownership.home == 1) > np.count_nonzero(first == 1)


def binding(groups: int, group_bytes: int, spare: int) -> Any:
    """What `CpuWorker._bind` needs of a worker."""
    layout = SimpleNamespace(group_bytes=group_bytes)
    return SimpleNamespace(
        _places=range(groups), _model=SimpleNamespace(layout=layout), _spare=spare, _weights=anonymous(1 << 20)
    )


def test_a_worker_refuses_what_its_node_cannot_hold(two_nodes: Topology) -> None:
    """The kernel would kill it."""
    with pytest.raises(ResourceError, match=r"^NUMA node 1 is to hold \d\.\d GB, but has \d\.\d GB free: use a"):
        CpuWorker._bind(binding(11, two_nodes.nodes[1].total_bytes // 10, 0), 1)


def test_a_worker_offers_no_more_slots_than_its_node_can_hold(two_nodes: Topology) -> None:
    group = free_on(1) // 20
    roomy, tight = binding(10, group, 5), binding(15, group, 8)
    CpuWorker._bind(roomy, 1)
    CpuWorker._bind(tight, 1)
    assert roomy._spare == 5
    assert 3 <= tight._spare <= 5


def test_a_worker_without_memory_takes_its_neighbours(without_memory: Topology, model: Path) -> None:
    with load(model, workers=2, threads=2) as engine:
        assert [(worker.node, worker.memory) for worker in engine.plan.cores.workers] == [(0, 0), (1, 2)]
        assert_memory_is_local(engine)
        assert len(engine.decode_ids(PROMPT, 4)) == 4
