"""Teams of both kinds, and workers for them that are a simple function of x."""

import shutil
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from warmfront.coordinator.decode.team_config import Place, TeamConfig
from warmfront.coordinator.decode.thread_team import ThreadTeam
from warmfront.coordinator.decode.torch_team import TorchTeam
from warmfront.coordinator.packing.packer import ensure_packed
from warmfront.shared.machine.core_plan import CorePlan, WorkerCores
from warmfront.shared.machine.memory import address, zeros
from warmfront.shared.model.branches import branches_of
from warmfront.shared.model.formats import Kind
from warmfront.shared.model.kv_layout import pages_of
from warmfront.shared.model.store import PackedModel
from warmfront.shared.selector import ALL
from warmfront.shared.wire.board import QUIT, Board, BoardSizes
from warmfront.shared.wire.handoff import DONE, announce, await_sequence

CONTEXT, MAX_TOKENS = 128, 80
RNG = np.random.default_rng(3)
# A prompt in two parts, the second behind the first, then tokens one by one.
JOBS = [RNG.integers(3, 290, count).tolist() for count in (70, 17, 1, 1, 1)]


def packed(folder: Path, dtype: str = "f32") -> PackedModel:
    return PackedModel(ensure_packed(folder, dtype, lambda line: None, lambda done, total: None))


def with_predictors(folder: Path, made: Path, **metadata: str) -> Path:
    """A copy of a model with random predictors of two sizes."""
    shutil.copytree(folder, made)
    tensors = {}
    for layer, rank in enumerate((24, 40)):
        tensors[f"layers.{layer}.fc1.weight"] = RNG.normal(size=(rank, 64)).astype(np.float32)
        tensors[f"layers.{layer}.fc2.weight"] = RNG.normal(size=(200, rank)).astype(np.float32)
    save_file(tensors, made / "predictor.safetensors", metadata)
    return made


class Workers:
    """Two workers whose parts are tanh(x) / 2 and x / -5, in threads; what was asked of them is kept."""

    def __init__(self, model: PackedModel) -> None:
        spec = model.spec
        branches = len(branches_of(spec))
        sizes = BoardSizes(2, spec.layers, model.layout.groups, spec.hidden, MAX_TOKENS, branches=branches)
        self.board = Board.create(zeros(sizes.total, np.uint8), sizes)
        self.dead = np.zeros(2, np.int64)
        self.asked: list[tuple[list[int], np.ndarray, np.ndarray]] = []
        self.silent = False
        self._threads = [threading.Thread(target=self._live, args=(worker,), daemon=True) for worker in range(2)]
        for thread in self._threads:
            thread.start()

    def _live(self, worker: int) -> None:
        board, sequence = self.board, 0
        while True:
            sequence += 1
            if await_sequence(address(board.job), sequence, address(board.quit[worker]), 0, 0) != DONE:
                return
            layer, tokens, lanes, _ = descriptor = board.descriptor[:4].tolist()
            if layer == QUIT:
                return
            count = -(-tokens // lanes) * lanes * board.sizes.hidden
            x = board.x[:count]
            if worker == 0:
                rows = x.reshape(-1, board.sizes.hidden, lanes).swapaxes(1, 2).reshape(-1, board.sizes.hidden)
                self.asked.append((descriptor, rows[:tokens].copy(), board.mask[0, layer].copy()))
            if worker == 1 and self.silent:
                self.dead[1] = 1
                return
            part = (np.tanh(x) / 2 if worker == 0 else x / -5).reshape(-1, board.sizes.hidden, lanes)
            inverse = board.inverse[: -(-tokens // lanes) * lanes].reshape(-1, 1, lanes).astype(np.float64)
            board.y[worker][:count] = np.rint(part * inverse).astype(np.int64).reshape(-1)
            board.record[worker][:2] = time.monotonic_ns()
            announce(address(board.done[worker]), sequence)

    def end(self) -> None:
        for word in self.board.quit:
            word[0] = 1
        for thread in self._threads:
            thread.join()


def team_config(model: PackedModel, **options: Any) -> TeamConfig:
    """One thread, on cpu 0, with the KV cache that the engine would choose."""
    kind = Kind.F32 if model.entries["embed"].kind == Kind.F32 else Kind.F16
    plan = CorePlan((WorkerCores(0, (0,)),))
    return TeamConfig(**({"cores": plan, "context": CONTEXT, "cache_kind": kind, "selector": ALL} | options))


def opened(model: PackedModel, workers: Workers, kind: str, **options: Any) -> Any:
    """A team, loaded: "compiled", of one thread, or on a device of torch's."""
    team: Any
    if kind == "compiled":
        team = ThreadTeam(model, workers.board, workers.dead, team_config(model, **options))
    else:
        config = team_config(model, device=kind, **options)
        team = TorchTeam(model, workers.board, workers.dead, config)
    team.start()
    while not team.ready():
        time.sleep(0.01)
    assert team.progress()[0] > 0
    return team


def place(position: int) -> Place:
    """In a text that is alone in the cache."""
    return Place(position, np.arange(pages_of(CONTEXT)))


def asked_and_said(
    model: PackedModel, kind: str, jobs: Sequence[list[int]] = JOBS, **options: Any
) -> tuple[Any, np.ndarray]:
    """What the workers were asked in `jobs`, and the logits after each."""
    workers, position, logits = Workers(model), 0, []
    team = opened(model, workers, kind, **options)
    for tokens in jobs:
        single = len(tokens) == 1
        assert team.run(tokens, [place(position)], True, decode=single, compare_selection=single) == DONE
        position += len(tokens)
        logits.append(team.logits[0].copy())
    team.stop()
    workers.end()
    return workers.asked, np.array(logits)
