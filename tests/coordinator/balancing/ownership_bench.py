"""An ownership table without processes: what stands in for the workers, the policy and the clock."""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from tests.tables import assert_tables_hold
from warmfront.coordinator.balancing.interface import BalancerState, Rebalance, Used
from warmfront.coordinator.balancing.ownership import Ownership
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
    """Stands in for the supervisor: records what it is asked for, and reports what the test tells it to."""

    def __init__(self, slots: Mapping[str, int]) -> None:
        self.readies = {name: Ready(count, {}) for name, count in slots.items()}
        self.asked: list[tuple[str, int, list[list[int]]]] = []  # worker, batch, places
        self.pending: list[News] = []
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
        self.pending += [DeliverMoved(worker, Moved(batch, ns)) for worker, batch, _ in self.asked]
        self.asked.clear()

    def die(self, worker: str = "gpu0") -> None:
        self.pending.append(WorkerLost(worker, WorkerError(f"worker {worker} was killed")))

    def news(self, wait_s: float = 0.0) -> list[News]:
        told, self.pending = self.pending, []
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
    """A policy that makes the decision it was given, and otherwise changes nothing."""

    name = "script"
    interval = stride = 1

    def __init__(self) -> None:
        self.next: Callable[[BalancerState], Rebalance] | None = None
        self.seen: list[BalancerState] = []
        self.observed: list[Used] = []

    def observe(self, used: Used) -> None:
        self.observed.append(used._replace(asked=used.asked.copy(), computed=used.computed.copy()))

    def decide(self, state: BalancerState) -> Rebalance:
        told = {name: getattr(state, name).copy() for name in ("owner", "home", "resident", "in_flight")}
        self.seen.append(state._replace(**told))
        what, self.next = self.next, None
        return Rebalance(state.owner.copy(), nothing(), nothing()) if what is None else what(state)


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


class Bench:
    """An ownership table on a board of its own."""

    def __init__(self, predicted: bool = False) -> None:
        sizes = BoardSizes(len(NAMES), LAYERS, GROUPS, HIDDEN, 16)
        self.board = Board.create(np.zeros(sizes.total, np.uint8), sizes)
        self.home = np.tile(np.repeat(np.arange(2, dtype=np.uint8), GROUPS // 2), (LAYERS, 1))
        self.workers, self.policy = Workers(SLOTS), Script()
        self.present, self.dead = np.ones(3, np.int64), np.zeros(3, np.int64)
        self.said: list[str] = []
        supervisor: Any = self.workers
        self.ownership = Ownership(
            board=self.board,
            layout=LAYOUT,
            bounds=np.array([0, GROUPS]),
            home=self.home,
            names=NAMES,
            predicted=predicted,
            policy=self.policy,
            supervisor=supervisor,
            present=self.present,
            dead=self.dead,
            say=self.said.append,
        )
        self.slots = dict(SLOTS)

    def token(self, fired: Places = ()) -> None:  # type: ignore[assignment]
        """A token at which one neuron of each group of `fired` fires."""
        self.boundary()
        self.board.computed[:] = 0
        for layer, group in fired:
            self.board.computed[0, layer, group] = 1
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
        """Have the policy make this decision at the next boundary; what is dropped goes back to its home."""

        def decision(state: BalancerState) -> Rebalance:
            owners = state.owner.copy()
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
        self.workers.pending.append(WorkerRejoined("gpu0", Ready(slots, {})))
        self.slots["gpu0"] = slots
        self.boundary()


def report(jobs: int, busy: npt.ArrayLike, read: npt.ArrayLike) -> LoadReport:
    return LoadReport(jobs, np.asarray(busy).tolist(), [0] * LAYERS, np.asarray(read).tolist(), [0] * 4)
