"""`python -m warmfront.gpu_worker NAME BOARD_FD`: started by the coordinator."""

import os

from warmfront.gpu_worker.device import Device
from warmfront.gpu_worker.open import open_device
from warmfront.shared.wire.board import Board
from warmfront.shared.wire.messages import Assignment
from warmfront.shared.wire.worker_main import Service, run

_opened: list[Device] = []


def _describe() -> tuple[str, int]:
    _opened.append(open_device(os.environ["WARMFRONT_GPU"]))
    return _opened[0].name, _opened[0].free_bytes()


def _make(plan: Assignment, board: Board) -> Service:
    from warmfront.gpu_worker.worker import GpuWorker

    return GpuWorker(plan, board, _opened[0])


run(_describe, _make)
