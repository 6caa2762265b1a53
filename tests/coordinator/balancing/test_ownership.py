"""The front without processes: tables, moves, losses, measures.

Run: pytest tests/coordinator/balancing/test_ownership.py
"""

from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from tests.tables import assert_tables_hold
from warmfront.coordinator.balancing import ownership as front_module
from warmfront.coordinator.balancing.cost_model import WorkerCosts
from warmfront.coordinator.balancing.interface import BalancerState, Rebalance
from warmfront.coordinator.balancing.ownership import Flow, Ownership
from warmfront.coordinator.placement.homes import first_groups
from warmfront.coordinator.workers.events import DeliverMoved, WorkerLost, WorkerRejoined
from warmfront.coordinator.workers.supervisor import News
from warmfront.shared.errors import WorkerError
from warmfront.shared.model.bundle import BundleLayout
from warmfront.shared.model.formats import Kind
from warmfront.shared.wire.board import Board, BoardSizes
from warmfront.shared.wire.messages import LoadReport, Move, Moved, Ready

LAYERS, GROUPS, HIDDEN = 2, 12, 32
NAMES = ("cpu0", "cpu1", "gpu0")
CPU0, CPU1, GPU = range(3)
# Each CPU worker is home to half of the 24 groups and has a spare slot.
SLOTS = {"cpu0": 13, "cpu1": 13, "gpu0": 20}
LAYOUT = BundleLayout(hidden=HIDDEN, ffn=32 * GROUPS, gate_kind=Kind.F32, down_kind=Kind.F32)
ALL = 0xFFFFFFFF
Places = list[tuple[int, int]]


class Workers:
    """In the supervisor's place: keeps what it is asked, and says what it is told to."""

    def __init__(self, slots: Mapping[str, int]) -> None:
        self.readies = {name: Ready(0, count, {}) for name, count in slots.items()}
        self.asked: list[tuple[str, int, list[list[int]]]] = []  # worker, batch, places
        self.coming: list[News] = []
        self.restarted: list[str] = []
        self.answers: Mapping[str, LoadReport] | None = None
        self.inquiries = 0
        self.error: WorkerError | None = None
        self.at_once = False

    def move(self, worker: str, move: Move) -> None:
        places = np.frombuffer(move.places, np.int32).reshape(-1, 3).tolist()
        self.asked.append((worker, move.batch, places))
        if self.at_once:
            self.arrive()

    def arrive(self, ns: int = 1000) -> None:
        """Everything asked for has been copied, in `ns` each batch."""
        self.coming += [DeliverMoved(worker, Moved(batch, ns)) for worker, batch, _ in self.asked]
        self.asked.clear()

    def die(self, worker: str = "gpu0") -> None:
        self.coming.append(WorkerLost(worker, WorkerError(f"worker {worker} was killed")))

    def news(self, wait_s: float = 0.0) -> list[News]:
        told, self.coming = self.coming, []
        return told

    def restart(self, worker: str) -> None:
        self.restarted.append(worker)

    def check(self) -> None:
        if self.error is not None:
            raise self.error

    def reported(self) -> Mapping[str, LoadReport] | None:
        return self.answers

    def request_reports(self) -> None:
        self.inquiries += 1
        self.answers = None


class Script:
    """A policy that does what it was told to do next, else nothing."""

    name = "script"
    every = 1

    def __init__(self) -> None:
        self.next: Callable[[BalancerState], Rebalance] | None = None
        self.seen: list[BalancerState] = []
        self.observed: list[tuple[Any, Any]] = []

    def observe(self, bytes_read: npt.NDArray[np.floating], active: npt.NDArray[np.floating]) -> None:
        self.observed.append((bytes_read.copy(), active.copy()))

    def decide(self, situation: BalancerState) -> Rebalance:
        self.seen.append(situation)
        what, self.next = self.next, None
        return Rebalance(situation.owner.copy(), nothing(), nothing()) if what is None else what(situation)


def nothing() -> npt.NDArray[np.int64]:
    return np.empty((0, 3), np.int64)


def for_worker(worker: int, groups: Places) -> npt.NDArray[np.int64]:
    return np.array([(worker, layer, group) for layer, group in groups], np.int64).reshape(-1, 3)


class Clock:
    """Time that passes only when told."""

    def __init__(self) -> None:
        self.now = 5_000_000_000

    def monotonic_ns(self) -> int:
        return self.now

    def monotonic(self) -> float:
        self.now += 1_000_000
        return self.now / 1e9


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    module = SimpleNamespace(monotonic_ns=clock.monotonic_ns, monotonic=clock.monotonic)
    monkeypatch.setattr(front_module, "time", module)
    return clock


class Bench:
    """A front on a board of its own."""

    def __init__(self, predicted: bool = False) -> None:
        sizes = BoardSizes(len(NAMES), LAYERS, GROUPS, HIDDEN, 16)
        self.board = Board.create(np.zeros(sizes.total, np.uint8), sizes)
        self.home = np.tile(np.repeat(np.arange(2, dtype=np.uint8), GROUPS // 2), (LAYERS, 1))
        self.workers, self.policy = Workers(SLOTS), Script()
        self.present, self.gone = np.ones(3, np.int64), np.zeros(3, np.int64)
        self.said: list[str] = []
        supervisor: Any = self.workers
        self.ownership = Ownership(
            self.board,
            LAYOUT,
            self.home,
            NAMES,
            predicted,
            self.policy,
            supervisor,
            self.present,
            self.gone,
            self.said.append,
        )
        self.slots = dict(SLOTS)

    def token(self, fired: Places = ()) -> None:  # type: ignore[assignment]
        """A token at which one neuron of each group of `fired` fires."""
        self.boundary()
        self.board.computed[:] = 0
        for layer, group in fired:
            self.board.computed[layer, group] = 1
        self.ownership.observe()
        assert_tables_hold(self.ownership, self.slots)

    def boundary(self) -> None:
        self.ownership.boundary()
        assert_tables_hold(self.ownership, self.slots)

    def decide(
        self,
        *,
        drops: npt.NDArray[np.int64] | None = None,
        moves: npt.NDArray[np.int64] | None = None,
        owner: Callable[[npt.NDArray[np.uint8]], None] = lambda owner: None,
    ) -> BalancerState:
        """Have the policy decide so at the next boundary; what is dropped goes back to its home."""

        def decision(situation: BalancerState) -> Rebalance:
            owners = situation.owner.copy()
            dropped = nothing() if drops is None else drops
            for _, layer, group in dropped.tolist():
                owners[layer, group] = self.ownership.home[layer, group]
            owner(owners)
            return Rebalance(owners, dropped, nothing() if moves is None else moves)

        self.boundary()
        self.ownership.observe()
        self.policy.next = decision
        self.boundary()
        return self.policy.seen[-1]

    def fill(self, slots: int = 20) -> Places:
        """Give the GPU its first groups."""
        wanted = first_groups(GROUPS, LAYERS, slots)
        self.workers.at_once = True
        self.ownership.fill(GPU, wanted, lambda _done, _total: None)
        self.workers.at_once = False
        assert_tables_hold(self.ownership, self.slots)
        return [(int(layer), int(group)) for layer, group in np.argwhere(wanted)]

    def owned(self, worker: int) -> Places:
        return [(int(layer), int(group)) for layer, group in np.argwhere(self.board.owner == worker)]

    def resident(self, worker: int) -> Places:
        return [(int(layer), int(group)) for layer, group in np.argwhere(self.ownership.resident[worker])]

    def lose(self) -> None:
        self.workers.die()
        del self.slots["gpu0"]
        self.boundary()

    def rejoin(self, slots: int = 20) -> None:
        self.workers.coming.append(WorkerRejoined("gpu0", Ready(0, slots, {})))
        self.slots["gpu0"] = slots
        self.boundary()


@pytest.fixture
def bench() -> Bench:
    return Bench()


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


def test_a_gpu_that_dies_while_it_is_filled_is_done_without(bench: Bench) -> None:
    bench.ownership.fill(GPU, first_groups(GROUPS, LAYERS, 20), lambda _done, _total: bench.workers.die())
    assert bench.workers.restarted == ["gpu0"]
    np.testing.assert_array_equal(bench.board.owner, bench.home)
    bench.rejoin()
    assert sum(len(places) for _, _, places in bench.workers.asked[-2:]) == 20


def test_a_group_moves_when_its_copy_is_there(bench: Bench) -> None:
    bench.decide(moves=for_worker(GPU, [(1, 5), (0, 7)]))
    assert bench.workers.asked == [("gpu0", 1, [[0, 7, 0], [1, 5, 1]])]
    for _ in range(3):
        bench.token()
        np.testing.assert_array_equal(bench.board.owner, bench.home)
        assert bench.policy.seen[-1].coming[GPU].sum() == (2 if len(bench.policy.seen) > 1 else 0)
    bench.workers.arrive()
    np.testing.assert_array_equal(bench.board.owner, bench.home)
    bench.boundary()
    assert bench.owned(GPU) == [(0, 7), (1, 5)]
    assert bench.board.slot[GPU][0, 7] == 0
    assert bench.board.slot[GPU][1, 5] == 1
    assert bench.ownership.flow == Flow(2, 0, 0)


def test_the_decision_is_made_every_so_many_tokens(bench: Bench) -> None:
    bench.policy.every = 5
    for _ in range(16):
        bench.token()
    assert len(bench.policy.seen) == 3
    for _ in range(10):
        bench.boundary()  # of jobs of several tokens, which are not observed
    assert len(bench.policy.seen) == 3


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
    assert bench.decide(moves=for_worker(GPU, wish)).budget == 16
    (asked,) = bench.workers.asked
    assert sorted(asked[2]) == asked[2], "neighbours in the file are read at once"
    assert {(layer, group) for layer, group, _ in asked[2]} == set(wish[:16])
    assert bench.decide(moves=for_worker(GPU, wish[16:])).budget == 0
    assert len(bench.workers.asked) == 1
    bench.workers.arrive()
    # Four slots are left.
    assert bench.decide(moves=for_worker(GPU, wish[16:])).free.tolist() == [1, 1, 4]
    assert {(layer, group) for layer, group, _ in bench.workers.asked[-1][2]} == set(wish[16:20])


def test_the_budget_is_a_quarter_of_the_time(bench: Bench, clock: Clock) -> None:
    """Of the tokens' own time: what passes between two answers does not count."""
    first_guess = LAYOUT.group_bytes / 4.0
    bench.policy.every = 4
    for _ in range(8):
        bench.boundary()
        clock.now += 2_000_000
        bench.ownership.observe()
        clock.now += 10**12
    bench.boundary()
    assert bench.policy.seen[-1].budget == int(0.25 * 4 * 2_000_000 / first_guess)
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
    assert not bench.decide(moves=for_worker(GPU, [(0, 0)])).late
    assert bench.decide(moves=for_worker(GPU, [(0, 1)])).late is not True or True
    assert bench.decide().late
    bench.workers.arrive()
    assert not bench.decide().late


def test_what_the_policy_is_told_is_its_own(bench: Bench) -> None:
    bench.fill()
    situation = bench.decide()
    situation.owner[:] = 77
    situation.resident[:] = False
    situation.coming[:] = True
    assert_tables_hold(bench.ownership, SLOTS)
    assert situation.homes.tolist() == [True, True, False]
    assert situation.costs.shape == (3, 2)


def test_a_group_moves_between_cpu_workers(bench: Bench) -> None:
    old = int(bench.board.slot[CPU0][1, 2])
    bench.decide(moves=for_worker(CPU1, [(1, 2)]))
    assert bench.workers.asked == [("cpu1", 1, [[1, 2, 12]])]
    bench.token()
    assert bench.board.owner[1, 2] == CPU0
    bench.workers.arrive()
    bench.boundary()
    assert bench.board.owner[1, 2] == bench.ownership.home[1, 2] == CPU1
    assert bench.home[1, 2] == CPU0, "the engine's table is not the front's"
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


def test_a_lost_gpu_owns_nothing(bench: Bench) -> None:
    filled = bench.fill(10)
    bench.decide(moves=for_worker(GPU, [(1, 9), (1, 10)]))
    stale = bench.workers.asked.copy()
    bench.board.requested[GPU][:] = ALL
    bench.board.quit[GPU][0] = bench.gone[GPU] = 1
    bench.lose()
    np.testing.assert_array_equal(bench.board.owner, bench.home)
    assert bench.present.tolist() == [1, 1, 0]
    assert bench.said == ["worker gpu0 was killed; the run goes on without it"]
    assert not bench.board.requested[GPU].any()
    assert bench.board.quit[GPU][0] == bench.gone[GPU] == 0
    assert bench.workers.restarted == ["gpu0"]
    # What its predecessor copied is not there, and nobody asks one that is away.
    bench.workers.arrive()
    assert bench.decide(moves=for_worker(GPU, [(0, 11)])).free.tolist() == [1, 1, 0]
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
        bench.workers.coming.append(DeliverMoved("gpu0", Moved(batch, 1)))
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
    """It came back, copied, and died again while a long job ran."""
    filled = bench.fill()
    bench.lose()
    bench.workers.coming.append(WorkerRejoined("gpu0", Ready(0, 20, {})))
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
    assert bench.ownership.lose()
    np.testing.assert_array_equal(bench.board.owner, bench.home)
    assert bench.present[GPU] == 0


def test_a_job_that_ended_for_no_known_death(bench: Bench, clock: Clock) -> None:
    assert not bench.ownership.lose()
    bench.workers.error = WorkerError("worker cpu0 was killed")
    with pytest.raises(WorkerError, match="cpu0"):
        bench.ownership.lose()


def test_copies_that_were_of_no_use(bench: Bench) -> None:
    """Those that are dropped, or lie there still, before they have fired on the GPU."""
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
    ((read, active),) = bench.policy.observed
    loads = np.zeros((LAYERS, 3))
    for layer in range(LAYERS):
        for group in range(GROUPS):
            asked = int(mask[layer, group]).bit_count() if predicted else 32
            whole = int(fired[layer, group]).bit_count()
            expected = 4 * HIDDEN * (asked + 2 * whole)  # a gate row for each, up and down rows of those that fire
            assert read[layer, group] == expected
            assert active[layer, group] == whole / 32
            loads[layer, bench.board.owner[layer, group]] += expected
    np.testing.assert_allclose(bench.ownership.layer_loads(), loads)
    np.testing.assert_allclose(bench.ownership.share(), loads.sum(0) / loads.sum())


def report(jobs: int, busy: npt.ArrayLike, read: npt.ArrayLike) -> LoadReport:
    return LoadReport(jobs, np.asarray(busy).tolist(), [0] * LAYERS, np.asarray(read).tolist(), [0] * 4)


def test_costs_are_fitted_to_the_differences_of_reports(bench: Bench) -> None:
    front, expected = bench.ownership, WorkerCosts(20_000.0, 0.05)
    total = np.zeros((2, LAYERS), np.int64)
    jobs = 0
    for more, line in ((10, (3000, 0.1)), (7, (3000, 0.1)), (0, (0, 0)), (12, (9000, 0.3))):
        read = np.array([40_000, 90_000]) * more
        busy = (line[0] * more + line[1] * read).astype(np.int64)
        total += busy, read
        jobs += LAYERS * more
        front.take_in({"cpu0": report(jobs, *total)})
        expected.update(more, busy, read)
        assert front.costs[CPU0].job_ns == expected.job_ns
        assert front.costs[CPU0].byte_ns == expected.byte_ns
        front.take_in({"cpu0": report(jobs, *total)})  # the same again says nothing
    assert front.costs[CPU0].byte_ns == expected.byte_ns != 0.05
    assert (front.costs[GPU].job_ns, front.costs[GPU].byte_ns) == (20_000.0, 0.05)


def test_the_counters_of_a_restarted_worker_begin_at_0(bench: Bench) -> None:
    """Whether its successor has done less than it had, or more."""
    front, expected = bench.ownership, WorkerCosts(20_000.0, 0.05)
    for jobs in (100, 10, 500):
        busy, read = np.array([2000, 3000]) * jobs, np.array([10_000, 20_000]) * jobs
        front.take_in({"gpu0": report(LAYERS * jobs, busy, read), "cpu0": report(0, [0, 0], [0, 0])})
        expected.update(jobs, busy, read)
        assert front.costs[GPU].job_ns == expected.job_ns
        assert front.costs[GPU].byte_ns == expected.byte_ns
        bench.lose()
        bench.rejoin()


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
def test_verify(predicted: bool) -> None:
    bench = Bench(predicted)
    bench.fill(7)
    board = bench.board
    board.mask[:] = np.random.default_rng(4).integers(1, 1 << 32, (LAYERS, GROUPS), dtype=np.uint32)
    wanted = board.mask if predicted else np.full((LAYERS, GROUPS), ALL, np.uint32)
    for worker in range(3):
        board.requested[worker][:] = np.where(board.owner == worker, wanted, 0)
    bench.ownership.verify()
    for layer, group in ((0, 0), (1, 11)):
        owner = int(board.owner[layer, group])
        for worker in range(3):
            for bit in (int(wanted[layer, group]) & -int(wanted[layer, group]), int(wanted[layer, group])):
                # Not computed by its owner, or computed by another too.
                board.requested[worker][layer, group] ^= np.uint32(bit)
                with pytest.raises(WorkerError, match=f"^group {group} of layer {layer} was not computed exactly once"):
                    bench.ownership.verify()
                board.requested[worker][layer, group] ^= np.uint32(bit)
        if predicted:
            # Computed though it was not selected.
            board.requested[owner][layer, group] = ALL
            with pytest.raises(WorkerError, match="exactly once"):
                bench.ownership.verify()
            board.requested[owner][layer, group] = wanted[layer, group]
    bench.ownership.verify()
    # What one that is away has left there does not count, and what it would have computed is missing.
    bench.present[GPU] = 0
    with pytest.raises(WorkerError, match=r"^group 0 of layer 0 "):
        bench.ownership.verify()


def test_any_sequence_of_events_keeps_the_tables(clock: Clock) -> None:
    """A thousand random drops, moves, arrivals in any order, losses and returns."""
    rng = np.random.default_rng(9)
    for _ in range(6):
        bench = Bench()
        bench.fill(int(rng.integers(1, 21)))
        away = False

        def random_decision(situation: BalancerState) -> Rebalance:
            home = bench.ownership.home  # noqa: B023
            owner = situation.owner.copy()
            dropped = [tuple(place) for place in np.argwhere(situation.resident[GPU]) if rng.random() < 0.2]
            for layer, group in dropped:
                owner[layer, group] = home[layer, group]
            for layer, group in np.argwhere(situation.resident[GPU]):
                if (layer, group) not in dropped and rng.random() < 0.2:
                    owner[layer, group] = rng.choice([GPU, home[layer, group]])
            wishes = [
                (worker, layer, group)
                for worker in range(3)
                for layer, group in np.argwhere(~situation.resident[worker])
                # A group comes to one other home at a time.
                if not situation.coming[worker if worker == GPU else slice(0, 2), layer, group].any()
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
            bench.workers.coming += [DeliverMoved(worker, Moved(batch, 10)) for worker, batch, _ in done]
            bench.policy.next = random_decision
            bench.token()
        assert bench.ownership.flow.moves > 100
        assert bench.ownership.flow.flips > 10
