"""Numbers of threads, forced and tuned: the tokens stay the same.  pytest tests/integration/test_threads.py"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.integration.command import CORES, assert_refused, needs_two_cores, prepack, run, run_anew
from tests.integration.reference import choices, llama_from_folder
from warmfront.coordinator.decode.row_split import WHOLE
from warmfront.coordinator.engine.engine import Engine
from warmfront.coordinator.hardware.settings import Setting, keep_setting, tuning_file
from warmfront.coordinator.packing.packer import ensure_packed

IDS = [5, 17, 3, 42, 7]
COUNT = 24


@pytest.fixture(scope="module")
def model(tiny_llama: Callable[..., Path], compiled: None) -> Path:
    return prepack(tiny_llama(hidden_act="relu"), "f32")


@pytest.fixture(scope="module")
def expected(model: Path) -> list[int]:
    """The tokens of transformers."""
    reference, answer = llama_from_folder(model), list[int]()
    for _ in range(COUNT + 1):
        answer.append(choices(reference, IDS, answer)[-1])
    return answer


@pytest.mark.parametrize(
    "overrides",
    [
        pytest.param({"coordinator_threads": 1}, marks=needs_two_cores),
        pytest.param({"workers": 2, "coordinator_threads": 1}, marks=needs_two_cores),
        {"spins": 0},
        {"spins": 5000},
        {"pin": False},
        {"threads": 2 * CORES, "force": True},
        {"threads": 2 * CORES + 1, "workers": 3, "force": True},
        {"workers": CORES + 1, "force": True},
        {"threads": 1},
    ],
    ids=str,
)
def test_tokens_are_those_of_transformers(model: Path, expected: list[int], overrides: dict[str, Any]) -> None:
    with Engine.load(str(model), dtype="f32", tuning=False, **overrides) as engine:
        assert engine.decode_ids(IDS, len(expected)) == expected


def test_rows_that_move_between_threads_change_no_bit(model: Path) -> None:
    """However the rows are divided, none is left out and none computed differently."""
    random = np.random.default_rng(3)
    with Engine.load(str(model), dtype="f32", threads=3, force=True, policy="static") as engine:
        even = [logits.tobytes() for logits in engine.forced_logits(range(5, 45), 8)]
        cuts, moved = engine.session.runtime.team._rows.cuts, []
        for logits in engine.forced_logits(range(5, 45), 8):
            moved.append(logits.tobytes())
            cuts[1:-1] = np.sort(random.integers(0, WHOLE + 1, 2))
    assert moved == even


def test_force_shares_cores_without_spinning(model: Path) -> None:
    said: list[str] = []
    with Engine.load(str(model), dtype="f32", threads=2 * CORES, force=True, say=said.append) as engine:
        assert len(engine.plan.cores.cpus) == 2 * CORES
        assert engine.plan.cores.spins == 0
    assert "more threads than can run at once: slower than one on each core" in said


def test_more_threads_than_cores_are_refused(model: Path) -> None:
    outcome = run("generate", "-m", model, "-p", "Hello", "--threads", str(CORES + 1))
    assert_refused(outcome, 2, f"asked for {CORES + 1} threads", f"--threads {CORES} or fewer")
    outcome = run("generate", "-m", model, "-p", "Hello", "--coordinator-threads", str(CORES + 1))
    assert_refused(outcome, 2, f"pass --coordinator-threads {CORES} or fewer")
    outcome = run("generate", "-m", model, "-p", "Hello", "--spins", "-1")
    assert_refused(outcome, 2, "-1 rounds of spinning")


def test_weights_lie_where_the_kernel_says(model: Path) -> None:
    with Engine.load(str(model), dtype="f32") as engine:
        workers, pages = engine.statistics.workers(), engine.session.runtime.team.pages()
    assert all(sum(worker.nodes.values()) > 0 for worker in workers)
    assert {node for worker in workers for node in worker.nodes} <= {f"node{number}" for number in range(64)}
    assert len(pages) == len(engine.plan.cores.coordinator)
    assert all(sum(each.values()) > 0 for each in pages)


@pytest.mark.slow
def test_tune_is_taken_by_default(
    model: Path, expected: list[int], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    plot = tmp_path / "tok_s.png"
    outcome = run_anew("tune", model, "--dtype", "f32", "--json", "--plot", plot, timeout=180)
    assert outcome.code == 0, outcome.err
    result = json.loads(outcome.out)
    try:
        assert result["file"] == str(tuning_file())
        found = Setting(*(result["best"][name] for name in Setting._fields))
        assert len({row["workers"] for row in result["rows"]}) == min(2, CORES)
        assert result["best"]["tok_s"] > 0
        assert plot.read_bytes().startswith(b"\x89PNG")
        said: list[str] = []
        with Engine.load(str(model), dtype="f32", say=said.append) as engine:
            assert f"as tuned: {found}" in said
            assert (len(engine.plan.cores.workers), len(engine.plan.cores.cpus)) == (found.workers, found.threads)
            assert len(engine.plan.cores.coordinator) == found.coordinator_threads
            assert engine.decode_ids(IDS, len(expected)) == expected
    finally:
        tuning_file().unlink()


def test_a_tuning_that_does_not_fit_is_left_out(model: Path) -> None:
    packed = ensure_packed(model, "f32", print, lambda _done, _total: None)
    keep_setting(packed, Setting(1, CORES + 3, 1, 0), 1.0)
    try:
        outcome = run("generate", "-m", model, "--dtype", "f32", "--prompt-ids", "5,17", "-n", "2")
        assert outcome.code == 0, outcome
        assert "does not fit the cores of now: run `warmfront tune` again" in outcome.err
    finally:
        tuning_file().unlink()
