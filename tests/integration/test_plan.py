"""`warmfront plan` from end to end on the emulated GPU, and a run by its plan.

pytest tests/integration/test_plan.py
"""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from tests.integration.command import assert_refused, prepack, run, run_anew
from warmfront.coordinator import Engine
from warmfront.coordinator.measure.measured_costs import key_of, load_costs, measure_costs, save_costs
from warmfront.coordinator.packing.packer import ensure_packed
from warmfront.coordinator.placement.plan_file import read_plan
from warmfront.coordinator.placement.solver import DeviceCosts
from warmfront.shared.model.store import PackedModel

pytestmark = pytest.mark.usefixtures("compiled")

HOST = ["--gpu", "host", "--vram-budget", "2MB"]


@pytest.fixture(scope="module")
def model(compiled: None, tiny_llama: Callable[..., Path]) -> Path:
    """Four layers of eight groups of 24,576 bytes, profiled."""
    path = prepack(tiny_llama(hidden_act="relu", intermediate_size=256, num_hidden_layers=4))
    assert run("generate", "-m", path, "-p", "x", "-n", "1").code == 0
    return path


def keep_costs(model: Path, costs: DeviceCosts) -> None:
    """Have this machine's workers known to take so long."""
    with Engine.load(str(model), gpu="host", vram_budget=2_000_000) as engine:
        save_costs(key_of(engine), costs)


def groups_of(path: Path, model: Path) -> np.ndarray:
    """The plan at `path` as the engine reads it."""
    with PackedModel(ensure_packed(model, "auto", print, lambda *_: None)) as packed:
        return read_plan(path, packed)


def test_the_workers_are_measured_once(model: Path, tmp_path: Path) -> None:
    with Engine.load(str(model), gpu="host", vram_budget=2_000_000, policy="static") as engine:
        key, before = key_of(engine), engine.ownership.owners()
        assert (before == 1).any()
        costs = measure_costs(engine)
        np.testing.assert_array_equal(engine.ownership.owners(), before)
    assert all(np.isfinite(costs))
    assert min(costs) >= 0
    assert costs.cpu_job_ns + costs.cpu_byte_ns > 0
    key.path.unlink(missing_ok=True)
    for said in (True, False):
        outcome = run("plan", model, *HOST, "-o", "some.json", cwd=tmp_path)
        assert outcome.code == 0, outcome
        assert ("measuring the workers" in outcome.err) == said
        assert outcome.err.endswith("the plan is in some.json\n")
    assert load_costs(key) is not None


def test_a_plan_and_a_run_by_it(model: Path, tmp_path: Path) -> None:
    """Costs with which the GPU pays for a part of the neurons: the run gives it just these."""
    keep_costs(model, DeviceCosts(1000, 0.1, 3000, 0.05))
    outcome = run_anew("plan", model, *HOST, "--json", "--exact", "--plot", "plan.png", cwd=tmp_path)
    assert outcome.code == 0, outcome
    figures = json.loads(outcome.out)
    path = tmp_path / figures["file"]
    gpu = groups_of(path, model)
    assert 0 < figures["groups"] == gpu.sum() < gpu.size
    assert (1 - 1e-4) * figures["exact"]["ns"] <= figures["plan_ns"] < figures["cpu_ns"]
    assert sum(figures["ledger"].values()) + figures["left_bytes"] == 2_000_000
    assert json.loads(path.read_text())["figures"]["plan_ns"] == figures["plan_ns"]
    assert (tmp_path / "plan.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(entry.name for entry in tmp_path.iterdir()) == sorted(["plan.png", path.name])

    answers = {}
    for name, options in {"plain": ["--gpu", "none"], "planned": [*HOST, "--policy", "static", "--plan", path]}.items():
        outcome = run("generate", "-m", model, "-p", "The sea", "-n", "12", "--json", *options)
        assert outcome.code == 0, outcome
        answers[name] = json.loads(outcome.out)
    assert answers["planned"]["token_ids"] == answers["plain"]["token_ids"]
    assert answers["planned"]["workers"][-1]["groups"] == gpu.sum()


def test_a_gpu_that_does_not_pay(model: Path, tmp_path: Path) -> None:
    keep_costs(model, DeviceCosts(1000, 0.1, 1e9, 0.05))
    outcome = run("plan", model, *HOST, cwd=tmp_path)
    assert outcome.code == 0, outcome
    assert "nothing pays on this GPU" in outcome.out
    (path,) = tmp_path.iterdir()
    assert path.name.endswith(".plan.json")
    assert not groups_of(path, model).any()


def test_plans_that_cannot_be(model: Path, tmp_path: Path) -> None:
    small = run("plan", model, "--gpu", "host", "--vram-budget", "1KB", cwd=tmp_path)
    assert_refused(small, 2, "holds no group", "larger --vram-budget")
    assert_refused(run("plan", "absent", *HOST, cwd=tmp_path), 1, "no such model")
    assert list(tmp_path.iterdir()) == []
