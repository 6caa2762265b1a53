"""Predicting selectors against transformers: the same numbers, fewer neurons, true statistics.

Run: pytest tests/integration/test_selectors.py
"""

import json
import subprocess
import sys
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.integration.command import assert_refused, needs_two_cores, prepack, run
from tests.integration.reference import all_logits, choices, llama_from_folder
from warmfront.coordinator import Engine
from warmfront.coordinator.selectors.calibration import masses_and_scores

MAKER = Path(__file__).parents[2] / "scripts" / "make_synthetic_model.py"
SHAPE = {"hidden": 256, "layers": 4, "ffn": 1024, "heads": 4, "kv-heads": 2, "vocab": 512, "rank": 31}
PROMPT = [300, 301, 302, 400, 333]
TOKENS = 48

pytestmark = pytest.mark.usefixtures("compiled")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a small synthetic model: hf/ and powerinfer-f16.gguf."""
    folder = tmp_path_factory.mktemp("synthetic") / "model"
    sizes = [f"--{name}={size}" for name, size in SHAPE.items()]
    subprocess.run([sys.executable, MAKER, folder, *sizes, "--formats=hf,powerinfer"], check=True, capture_output=True)
    return folder


@pytest.fixture(scope="module")
def reference(made: Path) -> Any:
    return llama_from_folder(made / "hf")


def decoded(path: Path, overrides: Mapping[str, Any], ids: list[int]) -> tuple[np.ndarray, Engine]:
    """Logits after each of `ids` from the fifth on, by the sparse path, and the closed engine."""
    with Engine.load(str(path), **overrides) as engine:
        rows = np.array(list(engine.forced_logits(ids, len(PROMPT))))
        engine.workers_seen = engine.statistics.workers()  # type: ignore[attr-defined]
        engine.selection_seen = engine.statistics.selection()  # type: ignore[attr-defined]
    return rows, engine


@pytest.mark.parametrize(
    "overrides",
    [
        {"selector": "lowrank"},
        {"selector": "lowrank", "threads": 1},
        {"selector": "lowrank", "gpu": "host", "vram_budget": 2_000_000},
        pytest.param({"selector": "lowrank", "workers": 2}, marks=needs_two_cores),
        {"selector": "exact"},
        {"selector": "lowbit", "recall": 0.9999, "bits": 4},
    ],
    ids=lambda overrides: "-".join(map(str, overrides.values())),
)
@pytest.mark.parametrize("file", ["hf", "powerinfer-f16.gguf"])
def test_logits_are_those_of_transformers(made: Path, reference: Any, file: str, overrides: dict[str, Any]) -> None:
    ids = PROMPT + [int(token) for token in np.random.default_rng(0).integers(259, 512, 12)]
    expected = all_logits(reference, ids)[len(PROMPT) - 1 :]
    got, _ = decoded(made / file, overrides | {"dtype": "f32"}, ids)
    # lowbit misses neurons on purpose: a ten-thousandth of the mass.
    tolerance = 2e-2 if overrides["selector"] == "lowbit" else 1e-3
    assert np.abs(got - expected).max() < tolerance * np.abs(expected).max()


@pytest.mark.parametrize("dtype", ["f32", "auto", "q8", "q4"])
def test_greedy_tokens(made: Path, reference: Any, dtype: str) -> None:
    with Engine.load(str(made / "hf"), dtype=dtype) as engine:
        assert engine.plan.selector.name == "lowrank"  # what auto takes where there are predictors
        answer = [token.id for token in engine.generate(PROMPT, max_new_tokens=TOKENS)]
        active = engine.statistics.active_fraction(engine.statistics.workers())
    assert answer == choices(reference, PROMPT, answer)[:-1]
    assert active is not None
    assert 0.07 < active < 0.14


def test_statistics(made: Path) -> None:
    """An exact predictor has perfect recall; `lowbit` selects more neurons, and misses few."""
    ids = PROMPT + [int(token) for token in np.random.default_rng(1).integers(259, 512, 60)]
    seen = {}
    for selector in ("lowrank", "lowbit", "exact"):
        _, engine = decoded(made / "hf", {"selector": selector, "measure": True}, ids)
        seen[selector] = engine.selection_seen  # type: ignore[attr-defined]
    assert seen["exact"] is None
    for selector in ("lowrank", "lowbit"):
        selection = seen[selector]
        assert selection is not None
        assert 0.05 < selection.fired < 0.16
        assert selection.recall == pytest.approx(selection.precision * selection.selected / selection.fired, abs=1e-6)
    assert min(seen["lowrank"].recall, seen["lowrank"].precision) > 0.99
    assert seen["lowbit"].recall > 0.9
    assert seen["lowbit"].selected > seen["lowbit"].fired


@pytest.mark.parametrize(("bits", "most"), [(1, 4.0), (2, 1.9), (4, 1.2)])
def test_recall_by_mass(made: Path, bits: int, most: float) -> None:
    """On tokens that the thresholds were not calibrated on; `most`: neurons selected for each that fires."""
    with Engine.load(str(made / "hf"), dtype="f32", selector="lowbit", bits=bits, recall=0.995) as engine:
        ids = np.random.default_rng(3).integers(259, 512, 160).tolist()
        assert engine.session.runtime.lowbit is not None
        for layer, x in enumerate(engine.session.feed_forward_inputs(ids)):
            mass, scores = masses_and_scores(engine.session.runtime.lowbit, engine.model, layer, x)
            selected = scores > engine.session.runtime.lowbit.thresholds[layer, 0]
            assert mass[selected].sum() > 0.985 * mass.sum()
            assert np.count_nonzero(selected) < most * np.count_nonzero(mass)


def test_calibration_in_a_small_context(made: Path, reference: Any) -> None:
    """The sample is longer than the KV cache: it is computed in pieces, and the numbers are the same."""
    overrides = {"selector": "lowbit", "recall": 0.9998, "bits": 4, "dtype": "f32", "context": 20}
    ids = PROMPT + [int(token) for token in np.random.default_rng(5).integers(259, 512, 12)]
    got, engine = decoded(made / "hf", overrides, ids)
    assert engine.session.runtime.lowbit is not None
    assert engine.session.runtime.lowbit.calibrated
    expected = all_logits(reference, ids)[len(PROMPT) - 1 :]
    assert np.abs(got - expected).max() < 3e-2 * np.abs(expected).max()


def test_the_thresholds_are_kept(made: Path) -> None:
    """Calibrated once for each recall; a lower one selects fewer."""
    said: dict[float, list[list[str]]] = {}
    selected = []
    for recall in (0.98, 0.98, 0.8, 0.8):
        lines: list[str] = []
        with Engine.load(str(made / "hf"), selector="lowbit", bits=1, recall=recall, say=lines.append) as engine:
            list(engine.generate(PROMPT, max_new_tokens=TOKENS))
            selected.append(engine.statistics.active_fraction(engine.statistics.workers()))
        said.setdefault(recall, []).append([line for line in lines if "calibrating" in line])
    assert said[0.98] == [["calibrating the selector for a recall of 0.98 (first use only)"], []]
    assert len(said[0.8][0]) == 1
    assert selected[3] < selected[1]  # of runs that have not calibrated


def test_stats_on_the_command_line(made: Path) -> None:
    model = prepack(made / "powerinfer-f16.gguf")
    outcome = run("generate", "-m", model, "--prompt-ids", "300,301,302", "-n", "8", "--stats", "--json")
    assert outcome.code == 0, outcome.err
    assert "recall 100.0%" in outcome.err
    result = json.loads(outcome.out)
    assert result["selector"] == "lowrank"
    assert result["selection"]["recall"] > 0.99


def test_trace(made: Path, tmp_path: Path) -> None:
    """Every layer of every job, in order and without overlap within a process."""
    file = tmp_path / "trace.json"
    outcome = run("generate", "-m", made / "hf", "--prompt-ids", "300,301", "-n", "5", "--trace", file)
    assert outcome.code == 0, outcome.err
    events = json.loads(file.read_text())["traceEvents"]
    names = {event["pid"]: event["args"]["name"] for event in events if event["ph"] == "M"}
    assert sorted(names.values()) == ["coordinator", "cpu0"]
    jobs, layers = 5, SHAPE["layers"]
    for pid, name in names.items():
        spans = [event for event in events if event["ph"] == "X" and event["pid"] == pid]
        parts = (
            {"feed-forward"} if name == "cpu0" else {"qkv", "attention", "output", "predictor", "post", "wait", "merge"}
        )
        assert {span["name"] for span in spans} == parts
        assert len(spans) == jobs * layers * len(parts)
        for before, after in pairwise(spans):
            assert before["ts"] + before["dur"] <= after["ts"] + 0.01
    posted = [event["ts"] for event in events if event["name"] == "post"]
    served = [event["ts"] for event in events if event["name"] == "feed-forward"]
    assert all(post <= serve for post, serve in zip(posted, served, strict=True))


def test_bench(made: Path) -> None:
    model = prepack(made / "hf", "q8")
    outcome = run(
        "bench", model, "--dtype=q8", "--selectors=lowrank,all", "--contexts=8,40", "-n4", "--rounds=2", timeout=120
    )
    assert outcome.code == 0, outcome.err
    result = json.loads(outcome.out.splitlines()[-1])
    assert [(row["selector"], row["context"]) for row in result["rows"]] == [
        (selector, context) for selector in ("lowrank", "all") for context in (8, 40)
    ]
    for row in result["rows"]:
        assert row["decode_tps"] > 0
        assert row["prefill_tps"] > 0
        assert row["roofline_share"] > 0
    lowrank, dense = (result["rows"][index]["bytes_per_token"] for index in (0, 2))
    layers, hidden, ffn = SHAPE["layers"], SHAPE["hidden"], SHAPE["ffn"]
    weight = 1 + 2 / 32  # bytes of 8 bits and their share of a scale
    assert dense["feed_forward"] == layers * 3 * hidden * ffn * weight
    assert dense["attention"] == layers * 3 * hidden * hidden * weight  # 4 query heads, 2 for keys and values
    assert dense["predictor"] == 0
    assert lowrank["feed_forward"] < 0.2 * dense["feed_forward"]
    assert lowrank["predictor"] == layers * 64 * (hidden + ffn) * weight


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--selector=lowrank"], ["lowrank", "no predictors", "exact"]),
        (["--selector=lowbit", "--recall=1.5"], ["recall", "1.5"]),
        (["--selector=lowbit", "--bits=3"], ["3", "'1', '2', '4'"]),
        (["--trace=/nonexistent/trace.json"], ["/nonexistent/trace.json"]),
    ],
)
def test_refusals(tiny_llama: Any, options: list[str], words: list[str]) -> None:
    model = prepack(tiny_llama(hidden_act="relu"))
    outcome = run("generate", "-m", model, "-p", "Hello", "-n2", *options)
    assert_refused(outcome, 1 if "--trace" in options[0] else 2, *words)


def test_exact_needs_relu(tiny_llama: Any) -> None:
    assert_refused(run("generate", "-m", prepack(tiny_llama()), "-p", "Hi", "--selector=exact"), 2, "ReLU", "all")
    assert_refused(run("bench", prepack(tiny_llama()), "--selectors=some"), 2, "'some'", "lowrank")
    assert_refused(run("bench", prepack(tiny_llama()), "--contexts=1"), 2, "2 or more")
