"""Starts the worker processes, listens to them, ends them: the I/O around `lifecycle.py`.

All of it happens in one thread that lives as long as the workers: a worker dies with the *thread* that started it,
and the channel's socket belongs to one thread. The engine talks to that thread through a queue and an eventfd.
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
    DeliverMoved,
    DeliverReport,
    Event,
    Exited,
    Finished,
    Instruction,
    Kill,
    MakePlans,
    Planned,
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
from warmfront.shared.wire.messages import Failure, Hello, LoadReport, Move, Plan, Ready, ReportRequest

__all__ = ["Supervisor"]

_TICK_S = 0.25
# Files that may be open at once, of ZeroMQ and ours, and of each worker's: ZeroMQ aborts the process for want of one.
_FILES, _FILES_OF_WORKER = 32, 4
# What a worker said last may still be on its way when its process is gone.
_LAST_WORDS_S = 0.05
News = WorkerLost | WorkerRejoined | DeliverMoved
MakeThePlans = Callable[[Mapping[str, Hello]], Mapping[str, Plan]]


class _Inquiry:
    """What workers are asked for at one time; each answers its inquiries in order, for as long as it lives."""

    def __init__(self) -> None:
        self.due: set[str] = set()
        self.reports: Mapping[str, LoadReport] = {}
        self.complete = threading.Event()

    def take(self, worker: str, report: LoadReport | None) -> None:
        """Its report; None if the worker is lost: what its process has done says nothing of the next."""
        self.due.discard(worker)
        others = {name: each for name, each in self.reports.items() if name != worker}
        self.reports = others if report is None else others | {worker: report}
        if not self.due:
            self.complete.set()


class Supervisor:
    """The worker processes of one engine.

    `modules`: worker name -> Python module; `board_fd` is inherited by each; `make_plans` is called in the
    supervisor's thread once all have said Hello, and for one that is started again; `lose` when a worker of `spare`,
    without which the run can go on, is lost; `abort` when an error ends the run; `environment` is added to theirs.
    """

    def __init__(
        self,
        modules: Mapping[str, str],
        board_fd: int,
        make_plans: MakeThePlans,
        lose: Callable[[str], None],
        abort: Callable[[], None],
        environment: Mapping[str, str],
        spare: Collection[str] = (),
    ) -> None:
        ensure_files(_FILES + _FILES_OF_WORKER * len(modules))
        self._modules, self._board_fd = dict(modules), board_fd
        self._make_plans, self._lose, self._abort = make_plans, lose, abort
        self._spare = frozenset(spare)
        self._environment = dict(environment)
        self._requests: queue.SimpleQueue[Event | _Inquiry | tuple[str, Move]] = queue.SimpleQueue()
        self._news: queue.SimpleQueue[News] = queue.SimpleQueue()
        self._bell = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        self._sentinels: dict[int, str] = {}
        self._inquiry = _Inquiry()
        self._inquiries: list[_Inquiry] = []  # those that are not answered yet, and the last
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
        self._finished.wait(5.0)
        self.check()
        raise WorkerError("the workers were stopped while a job was under way")

    def request_reports(self) -> None:
        """Ask every worker that serves for its work so far."""
        self._inquiry = _Inquiry()
        self._ask(self._inquiry)

    def reported(self) -> Mapping[str, LoadReport] | None:
        """What they answered, once all have; None until then."""
        return self._inquiry.reports if self._inquiry.complete.is_set() else None

    def reports(self, timeout_s: float = 5.0) -> Mapping[str, LoadReport]:
        """Ask and wait. Raises WorkerError if they do not answer in time, or were stopped."""
        if self._finished.is_set():
            self.check()
            raise WorkerError("the workers were stopped: load the model again")
        self.request_reports()
        if not self._inquiry.complete.wait(timeout_s):
            self.check()
            raise WorkerError("the workers do not answer: no load reports came")
        return self._inquiry.reports

    def move(self, worker: str, move: Move) -> None:
        """Have `worker` copy groups; `news` tells when it is done."""
        self._ask((worker, move))

    def restart(self, worker: str) -> None:
        """Start a lost worker again; `news` tells when it has rejoined."""
        self._ask(RestartRequested(worker))

    def news(self, wait_s: float = 0.0) -> list[News]:
        """What has happened to moves and spare workers since the last call; waits for the first so long."""
        found = []
        with contextlib.suppress(queue.Empty):
            found.append(self._news.get(timeout=wait_s) if wait_s else self._news.get_nowait())
            while True:
                found.append(self._news.get_nowait())
        return found

    def stop(self) -> None:
        """End the workers and the thread; returns when no process is left."""
        if self._thread.is_alive():
            self._ask(StopRequested())
        self._thread.join()
        if self._bell >= 0:
            os.close(self._bell)
            self._bell = -1

    def _ask(self, what: Event | _Inquiry | tuple[str, Move]) -> None:
        self._requests.put(what)
        os.eventfd_write(self._bell, 1)

    def _live(self) -> None:
        try:
            with CoordinatorChannel() as channel:
                try:
                    self._start(channel)
                    self._run(channel)
                finally:
                    self._sweep()
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
        lifecycle = Lifecycle(list(self._modules), time.monotonic(), self._spare)
        while not self._finished.is_set():
            polled = channel.poll(_TICK_S, [self._bell, *self._sentinels])
            messages = polled.messages
            if any(fd in self._sentinels for fd in polled.readable):
                messages += channel.poll(_LAST_WORDS_S).messages
            events: list[Event] = [Received(*message) for message in messages]
            for fd in polled.readable:
                if fd == self._bell:
                    events += self._requested(channel, lifecycle)
                else:
                    name = self._sentinels.pop(fd)
                    os.close(fd)
                    events.append(Exited(name, self._processes[name].wait()))
            for event in [*events, Tick()]:
                self._follow(channel, lifecycle, lifecycle.handle(event, time.monotonic()))

    def _requested(self, channel: CoordinatorChannel, lifecycle: Lifecycle) -> list[Event]:
        os.eventfd_read(self._bell)
        events: list[Event] = []
        while not self._requests.empty():
            request = self._requests.get()
            serving = lifecycle.serving()
            if isinstance(request, _Inquiry):
                request.due.update(serving)
                self._inquiries = [*(each for each in self._inquiries if each.due), request]
                for name in serving:
                    channel.send(name, ReportRequest())
            elif isinstance(request, tuple):
                if request[0] in serving:
                    channel.send(*request)
            else:
                events.append(request)
        return events

    def _follow(self, channel: CoordinatorChannel, lifecycle: Lifecycle, instructions: Sequence[Instruction]) -> None:
        for instruction in instructions:
            match instruction:
                case SendMessage(worker, message):
                    channel.send(worker, message)
                case MakePlans(hellos):
                    self.hellos |= hellos
                    for event in self._plan(hellos):
                        self._follow(channel, lifecycle, lifecycle.handle(event, time.monotonic()))
                case ReportProgress(done, total):
                    self.loaded = (done, total)
                case AnnounceReady(readies):
                    self.readies = readies
                    self._ready.set()
                case DeliverReport(worker, report):
                    for inquiry in self._inquiries:
                        if worker in inquiry.due:
                            inquiry.take(worker, report)
                            break
                case DeliverMoved() | WorkerRejoined():
                    self._news.put(instruction)
                case WorkerLost(worker):
                    self._lose(worker)
                    self._news.put(instruction)
                    for inquiry in self._inquiries:
                        inquiry.take(worker, None)
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

    def _plan(self, hellos: Mapping[str, Hello]) -> list[Event]:
        """The plans; or, if there is none for a worker that was started again, that one's failure."""
        try:
            return [Planned(self._make_plans(hellos))]
        except WarmfrontError as error:
            if not self._ready.is_set():
                raise
            return [Received(name, Failure.of(error)) for name in hellos]

    def _fail(self, error: WarmfrontError) -> None:
        if self.error is None:
            self.error = error
        self._abort()

    def _sweep(self) -> None:
        """Leave no process behind, whatever went wrong."""
        for process in self._processes.values():
            if process.poll() is None:
                process.kill()
            process.wait()
        for fd in self._sentinels:
            os.close(fd)
