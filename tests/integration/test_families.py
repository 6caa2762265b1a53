"""Every family says in float32 what transformers says, from both file formats.

pytest tests/integration/test_families.py
"""

import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from tests.family_models import MODELS, write_family_gguf
from tests.integration.command import needs_two_cores
from tests.integration.gpu import Restless, budget_for, watch
from tests.integration.reference import all_logits, choices, llama_from_folder, model_from_packed
from warmfront.coordinator.engine.engine import Engine
from warmfront.coordinator.models.open import open_source

Make = Callable[..., Path]
PROMPT = [5, 17, 200, 42, 101, 7, 250, 33]
# Longer than a window, in a prefill of several panels and then token by token.
LONG = [3 + (7 * i + i // 13) % 290 for i in range(90)]
NEW_TOKENS = 32


def assert_says_the_same(engine: Engine, model: Any) -> None:
    assert_answers_the_same(engine, model)
    assert_same_logits(engine, model)


def assert_answers_the_same(engine: Engine, model: Any) -> None:
    answer = [token.id for token in engine.generate(PROMPT, max_new_tokens=NEW_TOKENS)]
    assert answer == choices(model, PROMPT, answer)[:-1]
    assert len(answer) == NEW_TOKENS


def assert_same_logits(engine: Engine, model: Any) -> None:
    ours = np.stack(list(engine.forced_logits(LONG, 70)))
    theirs = all_logits(model, LONG)[69:]
    assert np.abs(ours - theirs).max() < 1e-3 * max(1, np.abs(theirs).max() / 10)


@pytest.mark.parametrize("name", [name for name in MODELS if name != "phi3 longrope"])
def test_the_folder(tiny_family: Make, name: str) -> None:
    folder = tiny_family(name)
    with Engine.load(str(folder), dtype="f32") as engine:
        assert_says_the_same(engine, llama_from_folder(folder))


@pytest.mark.parametrize(
    ("context", "assert_same"), [(64, assert_answers_the_same), (None, assert_same_logits)], ids=["short", "long"]
)
def test_longrope(tiny_family: Make, context: int | None, assert_same: Callable[[Engine, Any], None]) -> None:
    """The context decides which frequencies are used; with transformers, the length of the text."""
    folder = tiny_family("phi3 longrope")
    with Engine.load(str(folder), dtype="f32", context=context) as engine:
        assert_same(engine, llama_from_folder(folder))


def fields_of(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """The numbers and words of a description, with float32's precision, which is all that GGUF has."""
    if isinstance(value, dict | tuple):
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            yield from fields_of(item, f"{path}.{key}")
    elif path not in (".name", ".family"):
        yield path, f"{value:.5g}" if isinstance(value, float) else value


# GGUF has no word for the windows of a Qwen2, other places of a Gemma's windows, or another scale of its scores.
FOLDER_ONLY = ("qwen2 windows", "gemma2 scale", "gemma3 linear")


@pytest.mark.parametrize("name", [name for name in MODELS if name not in FOLDER_ONLY])
def test_the_gguf_is_the_folder(tiny_family: Make, tmp_path: Path, name: str) -> None:
    """The same description but for its names, and the same numbers."""
    folder = tiny_family(name)
    ours, theirs = open_source(write_family_gguf(folder, tmp_path / "model.gguf")), open_source(folder)
    assert ours.names() == theirs.names()
    for tensor in theirs.names():
        np.testing.assert_array_equal(ours.tensor(tensor).float32(), theirs.tensor(tensor).float32(), tensor)
    assert set(fields_of(asdict(ours.spec))) == set(fields_of(asdict(theirs.spec)))


# One of each family.
EACH = ("mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3", "phi3", "olmo2", "stablelm", "granite", "llama yarn")


@needs_two_cores
@pytest.mark.parametrize("name", EACH)
def test_with_relu_on_two_workers_and_a_gpu(tiny_family: Make, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only what fires is computed, wherever it is: groups change their workers at every token."""
    folder = tiny_family(name, seed=1, hidden_act="relu", hidden_activation="relu")
    hidden = 128 if name == "stablelm" else 64
    where = {"workers": 2, "gpu": "host", "vram_budget": budget_for(4, hidden=hidden, ffn=96)}
    with Engine.load(str(folder), dtype="f32", activation="relu", verify=True, **where) as engine:
        assert engine.plan.selector == "exact"
        watch(engine, Restless(), monkeypatch)
        assert_says_the_same(engine, llama_from_folder(folder))
        assert engine.statistics.workers()[-1].neurons > 0


def with_exact_predictors(folder: Path, path: Path) -> Path:
    """A copy of the folder with predictors that compute the gates: fc1 is [1; -1], so that no ReLU loses a sign."""
    shutil.copytree(folder, path)
    weights = load_file(path / "model.safetensors")
    made = {}
    for layer in range(sum(name.endswith("o_proj.weight") for name in weights)):
        here = f"model.layers.{layer}.mlp."
        gate = weights.get(f"{here}gate_proj.weight", weights.get(f"{here}gate_up_proj.weight"))[:96]
        one = np.eye(gate.shape[1], dtype=np.float32)
        made |= {f"layers.{layer}.fc1.weight": np.vstack((one, -one))}
        made |= {f"layers.{layer}.fc2.weight": np.hstack((gate, -gate))}
    save_file(made, path / "predictor.safetensors", {"input": "normed"})
    return path


# Every kind of what stands between the residual and the feed-forward.
INPUTS = ("gemma3", "phi3", "olmo2", "stablelm", "granite")


@pytest.mark.parametrize("name", INPUTS)
def test_predicted_with_a_gpu(tiny_family: Make, tmp_path: Path, name: str) -> None:
    """Predictors read what the feed-forward of the family reads, and the GPU computes what they choose."""
    plain = tiny_family(name, seed=3, hidden_act="relu", hidden_activation="relu")
    folder = with_exact_predictors(plain, tmp_path / "model")
    hidden = 128 if name == "stablelm" else 64
    where = {"gpu": "host", "vram_budget": budget_for(4, hidden=hidden, ffn=96), "policy": "static"}
    with Engine.load(str(folder), dtype="f32", activation="relu", verify=True, **where) as engine:
        assert engine.plan.selector == "lowrank"
        assert_says_the_same(engine, llama_from_folder(plain))
        active = engine.statistics.active_fraction(engine.statistics.workers())
        assert active is not None
        assert active < 0.9


@pytest.mark.parametrize("name", INPUTS)
def test_low_bit_copies_of_the_gates(tiny_family: Make, name: str) -> None:
    """They miss neurons on purpose, of little weight."""
    folder = tiny_family(name, seed=3, hidden_act="relu", hidden_activation="relu")
    how = {"activation": "relu", "selector": "lowbit", "bits": 4, "recall": 0.9999}
    with Engine.load(str(folder), dtype="f32", **how) as engine:
        ours = np.stack(list(engine.forced_logits(LONG[:40], 20)))
        theirs = all_logits(llama_from_folder(folder), LONG[:40])[19:]
        assert np.abs(ours - theirs).max() < 2e-2 * np.abs(theirs).max()


@pytest.mark.parametrize(("name", "dtype"), [*zip(EACH, ("q8", "q4", "f16", "bf16") * 3, strict=False)])
def test_in_other_weight_types(tiny_family: Make, name: str, dtype: str) -> None:
    """Rounded weights are computed with as they are; what goes into them is rounded to 15 bits where bytes are."""
    folder = tiny_family(name, seed=2)
    with Engine.load(str(folder), dtype=dtype, kv="f32") as engine:
        ours = np.stack(list(engine.forced_logits(LONG[:40], 1)))
        theirs = all_logits(model_from_packed(folder, engine.model), LONG[:40])
        assert np.abs(ours - theirs).max() < 1e-3 * np.abs(theirs).max()
