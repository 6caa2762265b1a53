"""Groups that move all the time change nothing in what is computed.  pytest tests/integration/test_ownership.py"""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.integration.command import needs_two_cores
from tests.integration.gpu import Restless, Still, budget_for, watch
from tests.integration.reference import choices, llama_from_folder
from warmfront.coordinator.engine.engine import Engine
from warmfront.shared.config import POLICIES
from warmfront.shared.errors import WorkerError

MAKER = Path(__file__).parents[2] / "scripts" / "make_synthetic_model.py"
SHAPE = {"hidden": 256, "layers": 4, "ffn": 1024, "heads": 4, "kv-heads": 2, "vocab": 512, "rank": 31}
GROUPS, SLOTS = 4 * 1024 // 32, 40
PROMPT = [300, 301, 302, 400, 333]
TOKENS = 150
GPU: dict[str, Any] = {"gpu": "host", "vram_budget": budget_for(SLOTS, hidden=256, ffn=1024)}

pytestmark = pytest.mark.usefixtures("compiled")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small synthetic ReLU model with predictors."""
    folder = tmp_path_factory.mktemp("synthetic") / "model"
    sizes = [f"--{name}={size}" for name, size in SHAPE.items()]
    subprocess.run([sys.executable, MAKER, folder, *sizes, "--formats=hf"], check=True, capture_output=True)
    return folder / "hf"


@pytest.fixture(scope="module")
def reference(made: Path) -> Any:
    return llama_from_folder(made)


def load(made: Path, **overrides: Any) -> Engine:
    return Engine.load(str(made), dtype="f32", context=512, verify=True, **overrides)


def assert_greedy(reference: Any, answer: list[int]) -> None:
    assert answer == choices(reference, PROMPT, answer)[:-1]
    assert len(set(answer)) > 10


@pytest.mark.parametrize("selector", ["exact", "lowrank", "all"])
def test_tokens_are_those_of_transformers(
    made: Path, reference: Any, monkeypatch: pytest.MonkeyPatch, selector: str
) -> None:
    with load(made, selector=selector, **GPU) as engine:
        watch(engine, Restless(1), monkeypatch)
        answer = engine.decode_ids(PROMPT, TOKENS)
        flow, workers = engine.ownership.flow, engine.statistics.workers()
    assert_greedy(reference, answer)
    assert min(flow.moves, flow.flips) > 300
    assert workers[-1].neurons > 0


def test_lowbit_gives_the_tokens_that_it_gives_without_a_gpu(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with load(made, selector="lowbit", gpu="none") as engine:
        expected = engine.decode_ids(PROMPT, TOKENS)
    with load(made, selector="lowbit", **GPU) as engine:
        watch(engine, Restless(2), monkeypatch)
        assert engine.decode_ids(PROMPT, TOKENS) == expected
        assert engine.ownership.flow.moves > 300


@needs_two_cores
@pytest.mark.parametrize("overrides", [{"gpu": "none"}, GPU], ids=["two", "two and a gpu"])
@pytest.mark.parametrize("selector", ["exact", "lowrank"])
def test_groups_move_between_cpu_workers(
    made: Path, reference: Any, monkeypatch: pytest.MonkeyPatch, selector: str, overrides: dict[str, Any]
) -> None:
    with load(made, selector=selector, workers=2, **overrides) as engine:
        first = engine.ownership.home.copy()
        watch(engine, Restless(3), monkeypatch)
        answer = engine.decode_ids(PROMPT, TOKENS)
        assert engine.ownership.flow.moves > 100
        assert np.count_nonzero(engine.ownership.home != first) > 20
    assert_greedy(reference, answer)


def test_prompts_and_answers_by_turns(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prefill goes by the same tables as decode."""
    prompts = [[259 + (7 * i + 3 * length) % 250 for i in range(length)] for length in (2, 40, 300, 1, 17)]
    with load(made, gpu="none") as engine:
        expected = [engine.decode_ids(prompt, 20) for prompt in prompts]
    with load(made, **GPU) as engine:
        watch(engine, Restless(4), monkeypatch)
        assert [engine.decode_ids(prompt, 20) for prompt in prompts] == expected


def test_the_gpu_begins_full_and_the_moves_keep_to_its_slots(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with load(made, **GPU) as engine:
        assert engine.session.runtime.supervisor.readies["gpu0"].slots == SLOTS
        assert engine.ownership.resident[-1].sum() == SLOTS
        watch(engine, Restless(5, some=0.5), monkeypatch)
        engine.decode_ids(PROMPT, 40)
        assert 0 < engine.ownership.resident[-1].sum() <= SLOTS
        assert 0 < engine.ownership.unused <= engine.ownership.flow.moves
        assert len(engine.ownership.transfers) > 10
        for transfer in engine.ownership.transfers:
            assert engine.ownership.names[transfer.worker] == "gpu0"
            assert 0 < transfer.groups <= 16
            assert transfer.began < transfer.ended


@pytest.fixture
def engine(made: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Engine]:
    """One CPU worker and the GPU, and nothing moves."""
    with load(made, selector="exact", threads=1, **GPU) as engine:
        watch(engine, Still(), monkeypatch)
        engine.decode_ids(PROMPT, 3)
        yield engine


@pytest.mark.parametrize("changes", [("cpu0", "gpu0"), ("gpu0", "cpu0")], ids=["twice", "not at all"])
def test_verify_notices_an_owner_that_changes_within_a_job(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, changes: tuple[str, str]
) -> None:
    """The CPU worker has computed the layer when the table changes, the GPU worker has not seen it yet."""
    board, ownership, run = engine.session.runtime.board, engine.ownership, engine.session.runtime.team.run
    first, then = (ownership.names.index(name) for name in changes)
    assert ownership.resident[:, 0, 3].all()
    gpu = engine.session.runtime.supervisor.hellos["gpu0"].pid

    def change(sequence: int) -> None:
        deadline = time.monotonic() + 20
        while board.done[0][0] < sequence and time.monotonic() < deadline:
            time.sleep(0.001)
        board.owner[0, 3] = then
        os.kill(gpu, signal.SIGCONT)

    def corrupted(*job: Any, **options: Any) -> int:
        os.kill(gpu, signal.SIGSTOP)
        # Until each of its threads has met the signal, the one that serves the board may still compute a layer.
        tasks = list(Path(f"/proc/{gpu}/task").iterdir())
        while any(task.joinpath("stat").read_text().rpartition(")")[2].split()[0] != "T" for task in tasks):
            time.sleep(0.001)
        board.owner[0, 3] = first
        changer = threading.Thread(target=change, args=(int(board.job[0]) + 1,))
        changer.start()
        try:
            return run(*job, **options)
        finally:
            changer.join()

    monkeypatch.setattr(engine.session.runtime.team, "run", corrupted)
    with pytest.raises(WorkerError, match=r"^group 3 of layer 0 was not computed exactly once: "):
        engine.step(300)


def test_nothing_is_said_of_what_is_right(engine: Engine) -> None:
    assert len(engine.decode_ids(PROMPT, 20)) == 20


# `core` needs a selector that changes them: tests/integration/test_core.py.
@pytest.mark.parametrize("policy", [policy for policy in POLICIES if policy != "core"])
def test_every_policy_leaves_the_tokens_as_they_are(
    made: Path, reference: Any, monkeypatch: pytest.MonkeyPatch, policy: str
) -> None:
    with load(made, policy=policy, **GPU) as engine:
        watch(engine, engine.ownership.policy, monkeypatch)
        assert_greedy(reference, engine.decode_ids(PROMPT, TOKENS))
