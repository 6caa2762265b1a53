"""The ownership table when workers die and come back.  pytest tests/coordinator/balancing/test_ownership_losses.py"""

import numpy as np
import pytest

from tests.coordinator.balancing.ownership_bench import ALL, GPU, GROUPS, LAYERS, Bench, Clock, for_worker, report
from warmfront.coordinator.balancing.cost_model import WorkerCosts
from warmfront.coordinator.placement.homes import first_groups
from warmfront.coordinator.workers.events import DeliverMoved, WorkerRejoined
from warmfront.shared.errors import WorkerError
from warmfront.shared.wire.messages import Moved, Ready


def test_a_gpu_that_dies_while_it_is_filled_is_done_without(bench: Bench) -> None:
    bench.ownership.fill(GPU, first_groups(GROUPS, LAYERS, 20), lambda _done, _total: bench.workers.die())
    assert bench.workers.restarted == ["gpu0"]
    np.testing.assert_array_equal(bench.board.owner, bench.home)
    bench.rejoin()
    assert sum(len(places) for _, _, places in bench.workers.asked[-2:]) == 20


def test_a_lost_gpu_owns_nothing(bench: Bench) -> None:
    filled = bench.fill(10)
    bench.decide(moves=for_worker(GPU, [(1, 9), (1, 10)]))
    stale = bench.workers.asked.copy()
    bench.board.requested[GPU][:] = ALL
    bench.board.quit[GPU][0] = bench.dead[GPU] = 1
    bench.lose()
    np.testing.assert_array_equal(bench.board.owner, bench.home)
    assert bench.present.tolist() == [1, 1, 0]
    assert bench.said == ["worker gpu0 was killed; the run goes on without it"]
    assert not bench.board.requested[GPU].any()
    assert bench.board.quit[GPU][0] == bench.dead[GPU] == 0
    assert bench.workers.restarted == ["gpu0"]
    # What its predecessor copied is not there, and nobody asks one that is away.
    bench.workers.arrive()
    assert bench.decide(moves=for_worker(GPU, [(0, 11)])).free_slots.tolist() == [1, 1, 0]
    assert bench.workers.asked == []
    assert bench.resident(GPU) == []
    bench.rejoin()
    assert bench.present.tolist() == [1, 1, 1]
    (asked,) = bench.workers.asked
    assert [(layer, group) for layer, group, _ in asked[2]] == sorted([*filled, (1, 9), (1, 10)])
    assert [slot for *_, slot in asked[2]] == list(range(12))
    assert asked[1] > stale[-1][1], "batches are never confused"
    np.testing.assert_array_equal(bench.board.owner, bench.home)
    bench.workers.arrive()
    bench.boundary()
    assert bench.owned(GPU) == sorted([*filled, (1, 9), (1, 10)])


def test_a_gpu_that_comes_back_with_fewer_slots(bench: Bench) -> None:
    bench.fill()
    bench.lose()
    bench.rejoin(5)
    assert bench.said[1:] == ["worker gpu0 is back"]
    bench.workers.arrive()
    bench.boundary()
    assert len(bench.owned(GPU)) == 5
    bench.lose()
    bench.rejoin(0)
    assert bench.owned(GPU) == []


@pytest.mark.parametrize("arrived", [False, True])
def test_a_gpu_that_is_lost_while_it_is_refilled(bench: Bench, arrived: bool) -> None:
    filled = bench.fill()
    bench.lose()
    bench.rejoin()
    if arrived:
        _, batch, _ = bench.workers.asked[0]
        bench.workers.pending.append(DeliverMoved("gpu0", Moved(batch, 1)))
        bench.boundary()
        assert len(bench.owned(GPU)) == 16
    bench.workers.asked.clear()
    bench.lose()
    np.testing.assert_array_equal(bench.board.owner, bench.home)
    bench.rejoin()
    bench.workers.arrive()
    bench.boundary()
    assert bench.owned(GPU) == filled
    assert bench.workers.restarted == ["gpu0"] * 2


def test_a_gpu_that_is_lost_again_before_it_is_back(bench: Bench) -> None:
    filled = bench.fill()
    bench.lose()
    for _ in range(2):
        bench.workers.die()
        bench.boundary()
    assert bench.workers.restarted == ["gpu0"] * 3
    bench.rejoin()
    bench.workers.arrive()
    bench.boundary()
    assert bench.owned(GPU) == filled


def test_everything_at_one_boundary(bench: Bench) -> None:
    """During one long job the worker came back, copied, and died again."""
    filled = bench.fill()
    bench.lose()
    bench.workers.pending.append(WorkerRejoined("gpu0", Ready(20, {})))
    bench.workers.die()
    bench.boundary()
    assert bench.present[GPU] == 0
    np.testing.assert_array_equal(bench.board.owner, bench.home)
    bench.rejoin()
    bench.workers.arrive()
    bench.boundary()
    assert bench.owned(GPU) == filled


def test_after_a_job_that_a_death_has_ended(bench: Bench) -> None:
    bench.fill()
    bench.workers.die()
    assert bench.ownership.await_loss()
    np.testing.assert_array_equal(bench.board.owner, bench.home)
    assert bench.present[GPU] == 0


def test_a_job_that_ended_for_no_known_death(bench: Bench, clock: Clock) -> None:
    assert not bench.ownership.await_loss()
    bench.workers.error = WorkerError("worker cpu0 was killed")
    with pytest.raises(WorkerError, match="cpu0"):
        bench.ownership.await_loss()


def test_the_counters_of_a_restarted_worker_begin_at_0(bench: Bench) -> None:
    """Whether its successor has done less than it had, or more."""
    ownership, expected = bench.ownership, WorkerCosts(20_000.0, 0.05)
    for jobs in (100, 10, 500):
        busy, read = np.array([2000, 3000]) * jobs, np.array([10_000, 20_000]) * jobs
        ownership.update_costs({"gpu0": report(LAYERS * jobs, busy, read), "cpu0": report(0, [0, 0], [0, 0])})
        expected.update(jobs, busy, read)
        assert ownership.costs[GPU].job_ns == expected.job_ns
        assert ownership.costs[GPU].byte_ns == expected.byte_ns
        bench.lose()
        bench.rejoin()
