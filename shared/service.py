"""The life of a worker process, the same for every kind of worker.

    Hello -> wait for Plan -> load, reporting Progress -> Ready -> heartbeat, answer ReportRequest -> Shutdown

The main thread talks to the coordinator; a `Service` does the work in threads of its own. Whatever goes wrong is
sent as a `Failure` before the process leaves with exit code 1.
"""

import os
import sys
from collections.abc import Callable
from typing import Protocol

from warmfront.shared.board import Board
from warmfront.shared.channel import PARENT_VARIABLE, WorkerChannel
from warmfront.shared.errors import WorkerError
from warmfront.shared.memory import map_shared
from warmfront.shared.messages import (
    PROTOCOL,
    Failure,
    Heartbeat,
    Hello,
    LoadReport,
    Plan,
    Progress,
    Ready,
    ReportRequest,
    Shutdown,
)
from warmfront.shared.process import die_with_parent, ignore_interrupts, set_name

__all__ = ["Service", "run"]

_HEARTBEAT_S = 1.0
_PROGRESS_S = 0.1


class Service(Protocol):
    """What a kind of worker does. Its constructor starts loading in threads of its own."""

    def progress(self) -> tuple[int, int]:
        """Bytes loaded, of how many."""

    def ready(self) -> bool:
        """Whether it serves the board; raises the error of a thread that failed, now or later."""

    def report(self) -> LoadReport:
        """Its work so far."""

    def stop(self) -> None:
        """End and join its threads; the board has been aborted."""


def run(describe: Callable[[], tuple[str, int]], make: Callable[[Plan, Board], Service]) -> int:
    """Be a worker until told to leave: `python -m warmfront.SOME_worker NAME BOARD_FD`. Returns the exit code.

    `describe` gives the device's name and free bytes; `make` builds the service.
    """
    parent = os.environ.get(PARENT_VARIABLE)
    if parent is None or len(sys.argv) < 3:
        print("a worker is started by the coordinator: run `warmfront` instead", file=sys.stderr)
        return 2
    ignore_interrupts()
    die_with_parent(int(parent))
    name, fd = sys.argv[1], int(sys.argv[2])
    set_name(f"wf-{name}")
    with WorkerChannel.from_environment() as channel:
        try:
            device, free = describe()
            channel.send(Hello(channel.token, name, os.getpid(), device, free, PROTOCOL))
            plan = _plan(channel)
            if plan is not None:
                _serve(channel, make, plan, Board.attach(map_shared(fd)))
        except Exception as error:
            channel.send(Failure.of(error, channel.token, name))
            return 1
    return 0


def _plan(channel: WorkerChannel) -> Plan | None:
    """The plan, or None if told to leave instead."""
    while True:
        message = channel.receive(_HEARTBEAT_S)
        if isinstance(message, Plan):
            return message
        if isinstance(message, Shutdown):
            return None
        channel.send(Heartbeat())


def _serve(channel: WorkerChannel, make: Callable[[Plan, Board], Service], plan: Plan, board: Board) -> None:
    service = make(plan, board)
    try:
        while not service.ready():
            message = channel.receive(_PROGRESS_S)
            if isinstance(message, Shutdown):
                return
            channel.send(Progress(*service.progress()))
        channel.send(Ready(service.progress()[1]))
        while True:
            message = channel.receive(_HEARTBEAT_S)
            if isinstance(message, Shutdown):
                return
            if not service.ready():
                raise WorkerError("a thread ended too early")
            channel.send(service.report() if isinstance(message, ReportRequest) else Heartbeat())
    finally:
        board.abort[0] = 1
        service.stop()
