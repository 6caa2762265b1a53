"""The life of a worker process, the same for every kind of worker.

    Hello -> wait for Assignment -> load, reporting Progress -> Ready -> heartbeat, answer ReportRequest and Move ->
    Shutdown

The main thread talks to the coordinator; a `Service` does the work in threads of its own. Whatever goes wrong is sent
as a `Failure` before the process exits with code 1. A worker that is not ready is ended by SIGTERM: during an import or
a compilation it hears no message.
"""

import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn, Protocol

import numpy as np
import numpy.typing as npt

from warmfront.shared.errors import ModelError, WorkerError
from warmfront.shared.machine.memory import map_shared
from warmfront.shared.machine.process import (
    collect_seldom,
    die_with_parent,
    ignore_interrupts,
    leave,
    open_standard_files,
    set_name,
)
from warmfront.shared.model.store import PackedModel
from warmfront.shared.wire.board import Board
from warmfront.shared.wire.channel import PARENT_VARIABLE, WorkerChannel
from warmfront.shared.wire.messages import (
    PROTOCOL,
    Assignment,
    Failure,
    Heartbeat,
    Hello,
    LoadReport,
    Move,
    Moved,
    Progress,
    Ready,
    ReportRequest,
    Shutdown,
)

__all__ = ["Places", "Service", "open_assigned", "run"]

# [n, 3]: layer, group, slot.
Places = npt.NDArray[np.int32]

_HEARTBEAT_S = 1.0
_PROGRESS_S = 0.1


class Service(Protocol):
    """What a kind of worker does. Its constructor starts loading in threads of its own."""

    def progress(self) -> tuple[int, int]:
        """Bytes loaded, and how many there are to load."""

    def ready(self) -> bool:
        """Whether it serves the board. Raises the error of a thread that failed, then or later."""

    def capacity(self) -> tuple[int, dict[str, int]]:
        """Slots and ledger, as in `Ready`; once it is ready."""

    def report(self) -> LoadReport:
        """Its work so far."""

    def move(self, places: Places) -> int:
        """Copy groups into slots with which nobody computes, while serving; returns the ns of work that it took."""

    def stop(self) -> None:
        """End and join its threads; its word on the board that ends their waiting is set."""


def open_assigned(assignment: Assignment) -> PackedModel:
    """The packed model to run. Raises ModelError if its neurons were reordered since the assignment was made."""
    model, path = PackedModel(Path(assignment.model)), assignment.model
    if model.order != assignment.neuron_order:
        model.close()
        raise ModelError(f"another warmfront has put the neurons of {path} in a new order: load the model again")
    if assignment.activation:
        model.activate(assignment.activation)
    return model


def run(describe: Callable[[], tuple[str, int]], make: Callable[[Assignment, Board], Service]) -> NoReturn:
    """Be a worker until told to stop, then exit: `python -m warmfront.cpu_worker NAME BOARD_FD`.

    `describe`: returns the device's name and its free bytes; `make`: builds the service.
    """
    open_standard_files()
    collect_seldom()
    parent = os.environ.get(PARENT_VARIABLE)
    if parent is None or len(sys.argv) < 3:
        print("a worker is started by the coordinator: run `warmfront` instead", file=sys.stderr)
        sys.exit(2)
    ignore_interrupts()
    die_with_parent(int(parent))
    name, fd = sys.argv[1], int(sys.argv[2])
    set_name(f"wf-{name}")
    code = 0
    with WorkerChannel.from_environment() as channel:
        try:
            device, free = describe()
            channel.send(Hello(channel.token, name, os.getpid(), device, free, PROTOCOL))
            _serve(channel, make, _await_assignment(channel), Board.attach(map_shared(fd)))
        except Exception as error:
            channel.send(Failure.of(error, channel.token, name))
            code = 1
    leave(code)


def _await_assignment(channel: WorkerChannel) -> Assignment:
    while not isinstance(message := channel.receive(_HEARTBEAT_S), Assignment):
        channel.send(Heartbeat())
    return message


def _serve(
    channel: WorkerChannel, make: Callable[[Assignment, Board], Service], assignment: Assignment, board: Board
) -> None:
    service = make(assignment, board)
    try:
        while not service.ready():
            channel.receive(_PROGRESS_S)
            channel.send(Progress(*service.progress(), time.process_time_ns()))
        channel.send(Ready(*service.capacity()))
        while not isinstance(message := channel.receive(_HEARTBEAT_S), Shutdown):
            if not service.ready():
                raise WorkerError("a thread ended too early")
            if isinstance(message, Move):
                places = np.frombuffer(message.places, np.int32).reshape(-1, 3)
                channel.send(Moved(message.batch, service.move(places)))
            else:
                channel.send(service.report() if isinstance(message, ReportRequest) else Heartbeat())
    finally:
        board.quit[assignment.index][0] = 1
        service.stop()
