"""The GPU worker's thread: fills the device's slots, then serves the board: wait, execute, publish.

The same loop drives a CUDA device and the emulated one. Hand-over is through the host: the thread waits on the board
like a CPU worker's, calls the device, and announces the result when the device is done.
"""

import threading
import time
from pathlib import Path

import numpy as np

from warmfront.gpu_worker.device import Device, Floats
from warmfront.shared.board import LEAVE, Board
from warmfront.shared.config import PREDICTING
from warmfront.shared.gemm import LANES
from warmfront.shared.handoff import DONE, HANDOFF_SPINS, LATE, announce, await_sequence
from warmfront.shared.memory import address
from warmfront.shared.messages import LoadReport, Plan
from warmfront.shared.model import ACTIVATIONS
from warmfront.shared.store import PackedModel, run_of

__all__ = ["GpuWorker"]

# Groups read and copied to the device at a time.
_BATCH = 64
_LOOK_UP_NS = 500_000_000


class GpuWorker:
    """Holds the groups that it owns in the device's slots, in order of layer and group."""

    def __init__(self, plan: Plan, board: Board, device: Device) -> None:
        self._plan, self._board, self._device = plan, board, device
        sizes = board.sizes
        owned = np.frombuffer(plan.owner, np.uint8).reshape(sizes.layers, sizes.groups) == plan.index
        self._places = np.argwhere(owned)
        self._slot = np.full(owned.shape, -1, np.int32)
        self._slot[owned] = np.arange(len(self._places))
        self._busy = np.zeros((sizes.layers, 3), np.int64)
        self._jobs = 0
        self._measured = np.zeros(4, np.int64)
        self._loaded = 0
        self._total = len(self._places)
        self._error: BaseException | None = None
        self._serving = threading.Event()
        self._thread = threading.Thread(target=self._live, name="wf-gpu", daemon=True)
        self._thread.start()

    def _live(self) -> None:
        try:
            with PackedModel(Path(self._plan.model)) as model:
                self._layout, self._skips = model.layout, model.spec.sparse
                self._fill(model)
            self._serving.set()
            self._serve()
        except BaseException as error:
            self._error = error
        finally:
            self._device.close()

    def _fill(self, model: PackedModel) -> None:
        layout, sizes = model.layout, self._board.sizes
        self._total = len(self._places) * layout.group_bytes
        activation = ACTIVATIONS.index(model.spec.activation)
        self._device.reserve(layout, activation, len(self._places), sizes.max_tokens)
        slot = 0
        while slot < len(self._places):
            layer, group = (int(v) for v in self._places[slot])
            run = run_of(self._places[slot : slot + _BATCH])
            groups = np.empty((run, layout.group_bytes), np.uint8)
            model.read_groups(layer, group, groups)
            self._device.store_many(slot, groups)
            slot += run
            self._loaded += groups.nbytes

    def _serve(self) -> None:
        board, index = self._board, self._plan.index
        job_at, abort_at = address(board.job), address(board.abort)
        done_at = address(board.done[index])
        sequence = 0
        while True:
            sequence += 1
            result = LATE
            while result == LATE:
                deadline = time.monotonic_ns() + _LOOK_UP_NS
                result = await_sequence(job_at, sequence, abort_at, HANDOFF_SPINS, deadline)
            layer, tokens, lanes = (int(v) for v in board.order[:3])
            if result != DONE or layer == LEAVE:
                return
            started = time.monotonic_ns()
            neurons = self._execute(layer, tokens, lanes)
            ended = time.monotonic_ns()
            self._note(layer, tokens, started, ended, neurons)
            announce(done_at, sequence)

    def _execute(self, layer: int, tokens: int, lanes: int) -> int:
        """Compute the owned groups of `layer` for the board's x into this worker's y."""
        board, hidden = self._board, self._board.sizes.hidden
        owned = board.owner[layer] == self._plan.index
        slots = self._slot[layer][owned]
        x, y = board.x, board.y[self._plan.index]
        if lanes == 1:
            predicted = self._plan.selector in PREDICTING
            sparse = self._plan.selector == "exact" or (predicted and self._skips)
            mask = board.mask[owned] if predicted else None
            one = x[None, :hidden]
            neurons, _ = self._device.execute(slots, one, sparse, y[None, :hidden], mask)
            if board.order[3] != 0 and mask is not None:
                fired, _ = self._device.execute(slots, one, True, np.empty_like(one))
                self._measured += (1, int(np.unpackbits(mask.view(np.uint8)).sum()), fired, neurons)
            return neurons
        out = np.zeros((-(-tokens // LANES) * LANES, hidden), np.float32)
        neurons, _ = self._device.execute(slots, _from_panels(x, tokens, hidden), False, out[:tokens])
        y[: out.size] = out.reshape(-1, LANES, hidden).transpose(0, 2, 1).ravel()
        return neurons

    def _note(self, layer: int, tokens: int, started: int, ended: int, neurons: int) -> None:
        layout = self._layout
        moved = neurons * (2 * layout.gate_row_bytes + layout.down_row_bytes)
        self._board.record[self._plan.index][:] = (started, ended, neurons, moved)
        if tokens == 1:
            self._busy[layer] += (ended - started, neurons, moved)
            self._jobs += 1

    def progress(self) -> tuple[int, int]:
        """Bytes loaded, of how many."""
        return self._loaded, self._total

    def ready(self) -> bool:
        """Whether the thread serves the board; raises its error if it failed."""
        if self._error is not None:
            raise self._error
        return self._serving.is_set()

    def report(self) -> LoadReport:
        """Work on single tokens so far, by layer."""
        busy, neurons, read = self._busy.T.tolist()
        return LoadReport(self._jobs, busy, neurons, read, self._measured.tolist())

    def stop(self) -> None:
        """Join the thread; the board has been aborted."""
        self._thread.join()


def _from_panels(x: Floats, tokens: int, hidden: int) -> Floats:
    """The board's [panels, hidden, 16] as [tokens, hidden]."""
    panels = -(-tokens // LANES)
    wide = x[: panels * hidden * LANES].reshape(panels, hidden, LANES).transpose(0, 2, 1)
    return np.ascontiguousarray(wide.reshape(-1, hidden)[:tokens])
