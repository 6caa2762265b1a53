"""The same tokens for the same seed, the same bits whoever computes what.

Run: pytest tests/integration/test_determinism.py
"""

import json
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from tests.integration.command import needs_two_cores, run_anew
from tests.integration.gpu import Restless, budget_for, watch
from warmfront.coordinator.engine.engine import Engine
from warmfront.shared.config import Sampling
from warmfront.shared.model.formats import Kind

MAKER = Path(__file__).parents[2] / "scripts" / "make_synthetic_model.py"
SHAPE = {"hidden": 256, "layers": 4, "ffn": 1024, "heads": 4, "kv-heads": 2, "vocab": 512, "rank": 31}

PROMPT = "Once upon a time, in a village by the sea,"
NEW_TOKENS = 12
# Everything that could get into the way: two CPU workers, the emulated GPU with a third of the neurons, moves.
OVERRIDES: dict[str, Any] = {"threads": 2, "workers": 2, "gpu": "host", "vram_budget": 20_000_000}
SAMPLING = {"temperature": 0.8, "top_p": 0.95, "seed": 1234}
IN_EACH_ENGINE, COMMANDS = 8, 4


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small synthetic ReLU model with predictors."""
    folder = tmp_path_factory.mktemp("synthetic") / "model"
    sizes = [f"--{name}={size}" for name, size in SHAPE.items()]
    subprocess.run([sys.executable, MAKER, folder, *sizes, "--formats=hf"], check=True, capture_output=True)
    return folder / "hf"


def ids_of(count: int) -> list[int]:
    return [259 + (7 * i + i * i // 11) % 250 for i in range(count)]


def rows_of(engine: Engine, ids: list[int], prefill: int) -> tuple[list[bytes], set[bytes]]:
    """The bits of the logits after the prefill and after each token, and all tables of owners that were met."""
    rows, tables = [], set()
    for row in engine.forced_logits(ids, prefill):
        rows.append(row.tobytes())
        tables.add(engine.session.runtime.board.owner.tobytes())
    return rows, tables


def load(made: Path, dtype: str, selector: str, **overrides: Any) -> Engine:
    return Engine.load(str(made), dtype=dtype, selector=selector, context=2048, verify=True, **overrides)


@pytest.fixture(scope="module")
def alone(made: Path, compiled: None) -> Callable[..., list[list[bytes]]]:
    """The logits that one thread of one worker computes in each of some jobs, by weight type and selector."""

    @cache
    def rows(dtype: str, selector: str, *jobs: tuple[int, int]) -> list[list[bytes]]:
        with load(made, dtype, selector, gpu="none", threads=1) as engine:
            return [rows_of(engine, ids_of(count), prefill)[0] for count, prefill in jobs]

    return rows


# Tokens and how many of them are prefilled: of one panel, of several, of more than one job.
JOBS, LONG = ((30, 5), (52, 40), (320, 317)), (240, 20)
# Groups move between all workers of the second: whatever two of them do differently is met there.
WAYS = {
    "threads": {"gpu": "none", "threads": 2},
    "workers and gpu": {"threads": 2, "workers": 2, "gpu": "host"},
}


@needs_two_cores
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    ("dtype", "selector"), [("f32", "exact"), ("f16", "lowrank"), ("q8", "all"), ("q4", "exact"), ("q4", "lowbit")]
)
def test_the_bits_of_logits_are_the_same_whoever_computes_what(
    made: Path,
    alone: Callable[..., list[list[bytes]]],
    monkeypatch: pytest.MonkeyPatch,
    dtype: str,
    selector: str,
    way: str,
) -> None:
    """With any number of workers and threads, an emulated GPU, and groups that move all the time."""
    kind = {"f32": Kind.F32, "f16": Kind.F16, "q8": Kind.Q8, "q4": Kind.Q4S}[dtype]
    overrides = dict(WAYS[way])
    if "gpu" in way:
        overrides["vram_budget"] = budget_for(40, hidden=256, ffn=1024, context=2048, kind=kind)
    met: set[bytes] = set()
    with load(made, dtype, selector, **overrides) as engine:
        if way != "threads":
            watch(engine, Restless(len(dtype)), monkeypatch)
        for (count, prefill), expected in zip(JOBS, alone(dtype, selector, *JOBS), strict=True):
            rows, tables = rows_of(engine, ids_of(count), prefill)
            met |= tables
            assert rows == expected
    assert len(met) >= 20 or way == "threads"


@pytest.mark.slow
@needs_two_cores
def test_a_thousand_tokens_on_two_hundred_placements(
    made: Path, alone: Callable[..., list[list[bytes]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    budget, (count, prefill) = budget_for(40, hidden=256, ffn=1024, context=2048, kind=Kind.Q8), LONG
    (expected,), met = alone("q8", "lowrank", LONG), set()
    with load(made, "q8", "lowrank", threads=2, workers=2, gpu="host", vram_budget=budget) as engine:
        watch(engine, Restless(9), monkeypatch)
        for _ in range(5):
            rows, tables = rows_of(engine, ids_of(count), prefill)
            met |= tables
            assert rows == expected
    assert len(met) >= 200
    assert 5 * (count - prefill) >= 1000


@pytest.mark.slow
@needs_two_cores
@pytest.mark.usefixtures("compiled")
def test_twenty_of_twenty(smollm2: Path) -> None:
    answers = []
    for _ in range(2):
        with Engine.load(str(smollm2), **OVERRIDES) as engine:
            for _ in range(IN_EACH_ENGINE):
                engine.reset()
                tokens = engine.generate(PROMPT, max_new_tokens=NEW_TOKENS, sampling=Sampling(**SAMPLING))
                answers.append([token.id for token in tokens])
    options = [f"--{name.replace('_', '-')}={value}" for name, value in (OVERRIDES | SAMPLING).items()]
    for _ in range(COMMANDS):
        outcome = run_anew("generate", "-m", smollm2, "-p", PROMPT, f"-n{NEW_TOKENS}", "--json", *options)
        answers.append(json.loads(outcome.out)["token_ids"])
    assert len(answers) == 20
    assert [answer == answers[0] for answer in answers] == [True] * 20
    assert len(set(answers[0])) > 5


@pytest.mark.slow
def test_the_seed_counts(smollm2: Path) -> None:
    with Engine.load(str(smollm2)) as engine:
        samplings = [Sampling(temperature=0.8, seed=seed) for seed in (1, 2, None, None)]
        answers = [
            tuple(token.id for token in engine.generate(PROMPT, max_new_tokens=NEW_TOKENS, sampling=sampling))
            for sampling in samplings
        ]
    assert len(set(answers)) == len(answers)
