"""Both kinds of teams when a worker dies, all is aborted, or loading fails.

Run: pytest tests/coordinator/decode/test_team_faults.py
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.coordinator.decode.teams import JOBS, Workers, opened, packed, place, team_config
from warmfront.coordinator.decode.network import LOST
from warmfront.coordinator.decode.torch_team import TorchTeam
from warmfront.shared.errors import ModelError, ResourceError, WorkerError
from warmfront.shared.model.store import PackedModel
from warmfront.shared.wire.handoff import ABORTED, DONE, LATE

MakeLlama = Callable[..., Path]


def test_a_lost_worker(tiny_llama: MakeLlama) -> None:
    """The job ends, is run again without it, and says what the compiled team says."""
    said = {}
    with packed(tiny_llama()) as model:
        for kind in ("compiled", "cpu"):
            workers = Workers(model)
            workers.silent = True
            team = opened(model, workers, kind)
            assert team.run(JOBS[0], [place(0)], True) == LOST
            team.present[1] = 0
            assert team.run(JOBS[0], [place(0)], True) == DONE
            assert team.run(JOBS[2], [place(len(JOBS[0]))], True, decode=True) == DONE
            said[kind] = team.logits[0].copy()
            team.stop()
            workers.end()
    np.testing.assert_allclose(said["cpu"], said["compiled"], atol=2e-5 * np.abs(said["compiled"]).max())


def test_an_abort(tiny_llama: MakeLlama) -> None:
    with packed(tiny_llama()) as model:
        workers = Workers(model)
        team = opened(model, workers, "cpu")
        workers.end()
        workers.board.abort[0] = 1
        workers.dead[:] = 1
        assert team.run([5], [place(0)], True) == ABORTED
        team.stop()


def test_a_worker_that_does_not_answer(tiny_llama: MakeLlama, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("warmfront.coordinator.decode.torch_team.WORKER_PATIENCE_NS", 10_000_000)
    with packed(tiny_llama()) as model:
        workers = Workers(model)
        team = opened(model, workers, "cpu")
        workers.end()
        with pytest.raises(WorkerError, match="a worker did not answer for two minutes"):
            team.run([5], [place(0)], True)
        team.stop()


def test_after_a_worker_was_late_nobody_waits_again(tiny_llama: MakeLlama, monkeypatch: pytest.MonkeyPatch) -> None:
    """The compiled team's threads have ended by then: a job would never be done."""
    with packed(tiny_llama()) as model:
        workers = Workers(model)
        team = opened(model, workers, "compiled")
        assert team.run([5], [place(0)], True) == DONE

        def late(*_arguments: int) -> int:
            team._state.status[:] = LATE
            return DONE

        monkeypatch.setattr("warmfront.coordinator.decode.thread_team.await_sequence", late)
        with pytest.raises(WorkerError, match="a worker did not answer for two minutes"):
            team.run([6], [place(1)], True)
        monkeypatch.undo()
        with pytest.raises(WorkerError, match="a worker did not answer for two minutes"):
            team.run([6], [place(1)], True)
        workers.end()
        team.stop()


def test_stopped_before_it_has_loaded(tiny_llama: MakeLlama) -> None:
    """No job was announced, nobody is told to quit."""
    with packed(tiny_llama()) as model:
        workers = Workers(model)
        idle = TorchTeam(model, workers.board, workers.dead, team_config(model))
        idle.stop()
        assert workers.board.job[0] == 0
        workers.end()


def errors_of_loading(model: PackedModel, error: BaseException, monkeypatch: pytest.MonkeyPatch) -> Any:
    def fail(*_arguments: object) -> None:
        raise error

    workers = Workers(model)
    monkeypatch.setattr(model, "read_into", fail)
    with pytest.raises((ModelError, ResourceError)) as caught:
        opened(model, workers, "cpu")
    workers.end()
    return caught.value


def test_errors_of_loading(tiny_llama: MakeLlama, monkeypatch: pytest.MonkeyPatch) -> None:
    with packed(tiny_llama()) as model:
        assert str(errors_of_loading(model, ModelError("truncated"), monkeypatch)) == "truncated"
        error = errors_of_loading(model, RuntimeError("CUDA error: no luck\nCompile with"), monkeypatch)
        assert str(error) == "attention on cpu failed: CUDA error: no luck"
        error = errors_of_loading(model, torch.OutOfMemoryError("CUDA out of memory. Tried to"), monkeypatch)
        assert str(error) == (
            "attention on cpu has not enough memory: pass a smaller --ctx or --vram-budget, or --attention cpu"
        )
