"""The life of the workers, as a state machine without I/O: events and the time in, instructions out.

    STARTING --every Hello--> ASSIGNING --Assigned--> LOADING --every Ready--> READY --StopRequested--> STOPPING
        any of them --a worker exits, fails, is silent or talks nonsense--> Abort, STOPPING
    READY --the same of an optional worker--> Kill --it has exited--> WorkerLost --RestartRequested--> Start --Hello,
        Assigned, Ready--> WorkerRejoined; after RESTARTS starts in a row without a Ready it stays away, or if it is
        required its error is that of all: Abort, STOPPING
    STOPPING --every worker has exited--> STOPPED, or FAILED if there was an error

Each worker may be silent only for a limited time: until its Hello, between two messages, between two steps of loading.
While it loads, heartbeats do not count: a worker that hangs in a read still sends them. What counts is what it has
loaded, or that it works: on a slow or busy machine it may compile kernels for minutes. The shutdown ladder is
Shutdown, 1 s, SIGTERM, 0.5 s, SIGKILL; it begins with SIGTERM for a worker that is not ready, which hears no message.

The driver (`supervisor.py`) calls `handle(Tick(), now)` at least every half second and hands over the messages of a
poll before the exits: a worker's last words say more than its exit code. A longer step than `MAX_STEP_S` counts as that
long: a coordinator that was itself stopped (Ctrl-Z stops the whole group) must not blame its workers for the silence.
"""

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum, auto
from signal import SIGKILL
from typing import assert_never

from warmfront.coordinator.workers.events import (
    Abort,
    AnnounceReady,
    Assigned,
    DeliverMoved,
    DeliverReport,
    Event,
    Exited,
    Finished,
    Instruction,
    Kill,
    MakeAssignments,
    Received,
    ReportProgress,
    RestartRequested,
    SendMessage,
    Start,
    StopRequested,
    Terminate,
    Tick,
    WorkerLost,
    WorkerRejoined,
)
from warmfront.shared.errors import ProtocolError, WarmfrontError, WorkerError
from warmfront.shared.wire.messages import (
    PROTOCOL,
    Assignment,
    Failure,
    Heartbeat,
    Hello,
    LoadReport,
    Message,
    Moved,
    Progress,
    Ready,
    Shutdown,
)

MAX_STEP_S = 1.0
START_LIMIT_S = 30.0
LOAD_LIMIT_S = 120.0
# Processor time that is a sign of life; reporting progress takes some ms a second.
WORK_NS = 2_000_000_000
SILENCE_LIMIT_S = 20.0
TERMINATE_AFTER_S = 1.0
KILL_AFTER_S = 1.5
# Starts of a lost worker in a row that may fail: what kills it each time, such as a full GPU, has not gone away.
RESTARTS = 3


class Phase(Enum):
    """Where all workers together are; the value says in error messages what they were doing."""

    STARTING = "while starting"
    ASSIGNING = "while waiting for its assignment"
    LOADING = "while loading the model"
    READY = "while generating"
    STOPPING = "while stopping"
    STOPPED = "after it was stopped"
    FAILED = "after a failure"


class _Stage(Enum):
    LOST = auto()
    STARTING = auto()
    WAITING = auto()
    LOADING = auto()
    READY = auto()


# For how many seconds a worker may give no sign of life, and what to say then.
_LIMITS = {
    _Stage.LOST: (math.inf, ""),
    _Stage.STARTING: (START_LIMIT_S, f"did not start within {START_LIMIT_S:.0f} s"),
    _Stage.WAITING: (SILENCE_LIMIT_S, "stopped answering"),
    _Stage.LOADING: (LOAD_LIMIT_S, f"made no progress for {LOAD_LIMIT_S:.0f} s while loading the model"),
    _Stage.READY: (SILENCE_LIMIT_S, "stopped answering"),
}


@dataclass(slots=True)
class _Worker:
    stage: _Stage = _Stage.STARTING
    sign_at: float = 0.0  # of the last sign of life, on the lifecycle's clock
    hello: Hello | None = None
    done: int = -1  # bytes loaded; -1: none reported, so that a report of 0 is progress
    total: int = 0
    worked: int = 0  # ns of processor time at the last sign of life
    ready: Ready | None = None
    starts: int = 0  # in a row, without a Ready
    restart: bool = False  # requested
    error: WarmfrontError | None = None  # why it is lost


class Lifecycle:
    """The state machine for `workers` (names), whose processes were started at `now` (seconds, any origin).

    `optional`: those that may be lost once all are ready; `required`: those of them that must come back.
    """

    def __init__(
        self, workers: Sequence[str], now: float, optional: Collection[str] = (), required: Collection[str] = ()
    ) -> None:
        self.phase = Phase.STARTING
        self.error: WarmfrontError | None = None
        self._workers = {name: _Worker() for name in workers}
        self._alive = list(workers)
        self._optional, self._required = frozenset(optional), frozenset(required)
        self._now = now
        self._clock = 0.0  # seconds since the start, without those that the coordinator was stopped
        self._stopping_since = math.inf
        self._ladder: list[tuple[float, type[Terminate | Kill]]] = [
            (TERMINATE_AFTER_S, Terminate),
            (KILL_AFTER_S, Kill),
        ]

    def handle(self, event: Event, now: float) -> list[Instruction]:
        """Take one event at time `now`; the instructions are to be carried out in order."""
        self._clock += min(max(now - self._now, 0.0), MAX_STEP_S)
        self._now = now
        if isinstance(event, Exited):
            return self._exited(event.worker, event.returncode)
        if isinstance(event, Tick):
            return self._ticked()
        if self._stopping:
            return []
        if isinstance(event, StopRequested):
            return self._stop()
        if isinstance(event, RestartRequested):
            self._workers[event.worker].restart = True
            return self._restart(event.worker)
        if isinstance(event, Assigned):
            return self._assigned(event.assignments)
        if isinstance(event, Received):
            return self._received(event.worker, event.message)
        assert_never(event)

    def serving(self) -> list[str]:
        """The workers that are ready."""
        return [name for name, worker in self._workers.items() if worker.stage is _Stage.READY]

    @property
    def _stopping(self) -> bool:
        return self._stopping_since < math.inf

    def _received(self, name: str, message: Message) -> list[Instruction]:
        worker = self._workers.get(name)
        if worker is None:
            return self._fail(ProtocolError(f"a process calls itself worker {name}, which was not started"))
        if worker.stage is _Stage.LOST:
            return []
        if isinstance(message, Failure):
            return self._worker_failed(name, message.error(name))
        if worker.stage is not _Stage.LOADING:
            worker.sign_at = self._clock
        match message, worker.stage:
            case Hello(protocol=protocol), _ if protocol != PROTOCOL:
                return self._worker_failed(
                    name,
                    ProtocolError(f"worker {name} speaks protocol {protocol}, not {PROTOCOL}: reinstall warmfront"),
                )
            case Hello(), _Stage.STARTING:
                return self._welcome(name, worker, message)
            case Progress(), _Stage.LOADING:
                return self._progressed(worker, message)
            case Ready(), _Stage.LOADING:
                return self._loaded(name, worker, message)
            case Moved(), _Stage.READY:
                return [DeliverMoved(name, message)]
            case LoadReport(), _Stage.READY:
                return [DeliverReport(name, message)]
            case Heartbeat(), _:
                return []
        what = type(message).__name__
        return self._worker_failed(
            name, ProtocolError(f"worker {name} sent {what} {self.phase.value}: not expected there")
        )

    def _welcome(self, name: str, worker: _Worker, hello: Hello) -> list[Instruction]:
        worker.hello, worker.stage = hello, _Stage.WAITING
        if self.phase is Phase.READY:
            return [MakeAssignments({name: hello})]
        hellos = {name: each.hello for name, each in self._workers.items() if each.hello}
        if len(hellos) < len(self._workers):
            return []
        self.phase = Phase.ASSIGNING
        return [MakeAssignments(hellos)]

    def _assigned(self, assignments: Mapping[str, Assignment]) -> list[Instruction]:
        if self.phase is Phase.ASSIGNING:
            self.phase = Phase.LOADING
        for name in assignments:
            self._workers[name].stage, self._workers[name].sign_at = _Stage.LOADING, self._clock
        return [SendMessage(name, assignment) for name, assignment in assignments.items()]

    def _progressed(self, worker: _Worker, now: Progress) -> list[Instruction]:
        if now.done > worker.done or now.worked >= worker.worked + WORK_NS:
            worker.sign_at, worker.worked = self._clock, now.worked
        worker.done, worker.total = now.done, now.total
        workers = self._workers.values()
        return [ReportProgress(sum(max(each.done, 0) for each in workers), sum(each.total for each in workers))]

    def _loaded(self, name: str, worker: _Worker, ready: Ready) -> list[Instruction]:
        worker.stage, worker.sign_at, worker.ready, worker.starts = _Stage.READY, self._clock, ready, 0
        if self.phase is Phase.READY:
            return [WorkerRejoined(name, ready)]
        if any(each.stage is not _Stage.READY for each in self._workers.values()):
            return []
        self.phase = Phase.READY
        return [AnnounceReady({name: each.ready for name, each in self._workers.items() if each.ready})]

    def _exited(self, name: str, returncode: int) -> list[Instruction]:
        self._alive.remove(name)
        if self._stopping:
            return self._finish_if_empty()
        if error := self._workers[name].error:
            return [WorkerLost(name, error), *self._restart(name)]
        how = f"was killed by signal {-returncode}" if returncode < 0 else f"exited with code {returncode}"
        hint = "the machine may be out of memory (see dmesg)" if returncode == -SIGKILL else "see its output above"
        return self._worker_failed(name, WorkerError(f"worker {name} {how} {self.phase.value}: {hint}"))

    def _ticked(self) -> list[Instruction]:
        if self._stopping:
            return self._escalate()
        for name, worker in self._workers.items():
            limit, complaint = _LIMITS[worker.stage]
            if self._clock - worker.sign_at >= limit:
                return self._worker_failed(name, WorkerError(f"worker {name} {complaint}"))
        return []

    def _worker_failed(self, name: str, error: WarmfrontError) -> list[Instruction]:
        """A worker has failed: the end of all, or of it alone if it is optional.

        It is not lost before its process can write nothing any more: a late answer on the board would be taken for one
        of its successor, or for that of a job that has been run again.
        """
        if self.phase is not Phase.READY or name not in self._optional:
            return self._fail(error)
        worker = self._workers[name]
        worker.stage, worker.hello, worker.restart, worker.error = _Stage.LOST, None, False, error
        return [Kill(name)] if name in self._alive else [WorkerLost(name, error)]

    def _restart(self, name: str) -> list[Instruction]:
        worker = self._workers[name]
        if not worker.restart or name in self._alive:
            return []
        if worker.starts == RESTARTS:
            return self._fail(worker.error) if worker.error is not None and name in self._required else []
        self._alive.append(name)
        self._workers[name] = _Worker(sign_at=self._clock, starts=worker.starts + 1)
        return [Start(name)]

    def _fail(self, error: WarmfrontError) -> list[Instruction]:
        self.error = error
        return [Abort(error), *self._stop()]

    def _stop(self) -> list[Instruction]:
        """Ask every worker to quit; one that is not ready does not listen yet, and has nothing to end in order."""
        self.phase, self._stopping_since = Phase.STOPPING, self._clock
        ready = self.serving()
        requests: list[Instruction] = [
            SendMessage(name, Shutdown()) if name in ready else Terminate(name) for name in self._alive
        ]
        return requests + self._finish_if_empty()

    def _escalate(self) -> list[Instruction]:
        if not self._ladder or self._clock - self._stopping_since < self._ladder[0][0]:
            return []
        _, signal = self._ladder.pop(0)
        return [signal(name) for name in self._alive]

    def _finish_if_empty(self) -> list[Instruction]:
        if self._alive:
            return []
        self.phase = Phase.FAILED if self.error else Phase.STOPPED
        return [Finished(self.error)]
