"""The activation that a file does not tell is measured.  pytest tests/integration/test_activation_trial.py"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
import torch

from tests.integration.reference import llama_from_folder
from tests.integration.test_activations import FORMULAS, with_formula
from warmfront.coordinator.engine.engine import Engine
from warmfront.coordinator.profile.sample_text import SAMPLE_TEXT

Make = Callable[..., Path]
TOKENS = 96


def learned(folder: Path, path: Path, formula: Callable[[Any, Any], Any]) -> Path:
    """The model with a head that knows the beginning of the built-in text by heart, if computed by that formula.

    Its config does not say which: the activation is the one thing that GGUF files lack.
    """
    from tokenizers import Tokenizer

    shutil.copytree(folder, path)
    model = with_formula(llama_from_folder(folder), formula)
    ids = Tokenizer.from_file(str(folder / "tokenizer.json")).encode(SAMPLE_TEXT, add_special_tokens=False).ids
    with torch.inference_mode():
        states = model.model(torch.tensor([ids[:TOKENS]]), use_cache=False).last_hidden_state[0].double().numpy()
    wanted = np.zeros((TOKENS, model.config.vocab_size))
    wanted[np.arange(TOKENS), ids[1 : TOKENS + 1]] = 12
    weights = dict(safetensors.numpy.load_file(path / "model.safetensors"))
    weights["lm_head.weight"] = np.ascontiguousarray(np.linalg.lstsq(states, wanted)[0].T, np.float32)
    safetensors.numpy.save_file(weights, path / "model.safetensors", {"format": "pt"})
    config = json.loads((path / "config.json").read_text())
    del config["hidden_act"]
    (path / "config.json").write_text(json.dumps(config))
    return path


def activation_of(path: Path, **wishes: Any) -> tuple[str, list[str]]:
    said: list[str] = []
    with Engine.load(str(path), say=said.append, **wishes) as engine:
        return engine.model.spec.activation, [line for line in said if line.startswith("activation")]


@pytest.mark.parametrize("name", ["relu", "drelu"])
def test_the_lowest_perplexity_is_taken(tiny_llama: Make, tmp_path: Path, name: str) -> None:
    """Said once, kept, and not asked where the user says another."""
    formulas = FORMULAS | {"relu": lambda g, u: g.relu() * u}
    path = learned(tiny_llama(hidden_size=256, scale=0.04, seed=2), tmp_path / "model", formulas[name])
    chosen, said = activation_of(path)
    assert chosen == name
    (line,) = said
    assert line.startswith(f"activation {name}: the model reads a text with a perplexity of 1 (")
    assert all(f" with {other}" in line for other in ("silu", "relu", "drelu") if other != name)
    assert activation_of(path) == (name, [])
    if name == "relu":
        assert activation_of(path, activation="silu") == ("silu", [])


def test_a_model_that_knows_nothing_tells_nothing(tiny_llama: Make, tmp_path: Path) -> None:
    path = shutil.copytree(tiny_llama(), tmp_path / "model")
    config = json.loads((path / "config.json").read_text())
    del config["hidden_act"]
    (path / "config.json").write_text(json.dumps(config))
    chosen, said = activation_of(path)
    assert chosen == "silu"
    assert len(said) == 1
    (path / "tokenizer.json").unlink()
    assert activation_of(path) == (
        "silu",
        ["activation silu: the files leave it open, and there is no tokenizer to check it with"],
    )
