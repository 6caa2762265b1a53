"""The coordinator's part of the model on a torch device: what `team.py` does on the CPU's cores, with the same methods.

    embedding; per layer: attention, norm, predictor on the device -> x and mask copied to the board, one wait for the
    device -> the job announced -> the workers' parts copied to the device and added there; logits

Everything runs in the caller's thread. The board is pinned for CUDA where that is allowed, so that copies from and to
it need no staging. The times noted are the host's: attention is one step, and up to `predictor` they say when work was
enqueued; `post` is when it was done.
"""

import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from warmfront.coordinator.decode.network import LOST, STEPS
from warmfront.coordinator.decode.torch_network import TorchNetwork
from warmfront.shared.errors import ResourceError, WorkerError
from warmfront.shared.machine.memory import address
from warmfront.shared.machine.process import hold_interrupts
from warmfront.shared.model.store import PackedModel
from warmfront.shared.wire.board import LANES, LEAVE, Board
from warmfront.shared.wire.handoff import ABORTED, DONE, HANDOFF_SPINS, LATE, announce, await_sequence

__all__ = ["TorchTeam"]

# As in forward.py: a worker that takes longer for one layer is taken for lost.
_WORKER_PATIENCE_NS = 120_000_000_000


class TorchTeam:
    """Runs tokens through the model. Make it, `start()` it, wait for `ready()`, then `run()` jobs one at a time."""

    def __init__(
        self,
        model: PackedModel,
        board: Board,
        gone: npt.NDArray[np.int64],
        device: str,
        cpus: Sequence[int],
        context: int,
        selector: str,
        ahead: bool,
    ) -> None:
        """`device`: as torch calls it; "cpu" emulates one, a thread for each of `cpus`. The rest: see `ThreadTeam`."""
        self._model, self._board, self._gone = model, board, gone
        self._device, self._threads = device, len(cpus)
        self._predicts, self._ahead = selector == "lowrank", ahead
        self.clean = self._context = context
        self.present: npt.NDArray[np.int64] = np.ones(len(gone), np.int64)
        self.logits: npt.NDArray[np.float32] = np.zeros(model.spec.vocab, np.float32)
        self._network = TorchNetwork(model, device, context, selector)
        self._times = np.zeros((model.spec.layers, len(STEPS)), np.int64)
        self._spans = np.zeros((model.spec.layers, len(gone), 2), np.int64)
        self._captured: list[npt.NDArray[np.float32]] = []
        self._posted = 0
        self._pinned = self._stopping = False
        self._error: BaseException | None = None
        self._serving = threading.Event()
        self._loader = threading.Thread(target=self._load, name="wf-torch", daemon=True)

    @property
    def nbytes(self) -> int:
        """Bytes of the packed weights that the coordinator holds."""
        return self._network.total

    def start(self) -> None:
        """Begin to load."""
        self._loader.start()

    def _load(self) -> None:
        try:
            if self._device == "cpu":
                torch.set_num_threads(self._threads)
            else:
                self._pinned = self._register()
            self._network.load(lambda: not self._stopping)
            self._settle()
            self._serving.set()
        except RuntimeError as error:
            self._error = self._explained(error)
        except BaseException as error:
            self._error = error

    def progress(self) -> tuple[int, int]:
        """Bytes of packed weights loaded, of how many."""
        return self._network.loaded, self._network.total

    def ready(self) -> bool:
        """Whether it takes jobs; raises the error of loading if it failed."""
        if self._error is not None:
            raise self._error
        return self._serving.is_set()

    def check(self) -> None:
        """As `ThreadTeam.check`: jobs run in the caller's thread, so no other can be lost."""

    def forget(self, position: int) -> None:
        """What the KV cache holds from `position` on is not of the text any more; only what is of it is ever read."""
        if position <= self.clean:
            self.clean = self._context

    def run(
        self, tokens: Sequence[int], position: int, want_logits: bool, *, measure: bool = False, capture: bool = False
    ) -> int:
        """As `ThreadTeam.run`: returns DONE, ABORTED or LOST."""
        try:
            with hold_interrupts(), torch.inference_mode():
                return self._forward(tokens, position, want_logits, measure, capture)
        except RuntimeError as error:
            raise self._explained(error) from error

    def _explained(self, error: RuntimeError) -> ResourceError:
        """An error of torch or of its device as one line of ours."""
        if isinstance(error, torch.OutOfMemoryError):
            return ResourceError(
                f"attention on {self._device} has not enough memory: pass a smaller --ctx or --vram-budget, or "
                "--attention cpu"
            )
        return ResourceError(f"attention on {self._device} failed: {str(error).strip().partition(chr(10))[0]}")

    def _forward(self, tokens: Sequence[int], position: int, want_logits: bool, measure: bool, capture: bool) -> int:
        network, layers = self._network, self._model.spec.layers
        predicts = self._predicts and len(tokens) == 1
        x = network.embed(torch.tensor(tokens))
        self._captured = []
        for layer in range(layers):
            self._note(layer, "start")
            x = network.attend(layer, x, position)
            for step in ("qkv", "attention", "output"):
                self._note(layer, step)
            normed = network.feed_forward_input(layer, x)
            if predicts and (layer == 0 or not self._ahead):
                self._write_mask(layer, network.predict(layer, x, normed))
            self._note(layer, "predictor")
            self._post(layer, normed, measure)
            self._note(layer, "post")
            if capture:
                self._captured.append(normed.cpu().numpy())
            if predicts and self._ahead and layer + 1 < layers:
                self._write_mask(layer + 1, network.predict(layer + 1, x, normed))
            result = self._await_workers()
            if result != DONE:
                return result
            x = self._merged(x)
            self._note(layer, "merge")
            self._spans[layer] = [record[:2] for record in self._board.record]
        if want_logits:
            torch.from_numpy(self.logits).copy_(network.logits(x))
            if not np.isfinite(self.logits).all():
                self.clean = 0  # which keys and values are to blame is not known
        return DONE

    def _note(self, layer: int, step: str) -> None:
        self._times[layer, STEPS.index(step)] = time.monotonic_ns()

    def _write_mask(self, layer: int, words: Tensor) -> None:
        self._from_device(self._board.mask[layer].view(np.int32), words)

    def _post(self, layer: int, normed: Tensor, measure: bool) -> None:
        """Write the job on the board, wait for the device, announce."""
        board, tokens = self._board, len(normed)
        lanes = 1 if tokens == 1 else LANES
        if lanes > 1:
            panels = -(-tokens // LANES)
            padded = torch.nn.functional.pad(normed, (0, 0, 0, panels * LANES - tokens))
            normed = padded.view(panels, LANES, -1).transpose(1, 2).contiguous()
        self._from_device(board.x[: normed.numel()], normed.flatten())
        self._settle()
        board.order[:] = layer, tokens, lanes, measure, time.monotonic_ns()
        self._posted += 1
        announce(address(board.job), self._posted)

    def _await_workers(self) -> int:
        """Until every worker has answered; LOST if one has died, ABORTED if all is over."""
        board, deadline, lost = self._board, time.monotonic_ns() + _WORKER_PATIENCE_NS, False
        for worker in np.flatnonzero(self.present):
            gone_at = address(self._gone) + 8 * int(worker)
            result = await_sequence(address(board.done[worker]), self._posted, gone_at, HANDOFF_SPINS, deadline)
            if result == LATE:
                raise WorkerError("a worker did not answer for two minutes")
            if result == ABORTED and board.abort[0] != 0:
                return ABORTED
            lost = lost or result == ABORTED
        return LOST if lost else DONE

    def _merged(self, x: Tensor) -> Tensor:
        """The residual with the workers' parts added, in fixed order."""
        tokens, hidden = x.shape
        lanes = 1 if tokens == 1 else LANES
        panels = -(-tokens // lanes)
        for worker in np.flatnonzero(self.present):
            part = torch.from_numpy(self._board.y[worker][: panels * hidden * lanes])
            part = part.to(x.device, non_blocking=self._pinned).view(panels, hidden, lanes)
            x = x + part.transpose(1, 2).reshape(-1, hidden)[:tokens]
        return x

    def _from_device(self, to: npt.NDArray[Any], values: Tensor) -> None:
        torch.from_numpy(to).copy_(values, non_blocking=self._pinned)

    def _settle(self) -> None:
        """Wait until what was enqueued is done."""
        if self._device != "cpu":
            torch.cuda.current_stream(self._device).synchronize()

    def times(self) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """As `ThreadTeam.times`: of the last job, ns on the monotonic clock."""
        return self._times, self._spans

    def captured(self, tokens: int) -> npt.NDArray[np.float32]:
        """The feed-forward inputs of the last job, run with `capture`: float32 [layers, tokens, hidden]."""
        return np.stack(self._captured)[:, :tokens]

    def stop(self) -> None:
        """Tell the workers to leave their loops; harmless after an abort."""
        self._stopping = True
        if self._loader.ident is not None:
            self._loader.join()
        if self._serving.is_set():
            self._board.order[0] = LEAVE
            self._posted += 1
            announce(address(self._board.job), self._posted)
            if self._pinned:
                _cudart().cudaHostUnregister(address(self._board.mapping))
                self._pinned = False

    def _register(self) -> bool:
        """Pin the board for CUDA; False where that is not allowed."""
        mapping = self._board.mapping
        with torch.cuda.device(self._device):
            if int(_cudart().cudaHostRegister(address(mapping), mapping.nbytes, 0)) == 0:
                return True
            with suppress(RuntimeError):  # torch would take the failure for its next kernel's
                torch.zeros(1, device=self._device)
            return False


def _cudart() -> Any:
    return torch.cuda.cudart()  # type: ignore[no-untyped-call]
