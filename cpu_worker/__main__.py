"""`python -m warmfront.cpu_worker NAME BOARD_FD`: started by the coordinator."""

import sys

from warmfront.shared.board import Board
from warmfront.shared.messages import Plan
from warmfront.shared.process import pin
from warmfront.shared.service import Service, run
from warmfront.shared.topology import read_topology


def _describe() -> tuple[str, int]:
    return "cpu", sum(node.available_bytes for node in read_topology().nodes)


def _make(plan: Plan, board: Board) -> Service:
    pin(plan.cpus)  # before numba is imported: its memory and threads stay on the node

    from warmfront.cpu_worker.worker import CpuWorker

    return CpuWorker(plan, board)


sys.exit(run(_describe, _make))
