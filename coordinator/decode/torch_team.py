"""The coordinator's part of the model on a torch device, with the methods of the team of threads (`thread_team.py`).

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

from warmfront.coordinator.decode.network import LOST, STEPS, WORKER_PATIENCE_NS
from warmfront.coordinator.decode.router import choose_experts, router_of, use_dense, write_mask
from warmfront.coordinator.decode.team_config import Place, TeamConfig
from warmfront.coordinator.decode.torch_network import TorchNetwork
from warmfront.shared.errors import ResourceError, WorkerError
from warmfront.shared.kernels.exact_sums import inverse_unit
from warmfront.shared.machine.memory import address
from warmfront.shared.machine.process import hold_interrupts
from warmfront.shared.model.panels import LANES, whole_panels
from warmfront.shared.model.store import PackedModel
from warmfront.shared.selector import Source
from warmfront.shared.wire.board import LAYER, QUIT, Board
from warmfront.shared.wire.handoff import ABORTED, DONE, HANDOFF_SPINS, LATE, announce, await_sequence

__all__ = ["TorchTeam"]


class TorchTeam:
    """Runs tokens through the model. Make it, `start()` it, wait for `ready()`, then `run()` jobs one at a time."""

    def __init__(self, model: PackedModel, board: Board, dead: npt.NDArray[np.int64], config: TeamConfig) -> None:
        """See `ThreadTeam`."""
        self._model, self._board, self._dead = model, board, dead
        self._device, self._threads = config.device, len(config.cores.coordinator)
        self._predicts, self._look_ahead = Source.LOWRANK in config.selector.sources, config.look_ahead
        self._spoiled = False
        self.present: npt.NDArray[np.int64] = np.ones(len(dead), np.int64)
        self.logits: npt.NDArray[np.float32] = np.zeros((1, model.spec.vocab), np.float32)
        self._router = router_of(model.spec)
        names = [f"layers.{layer}.correction.bias" for layer in range(model.spec.layers)]
        self._corrections = [model.floats(n) if n in model.entries else np.zeros(0, np.float32) for n in names]
        self._network = TorchNetwork(
            model, config.device, config.context, config.cache_kind, config.selector, config.texts
        )
        self._times = np.zeros((model.spec.layers, len(STEPS)), np.int64)
        self._spans = np.zeros((model.spec.layers, len(dead), 2), np.int64)
        self._uses = np.zeros((model.spec.layers, board.sizes.branches), np.int64)
        self._captured: list[npt.NDArray[np.float32]] = []
        self._residual = torch.empty(0)
        self._posted, self._lanes = 0, 1  # the last job's; see `shared/model/panels.py`
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
            self._synchronise()
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

    def spoiled(self) -> list[tuple[int, int]]:
        """As `ThreadTeam.spoiled`; which keys and values of the text are to blame is not known."""
        return [(0, 0)] if self._spoiled else []

    def scrub(self, table: npt.NDArray[np.int64], first: int, end: int) -> None:
        """As `ThreadTeam.scrub`: rows that are not of a text are never read."""

    def run(
        self,
        tokens: Sequence[int],
        places: Sequence[Place],
        want_logits: bool,
        *,
        decode: bool = False,
        compare_selection: bool = False,
        capture: bool = False,
    ) -> int:
        """As `ThreadTeam.run`, but for batches of one token only: returns DONE, ABORTED or LOST."""
        assert not decode or len(tokens) == 1
        self._lanes, self._spoiled = 1 if decode else LANES, False
        try:
            with hold_interrupts(), torch.inference_mode():
                return self._forward(tokens, places[0], want_logits, compare_selection, capture)
        except RuntimeError as error:
            raise self._explained(error) from error

    def _explained(self, error: RuntimeError) -> ResourceError:
        """An error of torch or of its device, as one line."""
        if isinstance(error, torch.OutOfMemoryError):
            return ResourceError(
                f"attention on {self._device} has not enough memory: pass a smaller --ctx or --vram-budget, or "
                "--attention cpu"
            )
        return ResourceError(f"attention on {self._device} failed: {str(error).strip().partition(chr(10))[0]}")

    def _forward(self, tokens: Sequence[int], place: Place, want_logits: bool, compare: bool, capture: bool) -> int:
        network, layers = self._network, self._model.spec.layers
        predicts = self._predicts and self._lanes == 1
        x = network.embed(torch.tensor(tokens), place.position)
        self._captured = []
        for layer in range(layers):
            self._note(layer, "start")
            before = x
            x, read, normed = network.add_attention(layer, x, place)
            for step in ("qkv", "attention", "output"):
                self._note(layer, step)
            if self._router.experts:
                scored = before if self._router.early else normed
                self._route(layer, network.expert_scores(layer, scored), len(tokens))
            if predicts and (layer == 0 or not self._look_ahead):
                self._write_mask(layer, network.predict(layer, read, normed, self._used()))
            self._note(layer, "predictor")
            self._post(layer, normed, compare)
            self._note(layer, "post")
            if capture:
                self._captured.append(normed.cpu().numpy())
            if predicts and self._look_ahead and layer + 1 < layers:
                self._write_mask(layer + 1, network.predict(layer + 1, read, normed, self._used()))
            result = self._await_workers()
            if result != DONE:
                return result
            routing = torch.from_numpy(self._board.routing[: len(x)]) if self._router.experts else None
            x = network.add_feed_forward(layer, x, self._merged(x), routing)
            self._note(layer, "merge")
            self._spans[layer] = [record[:2] for record in self._board.record]
        self._residual = x
        if want_logits:
            torch.from_numpy(self.logits[0]).copy_(network.logits(x))
            self._spoiled = not np.isfinite(self.logits).all()
        return DONE

    def _note(self, layer: int, step: str) -> None:
        self._times[layer, STEPS.index(step)] = time.monotonic_ns()

    def _used(self) -> list[int]:
        """The predictors that a single token needs."""
        if not self._router.experts:
            return [0]
        numbers: list[int] = np.flatnonzero(self._board.routing[0, 1 : 1 + self._router.experts]).tolist()
        return numbers

    def _write_mask(self, layer: int, words: Tensor) -> None:
        self._from_device(self._board.mask[0, layer].view(np.int32), words)

    def _route(self, layer: int, scored: Tensor | None, tokens: int) -> None:
        """Write the weights of each token's branches, and for a single one the mask, by its scores [n, rows]; None: the
        layer has no experts."""
        scores = None if scored is None else scored.cpu().numpy()
        for token, weights in enumerate(self._board.routing[:tokens]):
            if scores is None:
                use_dense(self._router, weights)
            else:
                choose_experts(self._router, scores[token], self._corrections[layer], weights)
        self._uses[layer] += np.count_nonzero(self._board.routing[:tokens], axis=0)
        if self._lanes == 1:
            board = self._board
            write_mask(self._router, board.routing[0], board.mask[0, layer], board.uses[0, layer])

    def _post(self, layer: int, normed: Tensor, compare_selection: bool) -> None:
        """Write the job on the board, wait for the device, announce."""
        board, tokens, lanes = self._board, len(normed), self._lanes
        if lanes > 1:
            padded = torch.nn.functional.pad(normed, (0, 0, 0, whole_panels(tokens) - tokens))
            normed = padded.view(-1, LANES, normed.shape[1]).transpose(1, 2).contiguous()
        self._from_device(board.x[: normed.numel()], normed.flatten())
        self._synchronise()
        values = board.x[: normed.numel()].reshape(-1, normed.shape[-2] if lanes > 1 else normed.shape[-1], lanes)
        feed_forward = self._model.spec.architecture.feed_forward
        magnitudes = np.abs(values).sum(1, dtype=np.float64).reshape(-1) + bool(feed_forward.neuron_biases)
        reach, degree = self._model.reach[layer], feed_forward.degree
        board.inverse[: len(magnitudes)] = [inverse_unit(reach, degree, float(m)) for m in magnitudes]
        board.descriptor[:] = layer, tokens, lanes, compare_selection, time.monotonic_ns()
        self._posted += 1
        announce(address(board.job), self._posted)

    def _await_workers(self) -> int:
        """Wait for every worker; returns LOST if one has died, ABORTED if the board was."""
        board, deadline, lost = self._board, time.monotonic_ns() + WORKER_PATIENCE_NS, False
        for worker in np.flatnonzero(self.present):
            dead_at = address(self._dead) + 8 * int(worker)
            result = await_sequence(address(board.done[worker]), self._posted, dead_at, HANDOFF_SPINS, deadline)
            if result == LATE:
                raise WorkerError("a worker did not answer for two minutes")
            if result == ABORTED and board.abort[0] != 0:
                return ABORTED
            lost = lost or result == ABORTED
        return LOST if lost else DONE

    def _merged(self, x: Tensor) -> Tensor:
        """The workers' parts of the residual's shape added up: as integers, which is exact, then rounded once."""
        (tokens, hidden), lanes = x.shape, self._lanes
        panels = -(-tokens // lanes)
        parts = [self._board.y[worker][: panels * hidden * lanes] for worker in np.flatnonzero(self.present)]
        total = torch.zeros(panels * hidden * lanes, dtype=torch.int64, device=x.device)
        for part in parts:
            total += torch.from_numpy(part).to(x.device, non_blocking=self._pinned)
        whole = total.view(panels, hidden, lanes).transpose(1, 2).reshape(-1, hidden)[:tokens]
        inverse = torch.from_numpy(self._board.inverse[:tokens].astype(np.float64)).to(x.device)
        return (whole / inverse[:, None]).float()

    def _from_device(self, to: npt.NDArray[Any], values: Tensor) -> None:
        torch.from_numpy(to).copy_(values, non_blocking=self._pinned)

    def _synchronise(self) -> None:
        """Wait until what was enqueued is done."""
        if self._device != "cpu":
            torch.cuda.current_stream(self._device).synchronize()

    def times(self) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """As `ThreadTeam.times`: of the last job, ns on the monotonic clock."""
        return self._times, self._spans

    def uses(self) -> npt.NDArray[np.int64]:
        """As `ThreadTeam.uses`."""
        return self._uses

    def captured(self, tokens: int) -> npt.NDArray[np.float32]:
        """The feed-forward inputs of the last job, run with `capture`: float32 [layers, tokens, hidden]."""
        return np.stack(self._captured)[:, :tokens]

    def residual(self, tokens: int) -> npt.NDArray[np.float32]:
        """As `ThreadTeam.residual`."""
        residual: npt.NDArray[np.float32] = self._residual[:tokens].cpu().numpy()
        return residual

    def stop(self) -> None:
        """Tell the workers to quit their loops; harmless after an abort."""
        self._stopping = True
        if self._loader.ident is not None:
            self._loader.join()
        if self._serving.is_set():
            self._board.descriptor[LAYER] = QUIT
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
