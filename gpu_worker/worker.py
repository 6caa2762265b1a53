"""The GPU worker's thread: makes the device's slots, then serves the board: wait, execute, publish.

The same loop drives a CUDA device and the emulated one. Hand-over is through the host: the thread waits on the board
like a CPU worker's, calls the device, and announces the result when the device is done. Groups come later, by `move`,
from the packed file: the main thread reads and copies them while this one computes.

With experts (`shared/model/branches.py`) the device is called once for each branch that is used, of several tokens for
those that use it; the branch's weight is multiplied into the unit of their sums.
"""

import math
import threading
import time
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from warmfront.gpu_worker.device import Device, Ints, slots_within
from warmfront.shared.machine.memory import address
from warmfront.shared.machine.process import pin, take_short_turns
from warmfront.shared.model.branches import bounds_of
from warmfront.shared.model.panels import LANES, whole_panels
from warmfront.shared.model.store import run_of
from warmfront.shared.selector import selector_of
from warmfront.shared.wire.board import ANNOUNCED_NS, COMPARE_SELECTION, QUIT, Board
from warmfront.shared.wire.handoff import DONE, HANDOFF_SPINS, announce, await_sequence
from warmfront.shared.wire.messages import Assignment, LoadReport
from warmfront.shared.wire.worker_main import Places, open_assigned

__all__ = ["GpuWorker"]


class _Owned(NamedTuple):
    """The groups of a layer that this worker owns."""

    # The layer's row of the owner table that they come from.
    owner: bytes
    # Where they lie on the device.
    slots: Ints
    # Of each branch that has any: its number, the numbers of the groups, and where they lie.
    branches: list[tuple[int, npt.NDArray[np.int64], Ints]]


class GpuWorker:
    """Computes the groups that the board gives it, in the slots where the board says they lie."""

    def __init__(self, plan: Assignment, board: Board, device: Device) -> None:
        self._plan, self._board, self._device = plan, board, device
        self._model = open_assigned(plan)
        layers = board.sizes.layers
        # Of single tokens, by layer: ns, neurons, bytes.
        self._busy = np.zeros((layers, 3), np.int64)
        self._jobs = 0
        # Of those that compared the selection: jobs, neurons selected, neurons that fire, neurons that are both.
        self._compared = np.zeros(4, np.int64)
        self._slots = 0
        self._owned: list[_Owned | None] = [None] * layers
        self._bounds = bounds_of(self._model.spec)
        self._selector = selector_of(plan.selector)
        self._sparse = self._selector.skips(self._model.spec.sparse)
        self._error: BaseException | None = None
        self._serving = threading.Event()
        self._thread = threading.Thread(target=self._live, name="wf-gpu", daemon=True)
        self._thread.start()

    def _live(self) -> None:
        try:
            if self._plan.cpus and self._plan.pinned:
                pin(self._plan.cpus)
                take_short_turns()
            self._reserve()
            self._serve()
        except BaseException as error:
            self._error = error

    def _reserve(self) -> None:
        layout, sizes = self._model.layout, self._board.sizes
        max_slots = sizes.layers * sizes.groups
        self._slots = slots_within(self._device, layout, self._plan.vram_budget, sizes.max_tokens, max_slots)
        feed_forward = self._model.spec.architecture.feed_forward
        self._device.reserve(layout, feed_forward, self._slots, sizes.max_tokens, self._selector.work)
        self._device.pin(self._board.mapping)

    def _serve(self) -> None:
        board, index = self._board, self._plan.index
        job_at, quit_at = address(board.job), address(board.quit[index])
        done_at = address(board.done[index])
        # One that replaces another joins between two jobs.
        sequence = int(board.job[0])
        self._serving.set()
        while True:
            sequence += 1
            result = await_sequence(job_at, sequence, quit_at, HANDOFF_SPINS, 0)
            layer, tokens, lanes = (int(v) for v in board.descriptor[:3])
            if result != DONE or layer == QUIT:
                return
            started = time.monotonic_ns()
            gates, neurons = self._batch(layer, tokens) if lanes == 1 else self._several(layer, tokens)
            ended = time.monotonic_ns()
            self._note(layer, tokens if lanes == 1 else 0, started, ended, gates, neurons)
            announce(done_at, sequence)

    def _groups(self, layer: int) -> _Owned:
        """The owned groups of a layer, looked up anew when its owners have changed."""
        owner = self._board.owner[layer].tobytes()
        known = self._owned[layer]
        if known is None or known.owner != owner:
            groups = np.flatnonzero(self._board.owner[layer] == self._plan.index)
            slots = self._board.slot[self._plan.index][layer, groups]
            cuts = np.searchsorted(groups, self._bounds)
            parts = enumerate(pairwise(cuts.tolist()))
            own = [(branch, groups[low:high], slots[low:high]) for branch, (low, high) in parts if low < high]
            known = self._owned[layer] = _Owned(owner, slots, own)
        return known

    def _batch(self, layer: int, tokens: int) -> tuple[int, int]:
        """Tokens of a batch, one after the other: each as if it came alone. Returns gates and whole neurons computed.

        The groups are read from the device's own memory for each, which is the fast one.
        """
        counts = [self._single(layer, token) for token in range(tokens)]
        return sum(gates for gates, _ in counts), sum(neurons for _, neurons in counts)

    def _single(self, layer: int, token: int) -> tuple[int, int]:
        board, owned = self._board, self._groups(layer)
        hidden, index = board.sizes.hidden, self._plan.index
        own = slice(token * hidden, (token + 1) * hidden)
        x, out = board.x[None, own], board.y[index][None, own]
        requested = board.requested[index][token, layer]
        requested[:] = 0
        out[:] = 0
        gates = neurons = 0
        for branch, groups, slots in owned.branches:
            weight = board.routing[token, branch] if branch else np.float32(1)
            if weight == 0:
                continue
            inverse = board.inverse[token : token + 1] * weight
            mask = board.mask[token, layer, groups] if self._selector.masked else None
            computed = np.zeros(len(groups), np.uint32)
            part = out if len(owned.branches) == 1 else np.empty_like(out)
            neurons += self._device.execute(slots, x, inverse, self._sparse, part, mask, computed)[0]
            if part is not out:
                out += part
            requested[groups] = 0xFFFFFFFF if mask is None else mask
            board.computed[token, layer, groups] = computed
        gates = int(np.bitwise_count(requested).sum())
        if board.descriptor[COMPARE_SELECTION] != 0 and self._selector.masked:
            inverse = board.inverse[token : token + 1]
            fired, _ = self._device.execute(owned.slots, x, inverse, True, np.empty_like(out))
            self._compared += (1, gates, fired, neurons)
        return gates, neurons

    def _several(self, layer: int, tokens: int) -> tuple[int, int]:
        board = self._board
        shape = (whole_panels(tokens) // LANES, board.sizes.hidden, LANES)
        x = board.x[: math.prod(shape)].reshape(shape)
        y = board.y[self._plan.index][: math.prod(shape)].reshape(shape)
        y[:] = 0
        rows, neurons = x.swapaxes(1, 2).reshape(-1, shape[1]), 0
        for branch, _, slots in self._groups(layer).branches:
            inverse = board.inverse[: whole_panels(tokens)]
            if branch == 0:
                part = np.empty_like(y)
                neurons += self._device.execute_many(slots, x, inverse, tokens, part)[0]
                y += part
                continue
            users = np.flatnonzero(board.routing[:tokens, branch])
            if len(users):
                weights = np.pad(inverse[users] * board.routing[users, branch], (0, -len(users) % LANES))
                own = _in_panels(rows[users])
                part = np.empty(own.shape, np.int64)
                neurons += self._device.execute_many(slots, own, weights, len(users), part)[0]
                y[users // LANES, :, users % LANES] += part.swapaxes(1, 2).reshape(-1, shape[1])[: len(users)]
        return neurons, neurons

    def _note(self, layer: int, decoded: int, started: int, ended: int, gates: int, neurons: int) -> None:
        """`decoded`: tokens of a batch, else 0."""
        layout = self._model.layout
        read = gates * layout.gate_bytes + neurons * layout.rest_bytes
        self._board.record[self._plan.index][:] = (started, ended, neurons, read)
        if decoded == 1:
            self._busy[layer] += (ended - int(self._board.descriptor[ANNOUNCED_NS]), neurons, read)
            self._jobs += 1

    def move(self, places: Places) -> int:
        """Read groups into slots of the device, a batch at a time; returns the ns of work that it took."""
        took = 0
        for first in range(0, len(places), self._device.batch):
            batch, started = places[first : first + self._device.batch], time.thread_time_ns()
            staged, at = self._device.staging(len(batch)), 0
            while at < len(batch):
                run = run_of(batch[at:, :2].astype(np.int64))
                self._model.read_groups(int(batch[at, 0]), int(batch[at, 1]), staged[at : at + run])
                at += run
            took += time.thread_time_ns() - started
            took += self._device.fill(np.ascontiguousarray(batch[:, 2]), staged)
        return took

    def progress(self) -> tuple[int, int]:
        """Nothing is loaded before it is ready."""
        return 0, 0

    def ready(self) -> bool:
        """Whether the thread serves the board; raises its error if it failed."""
        if self._error is not None:
            raise self._error
        return self._serving.is_set()

    def capacity(self) -> tuple[int, dict[str, int]]:
        """Slots, and bytes of device memory by purpose."""
        return self._slots, self._device.allocated()

    def report(self) -> LoadReport:
        """Work on single tokens so far, by layer."""
        busy, neurons, read = self._busy.T.tolist()
        return LoadReport(self._jobs, busy, neurons, read, self._compared.tolist())

    def stop(self) -> None:
        """Join the thread, whose `quit` word is set, and free the device."""
        self._thread.join()
        self._device.close()
        self._model.close()


def _in_panels(rows: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """Inputs [n, hidden] in panels [n / 16, hidden, 16], with zeros behind them."""
    whole = np.pad(rows, ((0, -len(rows) % LANES), (0, 0)))
    return np.ascontiguousarray(whole.reshape(-1, LANES, rows.shape[1]).swapaxes(1, 2))
