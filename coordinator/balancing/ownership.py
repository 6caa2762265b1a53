"""The ownership table: who holds each group of neurons, who computes it, and the moves between the workers.

Three arrays over [layers, groups] say it all: *home*, the CPU worker that keeps the group's full copy; *resident*, for
each worker, which groups it holds; *owner* (on the board), the worker that computes the group now and holds it.

    a policy (`interface.py`) looks at the activity of the groups and at what the workers report
      owner  changes at once between workers that both hold the group: a table is written, nothing is copied
      drop   a GPU's slot is free for another group; the CPU has the full copy
      move   Move -> the worker reads the group from the packed file into a free slot, beside its computing -> Moved ->
             before the next token the group is resident there and owned by it; between CPU workers the old home's
             slot becomes free

The board's tables change only between two jobs, so no neuron is lost or computed twice; `verify` checks that for every
token by what the workers say they were asked for. A GPU worker that dies owns nothing from the next job on; when it is
back its slots are filled as before. Of a CPU worker's groups there is no other copy: if it dies, its successor, which
loads them, is waited for.
"""

import collections
import time
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from warmfront.coordinator.balancing.cost_model import WorkerCosts
from warmfront.coordinator.balancing.fitting import fit_costs
from warmfront.coordinator.balancing.flow import Flow, Transfer
from warmfront.coordinator.balancing.interface import (
    BATCH,
    BalancerState,
    Bools,
    Ints,
    Policy,
    Rebalance,
    Used,
    copy_budget,
)
from warmfront.coordinator.balancing.once import check_once
from warmfront.coordinator.workers.events import DeliverMoved, WorkerLost, WorkerRejoined
from warmfront.coordinator.workers.supervisor import Supervisor
from warmfront.shared.errors import WorkerError
from warmfront.shared.model.bundle import BundleLayout
from warmfront.shared.wire.board import Board
from warmfront.shared.wire.messages import LoadReport, Move

__all__ = ["Ownership"]

Table = npt.NDArray[np.uint8]
Places = npt.NDArray[np.int32]
# Guesses until there are measurements: bytes per ns of a copy; ns for a job and for a byte of a worker.
_COPY_SPEED = 4.0
_JOB_NS, _BYTE_NS = 20_000.0, 0.05
# Weight of a new measurement of copies and decisions, in their moving averages.
_NEW = 0.2
# Batches that are remembered for the trace.
_MAX_TRANSFERS = 100_000
# A report costs each worker a message: often enough to see a load shift within some tokens.
_REPORT_INTERVAL_NS = 50_000_000
# After this long without a copied batch, or without word of a death, something is wrong.
_FILL_LIMIT_S = 60.0
_LOSS_LIMIT_S = 5.0


class _Batch(NamedTuple):
    """A batch that is being copied."""

    worker: int
    places: Places  # [n, 3]: layer, group, slot
    began: int  # ns on the monotonic clock


class Ownership:
    """Owns the board's tables `owner` and `slot`. For the engine's thread; workers are numbered as on the board."""

    def __init__(
        self,
        *,
        board: Board,
        layout: BundleLayout,
        bounds: Ints,
        home: Table,
        names: Sequence[str],
        predicted: bool,
        policy: Policy,
        supervisor: Supervisor,
        present: npt.NDArray[np.int64],
        dead: npt.NDArray[np.int64],
        say: Callable[[str], None],
    ) -> None:
        """`bounds`: as in `Used`; `home`: uint8 [layers, groups]; `predicted`: which neurons were asked for is in the
        board's mask.

        `present`, `dead`: int64 [workers] shared with the threads; the first is cleared here while a worker takes no
        part, the second is set by whoever sees it die and cleared here. `say` gets a line at a loss and at a return.
        """
        self._board, self._layout, self.names = board, layout, list(names)
        self._supervisor, self.policy, self._predicted = supervisor, policy, predicted
        self._present, self._dead, self._say = present, dead, say
        self.home = home.copy()
        self.is_home: Bools = np.array([name.startswith("cpu") for name in names])
        self.resident: Bools = np.stack([home == worker for worker in range(len(names))])
        self._in_flight: Bools = np.zeros_like(self.resident)
        # Copied to a cache, and not fired there yet, as far as tokens are observed: [n, (worker, layer, group)].
        self._unfired: Ints = np.empty((0, 3), np.int64)
        self._to_restore: dict[int, Bools] = {}  # of each lost worker: what it held or was about to hold
        self.assigned: dict[str, Table] = {}  # of each lost CPU worker: the homes that its successor is told
        held = self.resident.sum((1, 2)).tolist()
        self._free = [list(range(held[w], supervisor.readies[name].slots)) for w, name in enumerate(names)]
        self._batches: dict[int, _Batch] = {}
        self._last_batch = self._tokens_since = self._tokens_of_job = 0
        self.costs = [WorkerCosts(_JOB_NS, _BYTE_NS) for _ in names]
        self._reports: Mapping[str, LoadReport] = {}
        self._requested_at = 0
        self.transfer_ns = layout.group_bytes / _COPY_SPEED
        self._token_ns, self._token_at, self.deciding_ns, self.observing_ns = 0.0, 0, 0.0, 0.0
        # Without a selector that predicts, every neuron is asked for; without experts there is one branch.
        self._asked: npt.NDArray[np.uint32] = np.full(home.shape, 0xFFFFFFFF, np.uint32)
        self._bounds, self._uses = bounds, np.ones((len(home), 1), np.uint8)
        self._branch = np.repeat(np.arange(len(bounds) - 1), np.diff(bounds))  # [groups]
        self._last_token = self._unobserved = self.lost = 0  # `lost`: workers, in all
        self.flow = Flow(0, 0, 0)
        self.transfers: collections.deque[Transfer] = collections.deque(maxlen=_MAX_TRANSFERS)
        if len(names) > 1:
            WorkerCosts(_JOB_NS, _BYTE_NS).update(1, [1.0], [1.0])  # compiled now, not between two tokens
        board.owner[:] = home
        for worker in np.flatnonzero(self.is_home).tolist():
            self._lay_out(worker)

    def _lay_out(self, worker: int) -> None:
        """As the CPU workers lay their groups out: by layer and group."""
        self._board.slot[worker][self.home == worker] = np.arange(np.count_nonzero(self.home == worker))

    def fill(self, worker: int, wanted: Bools, progress: Callable[[int, int], None]) -> None:
        """Copy the groups `wanted` [layers, groups] to a worker and wait until it owns them."""
        self._start_copies(worker, np.argwhere(wanted))
        total = int(self._in_flight.sum()) * self._layout.group_bytes
        until = time.monotonic() + _FILL_LIMIT_S
        while self._batches:
            left = int(self._in_flight.sum()) * self._layout.group_bytes
            progress(total - left, total)
            if self._take_news(wait_s=0.05):
                until = time.monotonic() + _FILL_LIMIT_S
            self._supervisor.check()
            if time.monotonic() > until:
                raise WorkerError(f"worker {self.names[worker]} copied no group for {_FILL_LIMIT_S:.0f} s")
        self.flow = Flow(0, 0, 0)
        self._unfired = self._unfired[:0]

    def owners(self) -> Table:
        """Who computes each group now."""
        return self._board.owner.copy()

    def holds(self, owner: Table) -> Bools:
        """Of which groups the worker in `owner` [layers, groups] has a complete copy."""
        return np.asarray(np.take_along_axis(self.resident, owner[None].astype(np.intp), 0)[0])

    def hand_over(self, owner: Table) -> None:
        """Between two jobs: who computes each group from now on; uint8 [layers, groups] of workers that hold it."""
        self._board.owner[:] = owner

    def boundary(self) -> None:
        """Between two jobs: take in what has arrived, and when it is time let the policy decide."""
        if len(self.names) == 1:
            return
        self._take_news()
        if self._tokens_since >= self.policy.interval:
            self._tokens_since, began = 0, time.monotonic_ns()
            reports = self._supervisor.reported()
            if reports is not None:
                self.update_costs(reports)
            self._apply(self.policy.decide(self._state()))
            self.deciding_ns += _NEW * (time.monotonic_ns() - began - self.deciding_ns)
        # Asked for at the decision the reports would be one interval old: so they answer while a token is made.
        if self._tokens_since + max(1, self._tokens_of_job) >= self.policy.interval:
            self._request_reports()
        self._token_at, self._tokens_of_job = time.monotonic_ns(), 0

    def observe(self, token: int = 0) -> None:
        """After a token, that many of the last batch: learn which neurons were computed for it, and where.

        A single worker has nobody to share with.
        """
        if len(self.names) == 1:
            return
        self._last_token = token
        self._tokens_since += 1
        self._tokens_of_job += 1
        self._unobserved += 1
        # The first token of a batch takes the time of all, the others next to none: it is their mean that counts.
        now = time.monotonic_ns()
        taken, self._token_at = now - self._token_at, now
        self._token_ns += (taken - self._token_ns) * (0.1 if self._token_ns else 1.0)
        if self._unobserved >= self.policy.stride:
            used = self._used(token)
            self.policy.observe(used)
            self._unobserved = 0
            if len(self._unfired):
                self._unfired = self._unfired[~self._fired_there(used)]
            self.observing_ns += _NEW * (time.monotonic_ns() - now - self.observing_ns)

    def _fired_there(self, used: Used) -> Bools:
        """Which of the `_unfired` copies a token has fired where they are."""
        worker, layer, group = self._unfired.T
        # First the table that is small: most are of branches that the token does not use.
        fired: Bools = used.uses[layer, self._branch[group]] != 0
        worker, layer, group = worker[fired], layer[fired], group[fired]
        here = self._board.owner[layer, group] == worker
        fired[fired] = here & ((used.asked[layer, group] & used.computed[layer, group]) != 0)
        return fired

    def _used(self, token: int) -> Used:
        """What a token of the last batch used."""
        board, layout = self._board, self._layout
        asked = board.mask[token] if self._predicted else self._asked
        uses = board.uses[token] if len(self._bounds) > 2 else self._uses
        return Used(asked, board.computed[token], uses, self._bounds, layout.gate_bytes, layout.rest_bytes)

    def asked(self) -> npt.NDArray[np.uint32]:
        """What was asked for, for the last single token: [layers, groups], bit i = neuron i of the group."""
        return self._used(0).asked.copy()

    def fired(self) -> npt.NDArray[np.uint32]:
        """What the last single token fired: [layers, groups], bit i = neuron i of the group."""
        used = self._used(0)
        return np.asarray(used.computed & used.asked)

    def verify(self, tokens: int = 1) -> None:
        """Raise WorkerError unless every selected neuron of the last batch was asked of exactly one worker."""
        for token in range(tokens):
            requested = [self._board.requested[worker][token] for worker in np.flatnonzero(self._present)]
            check_once(self._used(token).asked, np.stack(requested))

    def layer_loads(self) -> npt.NDArray[np.float64]:
        """[layers, workers]: bytes that the last token read in each."""
        read = self._used(self._last_token).bytes_read()
        layers, workers = len(read), len(self.names)
        at = self._board.owner + workers * np.arange(layers)[:, None]
        return np.bincount(at.ravel(), read.ravel(), layers * workers).astype(np.float64).reshape(layers, workers)

    def share(self) -> npt.NDArray[np.float64]:
        """[workers]: each one's share of the bytes that the last token read."""
        loads = self.layer_loads().sum(0)
        return np.asarray(loads / max(1.0, loads.sum()))

    @property
    def unused(self) -> int:
        """Copies that were dropped, or are still there, without having fired."""
        return self.flow.unused + len(self._unfired)

    def _state(self) -> BalancerState:
        return BalancerState(
            owner=self._board.owner,
            home=self.home,
            resident=self.resident,
            in_flight=self._in_flight,
            free_slots=np.array([len(free) for free in self._free]),
            is_home=self.is_home.copy(),
            costs=np.array([(each.job_ns, each.byte_ns) for each in self.costs]),
            transfer_ns=self.transfer_ns,
            copy_budget=self._copy_budget(),
            copies_late=bool(self._batches),
            decision_tokens=self.deciding_ns / max(1.0, self._token_ns),
            observation_tokens=self.observing_ns / max(1.0, self._token_ns),
        )

    def _copy_budget(self) -> int:
        in_flight = sum(len(batch.places) for batch in self._batches.values())
        return copy_budget(self._token_ns * self.policy.interval, self.transfer_ns, in_flight)

    def _apply(self, decision: Rebalance) -> None:
        """Carry out a decision: change owners, free the slots of what is dropped, begin the copies."""
        owner = self._board.owner
        flips = int(np.count_nonzero(decision.owner != owner))
        owner[:] = decision.owner
        unused = len(self._unfired)
        for worker, layer, group in decision.drops.tolist():
            self.resident[worker, layer, group] = False
            self._free[worker].append(int(self._board.slot[worker][layer, group]))
        self._unfired = self._unfired[self.resident[tuple(self._unfired.T)]]
        unused -= len(self._unfired)
        self.flow = Flow(self.flow.moves, self.flow.flips + flips, self.flow.unused + unused)
        moves = decision.moves[: self._copy_budget()]
        for worker in np.unique(moves[:, 0]):
            self._start_copies(int(worker), moves[moves[:, 0] == worker, 1:])

    def _start_copies(self, worker: int, groups: npt.NDArray[np.int64]) -> None:
        """Have a worker copy groups [n, (layer, group)], as many as it has slots for."""
        groups = groups[: len(self._free[worker])]
        # In order of the file, into the lowest slots: runs of neighbours are read and written at once.
        groups = groups[np.lexsort((groups[:, 1], groups[:, 0]))]
        slots = sorted(self._free[worker])[: len(groups)]
        self._free[worker] = sorted(self._free[worker])[len(groups) :]
        self._in_flight[worker, groups[:, 0], groups[:, 1]] = True
        places = np.column_stack((groups, slots)).astype(np.int32)
        for first in range(0, len(places), BATCH):
            batch = _Batch(worker, places[first : first + BATCH], time.monotonic_ns())
            self._last_batch += 1
            self._batches[self._last_batch] = batch
            self._supervisor.move(self.names[worker], Move(self._last_batch, batch.places.tobytes()))

    def _take_news(self, wait_s: float = 0.0) -> bool:
        """Follow what the workers have done or suffered; waits so long for the first news. Whether there were any."""
        news = self._supervisor.news(wait_s)
        for event in news:
            match event:
                case DeliverMoved(_, moved):
                    if moved.batch in self._batches:  # else of a worker that has died since
                        self._arrived(self._batches.pop(moved.batch), moved.ns)
                case WorkerLost(name, error):
                    how = "another takes its place" if name.startswith("cpu") else "the run goes on without it"
                    self._say(f"{error}; {how}")
                    self._lost(self.names.index(name))
                case WorkerRejoined(name, ready):
                    self._say(f"worker {name} is back")
                    self._rejoined(self.names.index(name), ready.slots)
        return bool(news)

    def _arrived(self, batch: _Batch, ns: int) -> None:
        """The groups of a batch, which took `ns` of work, are where they were to go."""
        worker, places, board = batch.worker, batch.places, self._board
        layers, groups, slots = places.T
        self._in_flight[worker, layers, groups] = False
        self.resident[worker, layers, groups] = True
        if self.is_home[worker]:
            for layer, group in places[:, :2].tolist():
                old = int(self.home[layer, group])
                self.resident[old, layer, group] = False
                self._free[old].append(int(board.slot[old][layer, group]))
                self.home[layer, group] = worker
        else:
            fresh = np.column_stack((np.full(len(places), worker), layers, groups))
            self._unfired = np.concatenate((self._unfired, fresh))
        board.slot[worker][layers, groups] = slots
        board.owner[layers, groups] = worker
        self.transfer_ns += _NEW * (ns / len(places) - self.transfer_ns)
        self.flow = self.flow._replace(moves=self.flow.moves + len(places))
        self.transfers.append(Transfer(worker, len(places), batch.began, time.monotonic_ns()))

    def await_loss(self) -> bool:
        """After a job that a worker's death ended: wait for word of it. Returns whether the run goes on without it."""
        before = int(self._present.sum())
        until = time.monotonic() + _LOSS_LIMIT_S
        while int(self._present.sum()) == before and time.monotonic() < until:
            self._take_news(wait_s=0.05)
            self._supervisor.check()
        return int(self._present.sum()) < before

    def await_homes(self) -> None:
        """Wait for the successors of CPU workers that were lost."""
        while not self._present[self.is_home].all():
            self._take_news(wait_s=0.05)
            self._supervisor.check()

    def _lost(self, worker: int) -> None:
        """A worker is dead: its groups go home, another process is started."""
        board = self._board
        self.lost += 1
        owned = board.owner == worker
        board.owner[owned] = self.home[owned]
        # A worker lost again before it has rejoined holds nothing: what it had before is still what to restore.
        held = self.resident[worker] | self._in_flight[worker]
        mine = self.home == worker
        if self.is_home[worker]:
            self.assigned[self.names[worker]] = self.home.copy()
            self._lay_out(worker)
        else:
            self._to_restore[worker] = self._to_restore.get(worker, np.zeros_like(held)) | held
        self.resident[worker], self._in_flight[worker] = mine, False
        self._unfired = self._unfired[self._unfired[:, 0] != worker]
        self._batches = {number: batch for number, batch in self._batches.items() if batch.worker != worker}
        self._free[worker] = []
        self._present[worker] = 0
        board.requested[worker][:] = 0
        board.quit[worker][0] = self._dead[worker] = 0
        self._reports = {name: report for name, report in self._reports.items() if name != self.names[worker]}
        self._supervisor.restart(self.names[worker])

    def _rejoined(self, worker: int, slots: int) -> None:
        """A lost worker's successor serves the board; with empty slots it gets what its predecessor had."""
        self._present[worker] = 1
        if self.is_home[worker]:
            loaded = int(np.count_nonzero(self.assigned[self.names[worker]] == worker))
            self._free[worker] += range(loaded, slots)
            return
        self._free[worker] = list(range(slots))
        self._start_copies(worker, np.argwhere(self._to_restore.pop(worker)))

    def _request_reports(self) -> None:
        """Ask the workers what they have done, unless they were asked a moment ago."""
        now = time.monotonic_ns()
        if now - self._requested_at > _REPORT_INTERVAL_NS:
            self._requested_at = now
            self._supervisor.request_reports()

    def update_costs(self, reports: Mapping[str, LoadReport]) -> None:
        """Fit the workers' costs to what they did since their last reports."""
        fit_costs(dict(zip(self.names, self.costs, strict=True)), self._reports, reports)
        self._reports = dict(reports)
