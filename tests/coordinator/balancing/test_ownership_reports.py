"""What the ownership table measures, tells the policy, and checks.

Run: pytest tests/coordinator/balancing/test_ownership_reports.py
"""

import numpy as np
import numpy.typing as npt
import pytest

from tests.coordinator.balancing.ownership_bench import (
    ALL,
    CPU0,
    GPU,
    GROUPS,
    HIDDEN,
    LAYERS,
    LAYOUT,
    Bench,
    Clock,
    for_worker,
    report,
)
from warmfront.coordinator.balancing.cost_model import WorkerCosts
from warmfront.shared.errors import WorkerError


def test_the_decision_is_made_every_so_many_tokens(bench: Bench) -> None:
    bench.policy.interval = 5
    for _ in range(16):
        bench.token()
    assert len(bench.policy.seen) == 3
    for _ in range(10):
        bench.boundary()  # of jobs of several tokens, which are not observed
    assert len(bench.policy.seen) == 3


def test_the_budget_is_a_quarter_of_the_time(bench: Bench, clock: Clock) -> None:
    """Of the time that tokens take: time between two answers does not count."""
    first_guess = LAYOUT.group_bytes / 4.0
    bench.policy.interval = 4
    for _ in range(8):
        bench.boundary()
        clock.now += 2_000_000
        bench.ownership.observe()
        clock.now += 10**12
    bench.boundary()
    assert bench.policy.seen[-1].copy_budget == int(0.25 * 4 * 2_000_000 / first_guess)
    assert bench.policy.seen[-1].transfer_ns == first_guess


def test_copies_are_measured(bench: Bench, clock: Clock) -> None:
    bench.decide(moves=for_worker(GPU, [(0, 0), (0, 1)]))
    begun = clock.now
    clock.now += 777
    bench.workers.arrive(ns=80_000)
    bench.boundary()
    assert list(bench.ownership.transfers) == [(GPU, 2, begun, begun + 777)]
    first_guess = LAYOUT.group_bytes / 4.0
    assert bench.decide().transfer_ns == pytest.approx(0.8 * first_guess + 0.2 * 40_000)


def test_the_policy_hears_of_copies_that_are_late(bench: Bench) -> None:
    assert not bench.decide(moves=for_worker(GPU, [(0, 0)])).copies_late
    assert bench.decide(moves=for_worker(GPU, [(0, 1)])).copies_late
    assert bench.decide().copies_late
    bench.workers.arrive()
    assert not bench.decide().copies_late


def test_what_the_policy_is_told_of_the_workers(bench: Bench) -> None:
    bench.fill()
    state = bench.decide()
    assert state.is_home.tolist() == [True, True, False]
    assert state.costs.shape == (3, 2)
    np.testing.assert_array_equal(state.home, bench.ownership.home)
    np.testing.assert_array_equal(state.resident, bench.ownership.resident)


def test_copies_that_were_of_no_use(bench: Bench) -> None:
    """Those that are dropped, or are still there, without having fired on the GPU."""
    bench.fill(4)  # (0, 0), (0, 1), (1, 0), (1, 1): not counted
    moves = [(0, group) for group in range(4, 8)]
    bench.decide(moves=for_worker(GPU, moves))
    bench.token(fired=moves)  # at home, while they are copied
    assert bench.ownership.unused == 0
    bench.workers.arrive()
    bench.token(fired=[(1, 0), (0, 4)])
    assert bench.ownership.unused == 3
    assert bench.ownership.flow.unused == 0
    bench.decide(drops=for_worker(GPU, [(0, 0), (0, 4), (0, 5)]))
    assert bench.ownership.flow.unused == 1
    assert bench.ownership.unused == 3

    def home(owner: npt.NDArray[np.uint8]) -> None:
        owner[0, 6] = bench.home[0, 6]

    bench.decide(owner=home)
    bench.token(fired=[(0, 6)])  # at home again
    assert bench.ownership.unused == 3
    bench.token(fired=[(0, 7)])
    assert bench.ownership.unused == 2
    bench.lose()
    assert bench.ownership.unused == 1, "what a dead worker held is not its policy's fault"


@pytest.mark.parametrize("predicted", [False, True])
def test_the_policy_sees_what_was_read(predicted: bool) -> None:
    bench = Bench(predicted)
    bench.fill(5)
    rng = np.random.default_rng(2)
    mask, fired = (rng.integers(0, 1 << 32, (LAYERS, GROUPS), dtype=np.uint32) for _ in range(2))
    bench.board.mask[:], bench.board.computed[:] = mask, fired
    bench.ownership.observe()
    (used,) = bench.policy.observed
    read, active = used.bytes_read(), used.active()
    loads = np.zeros((LAYERS, 3))
    for layer in range(LAYERS):
        for group in range(GROUPS):
            asked = int(mask[layer, group]).bit_count() if predicted else 32
            # Of experts that were not asked for, the board keeps what was computed for an earlier token.
            whole = int(fired[layer, group] & (mask[layer, group] if predicted else 0xFFFFFFFF)).bit_count()
            expected = 4 * HIDDEN * (asked + 2 * whole)  # a gate row for each, up and down rows of those that fire
            assert read[layer, group] == expected
            assert active[layer, group] == whole / 32
            loads[layer, bench.board.owner[layer, group]] += expected
    np.testing.assert_allclose(bench.ownership.layer_loads(), loads)
    np.testing.assert_allclose(bench.ownership.share(), loads.sum(0) / loads.sum())


def test_experts_that_a_token_does_not_use_do_not_count() -> None:
    bench = Bench(predicted=True)
    bench.board.mask[:], bench.board.computed[:] = 0, ALL
    bench.board.mask[0, 1, 3:7] = ALL
    bench.ownership.observe()
    (used,) = bench.policy.observed
    expected = np.zeros((LAYERS, GROUPS))
    expected[1, 3:7] = 1
    np.testing.assert_array_equal(used.active(), expected)
    np.testing.assert_array_equal(used.bytes_read(), 32 * 3 * 4 * HIDDEN * expected)
    assert bench.ownership.layer_loads().sum() == used.bytes_read().sum()
    assert np.count_nonzero(bench.ownership.fired()) == 4


def test_only_every_so_many_tokens_are_observed(bench: Bench, clock: Clock) -> None:
    bench.policy.stride = 3
    for _ in range(7):
        clock.now += 1_000_000
        bench.token()
    assert len(bench.policy.observed) == 2


def test_costs_are_fitted_to_the_differences_of_reports(bench: Bench) -> None:
    ownership, expected = bench.ownership, WorkerCosts(20_000.0, 0.05)
    total = np.zeros((2, LAYERS), np.int64)
    jobs = 0
    for more, line in ((10, (3000, 0.1)), (7, (3000, 0.1)), (0, (0, 0)), (12, (9000, 0.3))):
        read = np.array([40_000, 90_000]) * more
        busy = (line[0] * more + line[1] * read).astype(np.int64)
        total += busy, read
        jobs += LAYERS * more
        ownership.update_costs({"cpu0": report(jobs, *total)})
        expected.update(more, busy, read)
        assert ownership.costs[CPU0].job_ns == expected.job_ns
        assert ownership.costs[CPU0].byte_ns == expected.byte_ns
        ownership.update_costs({"cpu0": report(jobs, *total)})  # the same again says nothing
    assert ownership.costs[CPU0].byte_ns == expected.byte_ns != 0.05
    assert (ownership.costs[GPU].job_ns, ownership.costs[GPU].byte_ns) == (20_000.0, 0.05)


def test_reports_are_asked_for_now_and_then(bench: Bench, clock: Clock) -> None:
    bench.token()
    bench.token()
    assert bench.workers.inquiries == 1
    for _ in range(5):
        bench.token()
        clock.now += 1_000_000
    assert bench.workers.inquiries == 1, "they were asked a moment ago"
    bench.workers.answers = {"cpu0": report(LAYERS, [7000, 9000], [20_000, 40_000])}
    clock.now += 60_000_000
    bench.token()
    assert bench.workers.inquiries == 2
    fitted = WorkerCosts(20_000.0, 0.05)
    fitted.update(1, [7000, 9000], [20_000, 40_000])
    assert bench.policy.seen[-1].costs[CPU0].tolist() == [fitted.job_ns, fitted.byte_ns]


@pytest.mark.parametrize("predicted", [False, True])
@pytest.mark.parametrize("token", [0, 2])
def test_verify(predicted: bool, token: int) -> None:
    """Of each token of a batch."""
    bench = Bench(predicted)
    bench.fill(7)
    board = bench.board
    board.mask[:] = np.random.default_rng(4).integers(1, 1 << 32, board.mask.shape, dtype=np.uint32)
    wanted = board.mask if predicted else np.full_like(board.mask, ALL)
    for worker in range(3):
        board.requested[worker][:] = np.where(board.owner == worker, wanted, 0)
    bench.ownership.verify(token + 1)
    for place in ((token, 0, 0), (token, 1, 11)):
        _, layer, group = place
        owner = int(board.owner[layer, group])
        for worker in range(3):
            for bit in (int(wanted[place]) & -int(wanted[place]), int(wanted[place])):
                # Not computed by its owner, or computed by another too.
                board.requested[worker][place] ^= np.uint32(bit)
                with pytest.raises(WorkerError, match=f"^group {group} of layer {layer} was not computed exactly once"):
                    bench.ownership.verify(token + 1)
                board.requested[worker][place] ^= np.uint32(bit)
        if predicted:
            # Computed though it was not selected.
            board.requested[owner][place] = ALL
            with pytest.raises(WorkerError, match="exactly once"):
                bench.ownership.verify(token + 1)
            board.requested[owner][place] = wanted[place]
    bench.ownership.verify(token + 1)
    # What one that is away has left there does not count, and what it would have computed is missing.
    bench.present[GPU] = 0
    with pytest.raises(WorkerError, match=r"^group 0 of layer 0 "):
        bench.ownership.verify(token + 1)


def test_a_batch_is_its_accepted_tokens(bench: Bench, clock: Clock) -> None:
    """Each is observed by what it fired itself; the time of the job is theirs together."""
    board, bench.policy.interval = bench.board, 8
    bench.boundary()
    board.computed[:] = 0
    board.computed[1, 0, 3] = 0xFF
    clock.now += 6_000_000
    for token in range(3):
        bench.ownership.observe(token)
    assert [float(used.active().sum()) for used in bench.policy.observed] == [0, 8 / 32, 0]
    # With three tokens a job the reports are asked for in time, though no job begins just before the decision.
    bench.boundary()
    assert bench.workers.inquiries == 0
    for token in range(3):
        bench.ownership.observe(token)
    bench.boundary()
    assert bench.workers.inquiries == 1
