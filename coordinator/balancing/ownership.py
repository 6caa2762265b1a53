"""The warm front: who holds each group of neurons, who computes it, and the moves between the workers.

Three tables say it all, each [layers, groups]: *home*, the CPU worker that keeps the group's full copy; *resident*, for
each worker, which groups it holds; *owner* (on the board), the worker that computes the group now and holds it.

    a policy (`balancer.py`) looks at the activity of the groups and at what the workers report
      owner  changes hands at once between workers that both hold the group: a table is written, nothing is copied
      drop   a GPU's slot is free for another group; the CPU has the full copy
      move   Move -> the worker reads the group from the packed file into a free slot, beside its computing -> Moved ->
             at the next token boundary the group is resident there and owned by it; between CPU workers the old home's
             slot becomes free

The board's tables change only between two jobs, so no neuron is lost or computed twice; `verify` proves it for every
token from what the workers say they were asked for. A GPU worker that dies owns nothing any more from the next job on;
when it is back its slots are filled as before.
"""

import collections
import time
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from warmfront.coordinator.balancing.cost_model import WorkerCosts
from warmfront.coordinator.balancing.interface import BATCH, BalancerState, Policy, Rebalance, budget_of
from warmfront.coordinator.workers.events import DeliverMoved, WorkerLost, WorkerRejoined
from warmfront.coordinator.workers.supervisor import Supervisor
from warmfront.shared.errors import WorkerError
from warmfront.shared.model.bundle import GROUP, BundleLayout
from warmfront.shared.wire.board import Board
from warmfront.shared.wire.messages import LoadReport, Move

__all__ = ["Flow", "Ownership", "Transfer"]

Table = npt.NDArray[np.uint8]
Bools = npt.NDArray[np.bool_]
Places = npt.NDArray[np.int32]
# Copies run at about this speed until some were measured, in bytes per ns.
_COPY_SPEED = 4.0
# What a worker is taken to cost until it has reported: ns for a job, ns for a byte.
_JOB_NS, _BYTE_NS = 20_000.0, 0.05
# Batches that are remembered for the trace.
_TRANSFERS = 100_000
_REPORT_EVERY_NS = 50_000_000
_WAIT_S = 60.0


class Transfer(NamedTuple):
    """A batch of groups on their way to a worker; ns on the monotonic clock."""

    worker: int
    groups: int
    began: int
    ended: int


class Flow(NamedTuple):
    """What has moved so far: groups copied, owners changed without a copy, copies that were dropped unused."""

    moves: int
    flips: int
    unused: int


class _Batch(NamedTuple):
    worker: int
    places: Places
    began: int


class Ownership:
    """Owns the board's tables `owner` and `slot`. Used from the engine's thread; workers are numbered as on the board.

    `home`: uint8 [layers, groups]; `present`: int64 [workers], cleared while a worker takes no part; `say` gets a line
    when a worker is lost and when it is back.
    """

    def __init__(
        self,
        board: Board,
        layout: BundleLayout,
        home: Table,
        names: Sequence[str],
        predicted: bool,
        policy: Policy,
        supervisor: Supervisor,
        present: npt.NDArray[np.int64],
        gone: npt.NDArray[np.int64],
        say: Callable[[str], None],
    ) -> None:
        self._board, self._layout, self.names = board, layout, list(names)
        self._supervisor, self._policy, self._predicted = supervisor, policy, predicted
        self._present, self._gone, self._say = present, gone, say
        self.home = home.copy()
        self.homes: Bools = np.array([name.startswith("cpu") for name in names])
        self.resident: Bools = np.stack([home == worker for worker in range(len(names))])
        self._coming: Bools = np.zeros_like(self.resident)
        self._fresh: Bools = np.zeros_like(self.resident)  # copied, and not yet fired there
        self._lost: dict[int, Bools] = {}
        self._free = [list(range(self._held(w), supervisor.readies[name].slots)) for w, name in enumerate(names)]
        self._batches: dict[int, _Batch] = {}
        self._sent = self._since = 0
        self.costs = [WorkerCosts(_JOB_NS, _BYTE_NS) for _ in names]
        self._reports: Mapping[str, LoadReport] = {}
        self._requested_at = 0
        self.transfer_ns = layout.group_bytes / _COPY_SPEED
        self._token_ns, self._token_at, self.deciding_ns = 0.0, 0, 0.0
        self._read: npt.NDArray[np.float32] = np.ones(home.shape, np.float32)
        self.flow = Flow(0, 0, 0)
        self.transfers: collections.deque[Transfer] = collections.deque(maxlen=_TRANSFERS)
        board.owner[:] = home
        for worker in np.flatnonzero(self.homes).tolist():
            board.slot[worker][home == worker] = np.arange(self._held(worker))

    def _held(self, worker: int) -> int:
        return int(np.count_nonzero(self.resident[worker]))

    def fill(self, worker: int, wanted: Bools, progress: Callable[[int, int], None]) -> None:
        """Copy the groups `wanted` [layers, groups] to a worker and wait until it owns them."""
        self._begin(worker, np.argwhere(wanted))
        total = int(self._coming.sum()) * self._layout.group_bytes
        until = time.monotonic() + _WAIT_S
        while self._batches:
            left = int(self._coming.sum()) * self._layout.group_bytes
            progress(total - left, total)
            if self._hear(wait_s=0.05):
                until = time.monotonic() + _WAIT_S
            self._supervisor.check()
            if time.monotonic() > until:
                raise WorkerError(f"worker {self.names[worker]} copied no group for {_WAIT_S:.0f} s")
        self.flow = Flow(0, 0, 0)
        self._fresh[:] = False

    def owners(self) -> Table:
        """Who computes each group now."""
        return self._board.owner.copy()

    def hand_over(self, owner: Table) -> None:
        """Between two jobs: who computes each group from now on; uint8 [layers, groups] of workers that hold it."""
        self._board.owner[:] = owner

    def boundary(self) -> None:
        """Between two jobs: take in what has arrived, and when it is time let the policy decide."""
        if len(self.names) == 1:
            return
        self._hear()
        if self._since >= self._policy.every:
            self._since, began = 0, time.monotonic_ns()
            reports = self._supervisor.reported()
            if reports is not None:
                self.take_in(reports)
            self._follow(self._policy.decide(self._situation()))
            self.deciding_ns += 0.2 * (time.monotonic_ns() - began - self.deciding_ns)
        if self._since == self._policy.every - 1:  # they answer while the next token is made
            self._inquire()
        self._token_at = time.monotonic_ns()

    def observe(self) -> None:
        """After a token: which neurons were computed, where. A worker that is alone has nobody to share with."""
        if len(self.names) == 1:
            return
        board, layout = self._board, self._layout
        whole = np.bitwise_count(board.computed)
        asked = np.bitwise_count(board.mask) if self._predicted else np.uint8(GROUP)
        read = asked * np.float32(layout.gate_bytes) + whole * np.float32(layout.rest_bytes)
        self._policy.observe(read, whole * np.float32(1 / GROUP))
        self._read = read
        if self._fresh.any():
            for worker in np.flatnonzero(~self.homes):
                self._fresh[worker] &= (board.owner != worker) | (whole == 0)
        self._since += 1
        taken = time.monotonic_ns() - self._token_at
        self._token_ns += (taken - self._token_ns) * (0.1 if self._token_ns else 1.0)

    def fired(self) -> npt.NDArray[np.uint32]:
        """What the last token fired: [layers, groups], bit i = neuron i of the group."""
        return self._board.computed.copy()

    def verify(self) -> None:
        """Raise WorkerError unless every selected neuron of the last token was asked of exactly one worker."""
        board = self._board
        wanted = board.mask if self._predicted else np.full_like(board.computed, 0xFFFFFFFF)
        every = np.stack([taken for taken, there in zip(board.requested, self._present, strict=True) if there])
        once = np.bitwise_or.reduce(every) == wanted
        once &= np.bitwise_count(every).sum(0) == np.bitwise_count(wanted)
        if not once.all():
            layer, group = np.argwhere(~once)[0]
            raise WorkerError(
                f"group {group} of layer {layer} was not computed exactly once: this is a defect of warmfront"
            )

    def layer_loads(self) -> npt.NDArray[np.float64]:
        """[layers, workers]: bytes that the last token's active neurons took of each."""
        layers, workers = len(self._read), len(self.names)
        at = self._board.owner + workers * np.arange(layers)[:, None]
        loads = np.bincount(at.ravel(), self._read.ravel(), layers * workers)
        return np.asarray(loads, np.float64).reshape(layers, workers)

    def share(self) -> npt.NDArray[np.float64]:
        """[workers]: their parts of the bytes that the last token's active neurons took."""
        loads = self.layer_loads().sum(0)
        return np.asarray(loads / max(1.0, loads.sum()))

    @property
    def unused(self) -> int:
        """Copies that were dropped, or lie there still, without having fired."""
        return self.flow.unused + int(self._fresh.sum())

    def _situation(self) -> BalancerState:
        moving = sum(len(batch.places) for batch in self._batches.values())
        return BalancerState(
            owner=self._board.owner.copy(),
            resident=self.resident.copy(),
            coming=self._coming.copy(),
            free=np.array([len(free) for free in self._free]),
            homes=self.homes,
            costs=np.array([(each.job_ns, each.byte_ns) for each in self.costs]),
            transfer_ns=self.transfer_ns,
            budget=budget_of(self._token_ns * self._policy.every, self.transfer_ns, moving),
            late=bool(self._batches),
            decision_tokens=self.deciding_ns / max(1.0, self._token_ns),
        )

    def _follow(self, decision: Rebalance) -> None:
        owner = self._board.owner
        flips = int(np.count_nonzero(decision.owner != owner))
        owner[:] = decision.owner
        unused = 0
        for worker, layer, group in decision.drops.tolist():
            self.resident[worker, layer, group] = False
            unused += bool(self._fresh[worker, layer, group])
            self._fresh[worker, layer, group] = False
            self._free[worker].append(int(self._board.slot[worker][layer, group]))
        self.flow = Flow(self.flow.moves, self.flow.flips + flips, self.flow.unused + unused)
        moves = decision.moves[: self._situation().budget]
        for worker in np.unique(moves[:, 0]):
            self._begin(int(worker), moves[moves[:, 0] == worker, 1:])

    def _begin(self, worker: int, groups: npt.NDArray[np.int64]) -> None:
        """Have a worker copy groups [n, (layer, group)], as many as it has slots for."""
        groups = groups[: len(self._free[worker])]
        # Neighbours in the file are read, and in the slots written, at once.
        groups = groups[np.lexsort((groups[:, 1], groups[:, 0]))]
        slots = sorted(self._free[worker])[: len(groups)]
        self._free[worker] = sorted(self._free[worker])[len(groups) :]
        self._coming[worker, groups[:, 0], groups[:, 1]] = True
        places = np.column_stack((groups, slots)).astype(np.int32)
        for first in range(0, len(places), BATCH):
            some = places[first : first + BATCH]
            self._sent += 1
            self._batches[self._sent] = _Batch(worker, some, time.monotonic_ns())
            self._supervisor.move(self.names[worker], Move(self._sent, some.tobytes()))

    def _hear(self, wait_s: float = 0.0) -> bool:
        news = self._supervisor.news(wait_s)
        for event in news:
            match event:
                case DeliverMoved(_, moved):
                    if moved.batch in self._batches:
                        self._arrived(self._batches.pop(moved.batch), moved.ns)
                case WorkerLost(name, error):
                    self._say(f"{error}; the run goes on without it")
                    self._lose(self.names.index(name))
                case WorkerRejoined(name, ready):
                    self._say(f"worker {name} is back")
                    self._rejoin(self.names.index(name), ready.slots)
        return bool(news)

    def _arrived(self, batch: _Batch, ns: int) -> None:
        worker, places, board = batch.worker, batch.places, self._board
        layers, groups, slots = places.T
        self._coming[worker, layers, groups] = False
        self.resident[worker, layers, groups] = self._fresh[worker, layers, groups] = True
        if self.homes[worker]:
            for layer, group in places[:, :2].tolist():
                old = int(self.home[layer, group])
                self.resident[old, layer, group] = False
                self._free[old].append(int(board.slot[old][layer, group]))
                self.home[layer, group] = worker
            self._fresh[worker] = False
        board.slot[worker][layers, groups] = slots
        board.owner[layers, groups] = worker
        self.transfer_ns += 0.2 * (ns / len(places) - self.transfer_ns)
        self.flow = self.flow._replace(moves=self.flow.moves + len(places))
        self.transfers.append(Transfer(worker, len(places), batch.began, time.monotonic_ns()))

    def lose(self) -> bool:
        """After a job that a worker's death ended: go on without it. Returns whether there was one."""
        before = int(self._present.sum())
        until = time.monotonic() + 5.0
        while int(self._present.sum()) == before and time.monotonic() < until:
            self._hear(wait_s=0.05)
            self._supervisor.check()
        return int(self._present.sum()) < before

    def _lose(self, worker: int) -> None:
        board = self._board
        owned = board.owner == worker
        board.owner[owned] = self.home[owned]
        # One that is lost again before it has rejoined held nothing: what it is to get stays.
        held = self.resident[worker] | self._coming[worker]
        self._lost[worker] = self._lost.get(worker, np.zeros_like(held)) | held
        self.resident[worker] = self._coming[worker] = self._fresh[worker] = False
        self._batches = {number: batch for number, batch in self._batches.items() if batch.worker != worker}
        self._free[worker] = []
        self._present[worker] = 0
        board.requested[worker][:] = 0
        board.quit[worker][0] = self._gone[worker] = 0
        self._reports = {name: report for name, report in self._reports.items() if name != self.names[worker]}
        self._supervisor.restart(self.names[worker])

    def _rejoin(self, worker: int, slots: int) -> None:
        self._free[worker] = list(range(slots))
        self._present[worker] = 1
        self._begin(worker, np.argwhere(self._lost.pop(worker)))

    def _inquire(self) -> None:
        """Ask the workers what they have done."""
        now = time.monotonic_ns()
        if now - self._requested_at > _REPORT_EVERY_NS:
            self._requested_at = now
            self._supervisor.request_reports()

    def take_in(self, reports: Mapping[str, LoadReport]) -> None:
        """Fit the workers' costs to what they did since their last reports."""
        for name, report in reports.items():
            costs, last = self.costs[self.names.index(name)], self._reports.get(name)
            layers = len(report.busy_ns)
            busy, read = np.array(report.busy_ns), np.array(report.bytes)
            jobs = report.jobs
            if last is not None:
                busy, read, jobs = busy - last.busy_ns, read - last.bytes, jobs - last.jobs
            if jobs > 0:
                costs.update(jobs / layers, busy, read)
        self._reports = dict(reports)
