"""Starts the worker processes, listens to them, ends them: the I/O around the state machine of `lifecycle.py`.

All of it happens in one thread that lives as long as the workers: the kernel kills a worker when the *thread* that
started it ends, and the channel's socket belongs to one thread. The engine talks to that thread through a queue and an
eventfd that wakes it.
"""

import contextlib
import os
import queue
import subprocess
import threading
import time
from collections.abc import Callable, Collection, Mapping, Sequence

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
from warmfront.coordinator.workers.lifecycle import Lifecycle
from warmfront.shared.errors import WarmfrontError, WorkerError
from warmfront.shared.machine.process import ensure_files, python_module_command
from warmfront.shared.wire.channel import CoordinatorChannel
from warmfront.shared.wire.messages import Assignment, Failure, Hello, LoadReport, Move, Ready, ReportRequest

__all__ = ["Supervisor"]

_TICK_S = 0.25
# Files open at once: ZeroMQ's and ours, and those of each worker. ZeroMQ aborts the process for want of one.
_FILES, _FILES_OF_WORKER = 32, 4
# A worker's last message may still be on its way when its process has ended.
_LAST_WORDS_S = 0.05
# How long an error that has aborted a job may take to become known.
_ERROR_LIMIT_S = 5.0
News = WorkerLost | WorkerRejoined | DeliverMoved
Assign = Callable[[Mapping[str, Hello]], Mapping[str, Assignment]]


class _ReportRound:
    """The load reports that were requested at one time. Each worker answers the rounds in order, while it lives."""

    def __init__(self) -> None:
        self.waiting_for: set[str] = set()
        self.reports: Mapping[str, LoadReport] = {}
        self.complete = threading.Event()

    def take(self, worker: str, report: LoadReport | None) -> None:
        """Its report; None if the worker is lost: what its process has done says nothing about its successor's."""
        self.waiting_for.discard(worker)
        others = {name: each for name, each in self.reports.items() if name != worker}
        self.reports = others if report is None else others | {worker: report}
        if not self.waiting_for:
            self.complete.set()


class Supervisor:
    """The worker processes of one engine."""

    def __init__(
        self,
        modules: Mapping[str, str],
        board_fd: int,
        *,
        assign: Assign,
        on_lost: Callable[[str], None],
        on_abort: Callable[[], None],
        environment: Mapping[str, str],
        optional: Collection[str] = (),
        required: Collection[str] = (),
    ) -> None:
        """`modules`: worker name -> Python module. Each process inherits `board_fd`, and `environment` beside ours.

        In the supervisor's thread are called: `assign` once all workers have said Hello, and for each that is started
        again; `on_lost` when a worker of `optional` is lost, of which those of `required` must come back; `on_abort`
        when an error ends the run.
        """
        ensure_files(_FILES + _FILES_OF_WORKER * len(modules))
        self._modules, self._board_fd = dict(modules), board_fd
        self._assign, self._on_lost, self._on_abort = assign, on_lost, on_abort
        self._optional, self._required = frozenset(optional), frozenset(required)
        self._environment = dict(environment)
        self._requests: queue.SimpleQueue[Event | _ReportRound | tuple[str, Move]] = queue.SimpleQueue()
        self._news: queue.SimpleQueue[News] = queue.SimpleQueue()
        self._wakeup_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        self._sentinels: dict[int, str] = {}  # pidfd -> worker
        self._round = _ReportRound()
        self._rounds: list[_ReportRound] = []  # those that are not answered yet, and the last
        self._ready = threading.Event()
        self._finished = threading.Event()
        self.error: WarmfrontError | None = None
        self.hellos: dict[str, Hello] = {}
        self.readies: Mapping[str, Ready] = {}
        self.loaded = (0, 0)
        self._thread = threading.Thread(target=self._live, name="wf-supervisor", daemon=True)
        self._thread.start()

    def ready(self) -> bool:
        """Whether all workers serve the board; raises the error that ended them."""
        self.check()
        return self._ready.is_set()

    def check(self) -> None:
        """Raise the error that ended the workers, if one did."""
        if self.error is not None:
            raise self.error

    def wait_for_error(self) -> None:
        """After an aborted job: raise why."""
        self._finished.wait(_ERROR_LIMIT_S)
        self.check()
        raise WorkerError("the workers were stopped while a job was under way")

    def request_reports(self) -> None:
        """Ask every worker that serves for its work so far."""
        self._round = _ReportRound()
        self._send(self._round)

    def reported(self) -> Mapping[str, LoadReport] | None:
        """What they answered, once all have; None until then."""
        return self._round.reports if self._round.complete.is_set() else None

    def reports(self, timeout_s: float = 5.0) -> Mapping[str, LoadReport]:
        """Ask and wait. Raises WorkerError if they do not answer in time, or were stopped."""
        if self._finished.is_set():
            self.check()
            raise WorkerError("the workers were stopped: load the model again")
        self.request_reports()
        if not self._round.complete.wait(timeout_s):
            self.check()
            raise WorkerError("the workers do not answer: no load reports came")
        return self._round.reports

    def move(self, worker: str, move: Move) -> None:
        """Have `worker` copy groups; `news` tells when it is done."""
        self._send((worker, move))

    def restart(self, worker: str) -> None:
        """Start a lost worker again; `news` tells when it has rejoined."""
        self._send(RestartRequested(worker))

    def news(self, wait_s: float = 0.0) -> list[News]:
        """Moves that have finished, workers that were lost or came back since the last call; waits for the first."""
        found = []
        with contextlib.suppress(queue.Empty):
            found.append(self._news.get(timeout=wait_s) if wait_s else self._news.get_nowait())
            while True:
                found.append(self._news.get_nowait())
        return found

    def stop(self) -> None:
        """End the workers and the thread; returns when no process is left."""
        if self._thread.is_alive():
            self._send(StopRequested())
        self._thread.join()
        if self._wakeup_fd >= 0:
            os.close(self._wakeup_fd)
            self._wakeup_fd = -1

    def _send(self, what: Event | _ReportRound | tuple[str, Move]) -> None:
        self._requests.put(what)
        os.eventfd_write(self._wakeup_fd, 1)

    def _live(self) -> None:
        try:
            with CoordinatorChannel() as channel:
                try:
                    self._start(channel)
                    self._run(channel)
                finally:
                    self._kill_remaining()
        except WarmfrontError as error:
            self._fail(error)
        except Exception as error:
            self._fail(WorkerError(f"the supervisor failed: {type(error).__name__}: {error}"))
        finally:
            self._finished.set()

    def _start(self, channel: CoordinatorChannel) -> None:
        for name in self._modules:
            self._spawn(channel, name)

    def _spawn(self, channel: CoordinatorChannel, name: str) -> None:
        channel.forget(name)
        process = self._processes[name] = subprocess.Popen(
            python_module_command(self._modules[name], name, str(self._board_fd)),
            env=os.environ | self._environment | channel.environment(),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            pass_fds=[self._board_fd],
            process_group=0,  # Ctrl-C in the terminal reaches the coordinator alone
        )
        self._sentinels[os.pidfd_open(process.pid)] = name

    def _run(self, channel: CoordinatorChannel) -> None:
        lifecycle = Lifecycle(list(self._modules), time.monotonic(), self._optional, self._required)
        while not self._finished.is_set():
            polled = channel.poll(_TICK_S, [self._wakeup_fd, *self._sentinels])
            messages = polled.messages
            if any(fd in self._sentinels for fd in polled.readable):
                # Messages before exits: the last words say why.
                messages += channel.poll(_LAST_WORDS_S).messages
            events: list[Event] = [Received(*message) for message in messages]
            for fd in polled.readable:
                if fd == self._wakeup_fd:
                    events += self._take_requests(channel, lifecycle)
                else:
                    name = self._sentinels.pop(fd)
                    os.close(fd)
                    events.append(Exited(name, self._processes[name].wait()))
            for event in [*events, Tick()]:
                self._follow(channel, lifecycle, lifecycle.handle(event, time.monotonic()))

    def _take_requests(self, channel: CoordinatorChannel, lifecycle: Lifecycle) -> list[Event]:
        """Send what the engine wants sent; returns what is for the state machine."""
        os.eventfd_read(self._wakeup_fd)
        events: list[Event] = []
        while not self._requests.empty():
            request = self._requests.get()
            serving = lifecycle.serving()
            if isinstance(request, _ReportRound):
                request.waiting_for.update(serving)
                self._rounds = [*(each for each in self._rounds if each.waiting_for), request]
                for name in serving:
                    channel.send(name, ReportRequest())
            elif isinstance(request, tuple):
                if request[0] in serving:
                    channel.send(*request)
            else:
                events.append(request)
        return events

    def _follow(self, channel: CoordinatorChannel, lifecycle: Lifecycle, instructions: Sequence[Instruction]) -> None:
        """Carry out the instructions in order."""
        for instruction in instructions:
            match instruction:
                case SendMessage(worker, message):
                    channel.send(worker, message)
                case MakeAssignments(hellos):
                    self.hellos |= hellos
                    for event in self._assignments(hellos):
                        self._follow(channel, lifecycle, lifecycle.handle(event, time.monotonic()))
                case ReportProgress(done, total):
                    self.loaded = (done, total)
                case AnnounceReady(readies):
                    self.readies = readies
                    self._ready.set()
                case DeliverReport(worker, report):
                    for report_round in self._rounds:
                        if worker in report_round.waiting_for:
                            report_round.take(worker, report)
                            break
                case DeliverMoved() | WorkerRejoined():
                    self._news.put(instruction)
                case WorkerLost(worker):
                    self._on_lost(worker)
                    self._news.put(instruction)
                    for report_round in self._rounds:
                        report_round.take(worker, None)
                case Start(worker):
                    self._spawn(channel, worker)
                case Abort(error):
                    self._fail(error)
                case Terminate(worker):
                    self._processes[worker].terminate()
                case Kill(worker):
                    self._processes[worker].kill()
                case Finished():
                    self._finished.set()

    def _assignments(self, hellos: Mapping[str, Hello]) -> list[Event]:
        """The assignments; or, if none can be made for a worker that was started again, that one's failure."""
        try:
            return [Assigned(self._assign(hellos))]
        except WarmfrontError as error:
            if not self._ready.is_set():
                raise
            return [Received(name, Failure.of(error)) for name in hellos]

    def _fail(self, error: WarmfrontError) -> None:
        if self.error is None:
            self.error = error
        self._on_abort()

    def _kill_remaining(self) -> None:
        """Leave no process behind, whatever has gone wrong."""
        for process in self._processes.values():
            if process.poll() is None:
                process.kill()
            process.wait()
        for fd in self._sentinels:
            os.close(fd)
