"""`warmfront train-predictor`: what it promises, measured with transformers and numpy; what it refuses.

Run: pytest tests/integration/test_train_predictor.py
"""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from tests.integration.command import assert_refused, prepack, run, run_anew
from tests.integration.reference import all_logits, llama_from_folder
from warmfront.coordinator import Engine
from warmfront.coordinator.cli.training.train_predictor import Request, render, train
from warmfront.coordinator.profile.sample_text import SAMPLE_TEXT
from warmfront.coordinator.training.layer import Wish
from warmfront.shared.config import EngineConfig
from warmfront.shared.errors import ModelError, UsageError

MAKER = Path(__file__).parents[2] / "scripts" / "make_synthetic_model.py"
SHAPE = {"hidden": 256, "layers": 2, "ffn": 1024, "heads": 4, "kv-heads": 2, "vocab": 512, "rank": 31}
TOKENS = 3000

pytestmark = pytest.mark.usefixtures("compiled")
Make = Callable[..., Path]


def make(folder: Path, *options: str) -> Path:
    sizes = [f"--{name}={size}" for name, size in SHAPE.items()]
    command = [sys.executable, MAKER, folder, *sizes, "--formats=hf", "--dtype=f32", *options]
    subprocess.run(command, check=True, capture_output=True)
    (folder / "hf" / "predictor.safetensors").unlink()
    return folder / "hf"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small synthetic model of known rank, without the predictors that it was made with."""
    return make(tmp_path_factory.mktemp("synthetic") / "model")


def words(model: Path, count: int, seed: int) -> str:
    vocabulary = json.loads((model / "tokenizer.json").read_bytes())["model"]["vocab"]
    known = [word for word, number in vocabulary.items() if number >= 259]
    return " ".join(np.random.default_rng(seed).choice(known, count))


@pytest.fixture(scope="module")
def text(made: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("text") / "words.txt"
    file.write_text(words(made, TOKENS, 0))
    return file


@pytest.fixture(scope="module")
def trained(made: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """The predictor's file, and what the command says of it."""
    out = tmp_path_factory.mktemp("trained") / "p.safetensors"
    plot = out.with_suffix(".png")
    options = ["--recall=0.99", "-o", out, "--plot", plot, "--json"]
    outcome = run_anew("train-predictor", prepack(made), "--text", text, *options, timeout=170)
    assert outcome.code == 0, outcome.err
    assert f"the inputs of {TOKENS:,} tokens take 0.00 GB of disk until the file is written" in outcome.err
    assert plot.read_bytes().startswith(b"\x89PNG")
    return out, json.loads(outcome.out)


def trained_here(
    model: Path,
    text: Path,
    wish: Wish,
    out: Path,
    progress: Callable[..., None] = lambda *_: None,
    disk: int = 1 << 30,
) -> dict[str, Any]:
    request = Request(str(model), [text], wish, None, disk, out)
    return train(request, EngineConfig(), print, progress, progress, progress)


@torch.inference_mode()
def truth(model: Path, ids: list[int]) -> list[tuple[np.ndarray, np.ndarray]]:
    """By transformers, of each layer: the normed inputs [tokens, hidden] and the masses [tokens, ffn]."""
    llama, seen = llama_from_folder(model), []
    for layer in llama.model.layers:
        layer.mlp.register_forward_pre_hook(lambda mlp, inputs: seen.append((mlp, inputs[0][0])))
    llama(torch.tensor([ids]), use_cache=False)
    masses = []
    for mlp, x in seen:
        h = torch.relu(mlp.gate_proj(x)) * mlp.up_proj(x)
        masses.append((x.numpy(), (h.abs() * mlp.down_proj.weight.norm(dim=0)).numpy()))
    return masses


def test_a_trained_predictor_finds_what_fires(made: Path, trained: tuple[Path, dict[str, Any]]) -> None:
    """On new text, by float64 from the file itself; and the report of held-out tokens says the same."""
    file, facts = trained
    tensors = load_file(file)
    ids = np.random.default_rng(9).integers(259, 512, 400).tolist()
    for layer, (x, mass) in enumerate(truth(made, ids)):
        fc1, fc2, bias = (
            tensors[f"layers.{layer}.{part}"].astype(np.float64) for part in ("fc1.weight", "fc2.weight", "fc2.bias")
        )
        selected, fires = x @ fc1.T @ fc2.T + bias > 0, mass > 0
        recall, density = mass[selected].sum() / mass.sum(), selected.mean()
        assert recall > 0.985
        assert density < 1.2 * fires.mean()
        said = facts["layers"][layer]
        assert said["rank"] == len(fc1) == 32  # 31 directions and the constant channel
        assert said["recall_by_mass"] == pytest.approx(recall, abs=0.01)
        assert said["recall_by_count"] == pytest.approx((selected & fires).sum() / fires.sum(), abs=0.03)
        assert said["density"] == pytest.approx(density, rel=0.15)
        assert said["fired"] == pytest.approx(fires.mean(), rel=0.15)
    assert facts["short_of_recall"] == facts["without_gain"] == []


@pytest.mark.parametrize("overrides", [{"dtype": "f32"}, {"dtype": "q8", "gpu": "host", "vram_budget": 2_000_000}])
def test_decoding_with_it(made: Path, trained: tuple[Path, dict[str, Any]], overrides: dict[str, Any]) -> None:
    """The neurons are in an order of their own by then, and `auto` takes the predictor."""
    ids = np.random.default_rng(8).integers(259, 512, 70).tolist()
    with Engine.load(str(made), predictor=str(trained[0]), measure=True, **overrides) as engine:
        assert engine.plan.selector.name == "lowrank"
        assert engine.model.order
        rows = np.array(list(engine.forced_logits(ids, 5)))
        selection = engine.statistics.selection()
    assert selection is not None
    assert selection.recall == pytest.approx(trained[1]["mean"]["recall_by_count"], abs=0.04)
    assert selection.precision > 0.95
    expected = all_logits(llama_from_folder(made), ids)[4:]
    agreement = (rows.argmax(1) == expected.argmax(1)).mean()
    assert agreement > 0.95


def test_a_tiny_model_is_told_as_it_is(tiny_llama: Make, tmp_path: Path) -> None:
    """Gates of full rank, half of which fire: a quarter of them cannot hold 97 % of the mass: it is said."""
    model, text, file = tiny_llama(hidden_act="relu"), tmp_path / "text", tmp_path / "p.safetensors"
    text.write_text(SAMPLE_TEXT)
    facts = trained_here(model, text, Wish(None, 0.97, 0.25), file)
    lines = list(render(facts))
    assert "short of the wished 97.0% of the mass with at most 25.0% selected: layers 0, 1" in lines
    assert all(layer["density"] < 0.3 < layer["fired"] for layer in facts["layers"])
    with Engine.load(str(model), predictor=str(file)) as engine:
        engine.decode_ids([5, 6], 60)
        assert 0.05 < engine.statistics.active_fraction(engine.statistics.workers()) < 0.35


def test_an_interrupted_run_is_gone_on_with(tiny_llama: Make, tmp_path: Path) -> None:
    """Interrupted while recording and while training; the file is the same bit for bit as without interruption."""
    model, text = tiny_llama(hidden_act="relu", seed=5), tmp_path / "text"
    text.write_text(SAMPLE_TEXT)
    seen: list[tuple[str, float]] = []

    def begin(name: str, stop_at: str | None) -> bytes:
        seen.clear()

        def recorded(what: str, done: float, _total: float) -> None:
            seen.append((what, done))
            if what == stop_at:
                raise KeyboardInterrupt

        out = tmp_path / name
        trained_here(model, text, Wish(32, 0.9, None), out, recorded)
        return out.read_bytes()

    whole = begin("whole", None)
    for stop in ("recording", "layer 2 of 2"):
        with pytest.raises(KeyboardInterrupt):
            begin("part", stop)
    assert ("recording", 512) not in seen
    assert begin("part", None) == whole
    assert {what for what, _ in seen} <= {"loading", "layer 2 of 2"}


def test_foreign_and_damaged_predictors_are_refused(
    made: Path, trained: tuple[Path, dict[str, Any]], tiny_llama: Make, tmp_path: Path
) -> None:
    other = make(tmp_path / "other", "--seed=1")
    with pytest.raises(ModelError, match=r"p\.safetensors predicts another model of the shape of hf: train one for"):
        Engine.load(str(other), predictor=str(trained[0]))
    with pytest.raises(ModelError, match=r"has shape \(32, 256\) instead of \(32, 64\); it is of another model$"):
        Engine.load(str(tiny_llama(hidden_act="relu")), predictor=str(trained[0]))
    short = tmp_path / "short.safetensors"
    short.write_bytes(trained[0].read_bytes()[:-9])
    with pytest.raises(ModelError, match=r"short\.safetensors is damaged .*; make it anew or remove it$"):
        Engine.load(str(made), predictor=str(short))
    with pytest.raises(UsageError, match=r"--predictor .*none: there is no such file; make one with"):
        Engine.load(str(made), predictor=str(tmp_path / "none"))


def test_refusals(made: Path, tiny_llama: Make, tmp_path: Path) -> None:
    text = tmp_path / "text"
    text.write_text("w300 w301")
    wish = Wish(None, 0.97, None)
    with pytest.raises(
        UsageError, match=r"is not ReLU-like: it uses silu: there is no telling which of its neurons fire$"
    ):
        trained_here(tiny_llama(), text, wish, tmp_path / "p")
    with pytest.raises(UsageError, match=r"^the texts have 2 tokens: predictors are made from 640 or more$"):
        trained_here(made, text, wish, tmp_path / "p")
    with pytest.raises(UsageError, match=r"^a --disk of 100 holds the inputs of 0 tokens: predictors are made from"):
        trained_here(made, text, wish, tmp_path / "p", disk=100)
    for option, word in (("--recall=1", "below 1"), ("--max-density=0", "above 0"), ("--rank=some", "auto")):
        assert_refused(run("train-predictor", made, "--text", text, option), 2, word)
