"""Whole models on a CUDA card; skipped where there is none.  pytest -m gpu tests/integration/test_card.py"""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.integration.gpu import Restless, watch
from tests.integration.reference import choices, llama_from_folder
from warmfront.coordinator.engine.engine import Engine
from warmfront.gpu_worker.open import open_device
from warmfront.shared.errors import ResourceError

MAKER = Path(__file__).parents[2] / "scripts" / "make_synthetic_model.py"
PROMPT = [300, 301, 302, 400, 333]
CARD: dict[str, Any] = {"gpu": "cuda:0", "vram_budget": 64 << 20, "context": 512}

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module", autouse=True)
def _card() -> None:
    try:
        open_device("cuda:0").close()
    except ResourceError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small synthetic ReLU model with predictors."""
    folder = tmp_path_factory.mktemp("synthetic") / "model"
    sizes = ("--hidden=256", "--layers=4", "--ffn=1024", "--heads=4", "--kv-heads=2", "--vocab=512", "--rank=31")
    subprocess.run([sys.executable, MAKER, folder, *sizes, "--formats=hf"], check=True, capture_output=True)
    return folder / "hf"


@pytest.mark.parametrize("attention", ["cpu", "cuda:0"])
@pytest.mark.parametrize("selector", ["exact", "lowrank", "all"])
def test_tokens_are_those_of_transformers(
    made: Path, monkeypatch: pytest.MonkeyPatch, selector: str, attention: str
) -> None:
    """While groups move at every token."""
    with Engine.load(str(made), dtype="f32", selector=selector, attention=attention, verify=True, **CARD) as engine:
        watch(engine, Restless(1), monkeypatch)
        answer = engine.decode_ids(PROMPT, 150)
        assert engine.ownership.flow.moves > 100
        assert engine.statistics.workers()[-1].neurons > 0
    assert answer == choices(llama_from_folder(made), PROMPT, answer)[:-1]


@pytest.mark.parametrize("dtype", ["f32", "f16", "bf16", "q8", "q4"])
@pytest.mark.parametrize("tokens", [2, 17, 300])
def test_prefill_is_the_cpus(made: Path, dtype: str, tokens: int) -> None:
    """Whole jobs and a remainder, in every weight type; the CPU rounds the inputs of all types but float32."""
    ids = [259 + (7 * i) % 250 for i in range(tokens)]
    logits = []
    for overrides in (CARD, {"gpu": "none", "context": 512}):
        with Engine.load(str(made), dtype=dtype, attention="cpu", **overrides) as engine:
            logits.append(next(engine.forced_logits(ids, tokens)))
    tolerance = 1e-4 if dtype == "f32" else 5e-2
    np.testing.assert_allclose(logits[0], logits[1], rtol=tolerance, atol=tolerance * np.abs(logits[1]).max())


def test_a_gpu_worker_may_die(made: Path) -> None:
    with Engine.load(str(made), dtype="f32", gpu="none", context=512) as engine:
        expected = engine.decode_ids(PROMPT, 60)
    said: list[str] = []
    with Engine.load(str(made), dtype="f32", say=said.append, **CARD) as engine:
        os.kill(engine.statistics.workers()[-1].pid, signal.SIGKILL)
        assert engine.decode_ids(PROMPT, 60) == expected
        deadline = time.monotonic() + 60
        while not any("is back" in line for line in said) and time.monotonic() < deadline:
            assert engine.decode_ids(PROMPT, 60) == expected
        assert any("is back" in line for line in said)
