"""Workers on their nodes: where their weights are, and that the answer does not depend on it.

scripts/numa_vm.sh pytest -m numa tests/numa/test_workers.py
"""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.numa.model import ANSWER, PROMPT, TOKENS, answer
from warmfront.coordinator.balancing.baselines import Static
from warmfront.coordinator.decode.thread_team import ThreadTeam
from warmfront.coordinator.engine.engine import Engine
from warmfront.coordinator.packing.packer import ensure_packed
from warmfront.cpu_worker.resident_groups import ResidentGroups
from warmfront.shared.errors import ResourceError
from warmfront.shared.kernels.fetching import usual_distances
from warmfront.shared.machine.numa import free_on
from warmfront.shared.machine.topology import Topology
from warmfront.shared.model.store import PackedModel
from warmfront.shared.wire.messages import Assignment

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
    found: list[int] = json.loads(ANSWER.read_text()) if ANSWER.exists() else answer(model, workers=1)
    assert len(set(found)) > 10
    return found


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
    monkeypatch.setattr(engine.ownership, "policy", Static(np.zeros(engine.ownership.home.shape), 1))
    engine.reset()
    assert engine.decode_ids(PROMPT, TOKENS) == expected
    assert engine.ownership.flow.moves == 0


def test_groups_that_move_between_the_nodes_change_nothing(engine: Engine, expected: list[int]) -> None:
    first = engine.ownership.home.copy()
    engine.reset()
    assert engine.decode_ids(PROMPT, TOKENS) == expected
    assert engine.ownership.flow.moves > 0
    assert np.count_nonzero(engine.ownership.home == 1) > np.count_nonzero(first == 1)


@pytest.fixture
def packed(two_nodes: Topology, model: Path) -> Iterator[PackedModel]:
    with PackedModel(ensure_packed(model, "f16", print, lambda _done, _total: None)) as packed:
        yield packed


def resident(model: PackedModel, weights: int, spare: int) -> ResidentGroups:
    """The memory of a worker on node 1 that is the home of groups of `weights` bytes, none of them read."""
    group = model.layout.group_bytes
    plan = Assignment(
        index=0,
        model=os.fspath(model.path),
        neuron_order=model.order,
        cpus=[1],
        selector="all",
        home=b"",
        spare_slots=spare // group,
        slowdown=1.0,
        vram_budget=0,
        memory_node=1,
        distances=usual_distances().tobytes(),
    )
    return ResidentGroups(plan, model, np.zeros((weights // group, 2), np.int64), None)


def test_a_worker_refuses_what_its_node_cannot_hold(two_nodes: Topology, packed: PackedModel) -> None:
    """The kernel would kill it."""
    with pytest.raises(ResourceError, match=r"^NUMA node 1 is to hold \d\.\d GB, but has \d\.\d GB free: use a"):
        resident(packed, two_nodes.nodes[1].total_bytes * 11 // 10, 0)


def test_a_worker_offers_no_more_slots_than_its_node_can_hold(packed: PackedModel) -> None:
    free, group = free_on(1), packed.layout.group_bytes

    def spare(weights: int, asked: int) -> int:
        slots, _pages = resident(packed, weights, asked).capacity()
        return (slots - weights // group) * group

    assert spare(free // 2, free // 4) == free // 4 // group * group
    assert 0.15 * free < spare(free * 3 // 4, free * 2 // 5) <= 0.26 * free


def test_a_worker_without_memory_takes_its_neighbours(without_memory: Topology, model: Path) -> None:
    with load(model, workers=2, threads=2) as engine:
        assert [(worker.node, worker.memory) for worker in engine.plan.cores.workers] == [(0, 0), (1, 2)]
        assert_memory_is_local(engine)
        assert len(engine.decode_ids(PROMPT, 4)) == 4
