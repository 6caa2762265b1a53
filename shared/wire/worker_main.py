"""The life of a worker process, the same for every kind of worker.

    Hello -> wait for Plan -> load, reporting Progress -> Ready -> heartbeat, answer ReportRequest and Move -> Shutdown

The main thread talks to the coordinator; a `Service` does the work in threads of its own. Whatever goes wrong is sent
as a `Failure` before the process leaves with exit code 1. Before it is ready, SIGTERM is what ends it: an import or a
compilation hears no message.
"""

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt

from warmfront.shared.errors import ModelError, WorkerError
from warmfront.shared.machine.memory import map_shared
from warmfront.shared.machine.process import die_with_parent, ignore_interrupts, open_standard_files, set_name
from warmfront.shared.model.store import PackedModel
from warmfront.shared.wire.board import Board
from warmfront.shared.wire.channel import PARENT_VARIABLE, WorkerChannel
from warmfront.shared.wire.messages import (
    PROTOCOL,
    Failure,
    Heartbeat,
    Hello,
    LoadReport,
    Move,
    Moved,
    Plan,
    Progress,
    Ready,
    ReportRequest,
    Shutdown,
)

__all__ = ["Places", "Service", "open_planned", "run"]

# [n, 3]: layer, group, slot.
Places = npt.NDArray[np.int32]

_HEARTBEAT_S = 1.0
_PROGRESS_S = 0.1


class Service(Protocol):
    """What a kind of worker does. Its constructor starts loading in threads of its own."""

    def progress(self) -> tuple[int, int]:
        """Bytes loaded, of how many."""

    def ready(self) -> bool:
        """Whether it serves the board; raises the error of a thread that failed, now or later."""

    def capacity(self) -> tuple[int, dict[str, int]]:
        """Slots, and bytes of device memory by purpose; once it is ready."""

    def report(self) -> LoadReport:
        """Its work so far."""

    def move(self, places: Places) -> int:
        """Copy groups into slots that nobody computes with, while serving; returns the ns of work that it took."""

    def stop(self) -> None:
        """End and join its threads; its `leave` word on the board is set."""


def open_planned(plan: Plan) -> PackedModel:
    """The packed model of a plan. Raises ModelError if it was put in another order since the plan was made."""
    model = PackedModel(Path(plan.model))
    if model.order != plan.order:
        model.close()
        raise ModelError(f"another warmfront has put the neurons of {plan.model} in a new order: load the model again")
    return model


def run(describe: Callable[[], tuple[str, int]], make: Callable[[Plan, Board], Service]) -> int:
    """Be a worker until told to leave: `python -m warmfront.SOME_worker NAME BOARD_FD`. Returns the exit code.

    `describe` gives the device's name and free bytes; `make` builds the service.
    """
    open_standard_files()
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
            _serve(channel, make, _plan(channel), Board.attach(map_shared(fd)))
        except Exception as error:
            channel.send(Failure.of(error, channel.token, name))
            return 1
    return 0


def _plan(channel: WorkerChannel) -> Plan:
    while not isinstance(message := channel.receive(_HEARTBEAT_S), Plan):
        channel.send(Heartbeat())
    return message


def _serve(channel: WorkerChannel, make: Callable[[Plan, Board], Service], plan: Plan, board: Board) -> None:
    service = make(plan, board)
    try:
        while not service.ready():
            channel.receive(_PROGRESS_S)
            channel.send(Progress(*service.progress()))
        channel.send(Ready(service.progress()[1], *service.capacity()))
        while not isinstance(message := channel.receive(_HEARTBEAT_S), Shutdown):
            if not service.ready():
                raise WorkerError("a thread ended too early")
            if isinstance(message, Move):
                places = np.frombuffer(message.places, np.int32).reshape(-1, 3)
                channel.send(Moved(message.batch, service.move(places)))
            else:
                channel.send(service.report() if isinstance(message, ReportRequest) else Heartbeat())
    finally:
        board.quit[plan.index][0] = 1
        service.stop()
