"""The ownership table: owners, drops, moves.  pytest tests/coordinator/balancing/test_ownership.py"""

import numpy as np
import numpy.typing as npt
import pytest

from tests.coordinator.balancing.ownership_bench import (
    CPU0,
    CPU1,
    GPU,
    GROUPS,
    LAYERS,
    LAYOUT,
    SLOTS,
    Bench,
    Clock,
    for_worker,
)
from tests.tables import assert_tables_hold
from warmfront.coordinator.balancing.flow import Flow
from warmfront.coordinator.balancing.interface import BalancerState, Rebalance
from warmfront.coordinator.placement.homes import first_groups
from warmfront.coordinator.workers.events import DeliverMoved
from warmfront.shared.errors import WorkerError
from warmfront.shared.wire.messages import Moved


def test_at_first_everybody_computes_what_it_is_home_to(bench: Bench) -> None:
    np.testing.assert_array_equal(bench.board.owner, bench.home)
    for worker in (CPU0, CPU1):
        # As `CpuWorker` lays its groups out: by layer and group.
        assert bench.board.slot[worker][bench.home == worker].tolist() == list(range(12))
    assert_tables_hold(bench.ownership, SLOTS)
    assert bench.workers.asked == []
    assert bench.ownership.flow == Flow(0, 0, 0)


def test_the_gpu_is_filled_by_moves(bench: Bench) -> None:
    done: list[tuple[int, int]] = []
    wanted = first_groups(GROUPS, LAYERS, 20)
    asked: list[tuple[str, int, list[list[int]]]] = []

    def progress(bytes_done: int, total: int) -> None:
        done.append((bytes_done, total))
        asked.extend(bench.workers.asked)
        bench.workers.arrive()

    bench.ownership.fill(GPU, wanted, progress)
    assert done == [(0, 20 * LAYOUT.group_bytes)]
    assert [(worker, len(places)) for worker, _, places in asked] == [("gpu0", 16), ("gpu0", 4)]
    assert [place for _, _, places in asked for place in places] == [
        [layer, group, slot] for slot, (layer, group) in enumerate(np.argwhere(wanted).tolist())
    ]
    np.testing.assert_array_equal(bench.board.owner == GPU, wanted)
    assert bench.ownership.flow == Flow(0, 0, 0), "what it begins with is no move"
    assert bench.ownership.unused == 0
    assert_tables_hold(bench.ownership, SLOTS)


def test_a_gpu_that_copies_nothing_is_an_error(bench: Bench, clock: Clock) -> None:
    def progress(_done: int, _total: int) -> None:
        clock.now += 10**9

    with pytest.raises(WorkerError, match=r"^worker gpu0 copied no group for 60 s$"):
        bench.ownership.fill(GPU, first_groups(GROUPS, LAYERS, 20), progress)


def test_an_error_ends_the_filling(bench: Bench) -> None:
    bench.workers.error = WorkerError("worker cpu0 was killed")
    with pytest.raises(WorkerError, match="cpu0"):
        bench.ownership.fill(GPU, first_groups(GROUPS, LAYERS, 20), lambda _done, _total: None)


def test_a_group_moves_when_its_copy_is_there(bench: Bench) -> None:
    bench.decide(moves=for_worker(GPU, [(1, 5), (0, 7)]))
    assert bench.workers.asked == [("gpu0", 1, [[0, 7, 0], [1, 5, 1]])]
    for _ in range(3):
        bench.token()
        np.testing.assert_array_equal(bench.board.owner, bench.home)
        assert bench.policy.seen[-1].in_flight[GPU].sum() == (2 if len(bench.policy.seen) > 1 else 0)
    bench.workers.arrive()
    np.testing.assert_array_equal(bench.board.owner, bench.home)
    bench.boundary()
    assert bench.owned(GPU) == [(0, 7), (1, 5)]
    assert bench.board.slot[GPU][0, 7] == 0
    assert bench.board.slot[GPU][1, 5] == 1
    assert bench.ownership.flow == Flow(2, 0, 0)


def test_a_dropped_group_goes_home_and_its_slot_is_free_at_once(bench: Bench) -> None:
    bench.fill()
    slot = int(bench.board.slot[GPU][0, 3])
    bench.decide(drops=for_worker(GPU, [(0, 3)]), moves=for_worker(GPU, [(1, 11)]))
    assert bench.board.owner[0, 3] == bench.home[0, 3] == CPU0
    assert bench.workers.asked[-1][2] == [[1, 11, slot]]
    bench.workers.arrive()
    bench.boundary()
    assert bench.board.owner[1, 11] == GPU
    assert bench.board.slot[GPU][1, 11] == slot
    assert (0, 3) not in bench.resident(GPU)
    # The drop is a change of owner without a copy.
    assert bench.ownership.flow[:2] == (1, 1)


def test_an_owner_changes_without_a_copy(bench: Bench) -> None:
    bench.fill()

    def home(owner: npt.NDArray[np.uint8]) -> None:
        owner[0, :3] = bench.home[0, :3]

    before = bench.board.slot[GPU].copy()
    bench.decide(owner=home)
    assert bench.owned(GPU) == [place for place in bench.resident(GPU) if place not in [(0, 0), (0, 1), (0, 2)]]

    def back(owner: npt.NDArray[np.uint8]) -> None:
        owner[0, 1] = GPU

    bench.decide(owner=back)
    assert (0, 1) in bench.owned(GPU)
    np.testing.assert_array_equal(bench.board.slot[GPU], before)
    assert bench.ownership.flow == Flow(0, 4, 0)
    assert bench.workers.asked == []


def test_moves_are_cut_to_the_budget_and_the_slots_best_first(bench: Bench, clock: Clock) -> None:
    wish = [(layer, group) for group in reversed(range(GROUPS)) for layer in range(LAYERS)]
    assert bench.decide(moves=for_worker(GPU, wish)).copy_budget == 16
    (asked,) = bench.workers.asked
    assert sorted(asked[2]) == asked[2], "neighbours in the file are read at once"
    assert {(layer, group) for layer, group, _ in asked[2]} == set(wish[:16])
    assert bench.decide(moves=for_worker(GPU, wish[16:])).copy_budget == 0
    assert len(bench.workers.asked) == 1
    bench.workers.arrive()
    # Four slots are left.
    assert bench.decide(moves=for_worker(GPU, wish[16:])).free_slots.tolist() == [1, 1, 4]
    assert {(layer, group) for layer, group, _ in bench.workers.asked[-1][2]} == set(wish[16:20])


def test_a_group_moves_between_cpu_workers(bench: Bench) -> None:
    old = int(bench.board.slot[CPU0][1, 2])
    bench.decide(moves=for_worker(CPU1, [(1, 2)]))
    assert bench.workers.asked == [("cpu1", 1, [[1, 2, 12]])]
    bench.token()
    assert bench.board.owner[1, 2] == CPU0
    bench.workers.arrive()
    bench.boundary()
    assert bench.board.owner[1, 2] == bench.ownership.home[1, 2] == CPU1
    assert bench.home[1, 2] == CPU0, "the engine's table is not this one"
    assert bench.board.slot[CPU1][1, 2] == 12
    assert (1, 2) not in bench.resident(CPU0)
    # Its old slot, the lower of the two that are free, is the next to be filled.
    bench.decide(moves=for_worker(CPU0, [(0, 11)]))
    assert bench.workers.asked == [("cpu0", 2, [[0, 11, old]])]
    bench.workers.arrive()
    bench.boundary()
    assert bench.ownership.flow == Flow(2, 0, 0)
    assert bench.ownership.unused == 0, "a home is no cache"


def test_a_group_changes_its_home_while_the_gpu_computes_it(bench: Bench) -> None:
    bench.fill()
    bench.decide(moves=for_worker(CPU1, [(0, 0)]))
    bench.workers.arrive()
    bench.boundary()
    assert bench.board.owner[0, 0] == CPU1
    assert (0, 0) in bench.resident(GPU)
    bench.lose()
    assert bench.board.owner[0, 0] == CPU1
    assert bench.board.owner[0, 1] == CPU0


def test_any_sequence_of_events_keeps_the_tables(clock: Clock) -> None:
    """A thousand random drops, moves, arrivals in any order, losses and returns."""
    rng = np.random.default_rng(9)
    for _ in range(6):
        bench = Bench()
        bench.fill(int(rng.integers(1, 21)))
        away = False

        def random_decision(state: BalancerState) -> Rebalance:
            home = bench.ownership.home  # noqa: B023
            owner = state.owner.copy()
            dropped = [tuple(place) for place in np.argwhere(state.resident[GPU]) if rng.random() < 0.2]
            for layer, group in dropped:
                owner[layer, group] = home[layer, group]
            for layer, group in np.argwhere(state.resident[GPU]):
                if (layer, group) not in dropped and rng.random() < 0.2:
                    owner[layer, group] = rng.choice([GPU, home[layer, group]])
            wishes = [
                (worker, layer, group)
                for worker in range(3)
                for layer, group in np.argwhere(~state.resident[worker])
                # A group comes to one other home at a time.
                if not state.in_flight[worker if worker == GPU else slice(0, 2), layer, group].any()
                and rng.random() < 0.3
            ]
            homes: set[tuple[int, int]] = set()
            moves = []
            for worker, layer, group in rng.permutation(np.array(wishes).reshape(-1, 3)).tolist():
                if worker == GPU or (layer, group) not in homes:
                    moves.append((worker, layer, group))
                    homes |= {(layer, group)} if worker != GPU else set()
            drops = for_worker(GPU, dropped)
            return Rebalance(owner, drops, np.array(moves, np.int64).reshape(-1, 3))

        for _ in range(150):
            clock.now += 1_000_000
            if rng.random() < 0.08:
                bench.lose() if not away else bench.rejoin(int(rng.integers(0, 25)))
                away = not away
            done = [asked for asked in bench.workers.asked if rng.random() < 0.4]
            bench.workers.asked = [asked for asked in bench.workers.asked if asked not in done]
            bench.workers.pending += [DeliverMoved(worker, Moved(batch, 10)) for worker, batch, _ in done]
            bench.policy.next = random_decision
            bench.token()
        assert bench.ownership.flow.moves > 100
        assert bench.ownership.flow.flips > 10
