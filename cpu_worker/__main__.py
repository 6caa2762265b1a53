"""`python -m warmfront.cpu_worker NAME BOARD_FD`: started by the coordinator."""

from warmfront.shared.machine.process import pin
from warmfront.shared.machine.topology import read_topology
from warmfront.shared.wire.board import Board
from warmfront.shared.wire.messages import Assignment
from warmfront.shared.wire.worker_main import Service, run


def _describe() -> tuple[str, int]:
    return "cpu", read_topology().available_bytes


def _make(plan: Assignment, board: Board) -> Service:
    if plan.pinned:
        pin(plan.cpus)  # before numba is imported: its memory and threads stay on the node

    from warmfront.cpu_worker.worker import CpuWorker

    return CpuWorker(plan, board)


run(_describe, _make)
