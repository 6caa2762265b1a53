"""Every family says in float32 what transformers says, from both file formats.

pytest tests/integration/test_families.py
"""

import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

from tests.family_gguf import write_family_gguf
from tests.family_models import MODELS
from tests.integration.command import needs_two_cores
from tests.integration.gpu import DENSE, MIXTURE, Restless, budget_for, watch
from tests.integration.reference import all_logits, choices, llama_from_folder, model_from_packed
from warmfront.coordinator.engine.engine import Engine
from warmfront.coordinator.models.open import open_source
from warmfront.shared.model.formats import Kind, pack, unpack

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


# GGUF has no word for the windows of a Qwen2, other places of a Gemma's windows, or another scale of its scores; and
# there are no files of OPTs with norms behind the blocks or without weights, of Falcons that are serial, nor of Qwens
# with experts in some layers only.
FOLDER_ONLY = (
    "qwen2 windows",
    "gemma2 scale",
    "gemma3 linear",
    "opt plain",
    "opt behind",
    "falcon serial",
    "qwen2 moe dense",
)


@pytest.mark.parametrize("name", [name for name in MODELS if name not in FOLDER_ONLY])
def test_the_gguf_is_the_folder(tiny_family: Make, tmp_path: Path, name: str) -> None:
    """The same description but for its names, and the same numbers."""
    folder = tiny_family(name)
    ours, theirs = open_source(write_family_gguf(folder, tmp_path / "model.gguf")), open_source(folder)
    assert ours.names() == theirs.names()
    for tensor in theirs.names():
        np.testing.assert_array_equal(ours.tensor(tensor).float32(), theirs.tensor(tensor).float32(), tensor)
    assert set(fields_of(asdict(ours.spec))) == set(fields_of(asdict(theirs.spec)))


def test_a_falcon_of_powerinfer(tiny_family: Make, tmp_path: Path) -> None:
    folder = tiny_family("falcon")
    ours, theirs = open_source(write_family_gguf(folder, tmp_path / "model.gguf", "powerinfer")), open_source(folder)
    assert ours.spec.activation == "relu"
    for tensor in theirs.names():
        np.testing.assert_array_equal(ours.tensor(tensor).float32(), theirs.tensor(tensor).float32(), tensor)


def test_sparkinfer_leaves_out_the_rows_before_the_positions(tiny_family: Make, tmp_path: Path) -> None:
    folder = tiny_family("opt")
    files = [
        write_family_gguf(folder, tmp_path / f"{dialect}.gguf", dialect) for dialect in ("powerinfer", "sparkinfer")
    ]
    theirs, ours = map(open_source, files)
    assert ours.spec.architecture.positions.learned_offset == 0
    assert ours.spec.context == theirs.spec.context
    for name in theirs.names():
        rows = slice(2, None) if name == "positions" else slice(None)
        np.testing.assert_array_equal(ours.tensor(name).float32(), theirs.tensor(name).float32()[rows], name)


# Neurons of a layer of mixtures of experts, padding included; others have 96.
NEURONS = {
    "mixtral": 5 * 96,
    "qwen2 moe": 18 * 64 + 96,
    "qwen2 moe dense": 5 * 64 + 96,
    "glm4 moe": 12 * 64 + 64,
    "smallthinker": 6 * 64,
}


def some_memory(name: str) -> int:
    """Of an emulated GPU for a few groups of each layer."""
    neurons = NEURONS.get(name, 96)
    longest = MIXTURE if name in NEURONS else DENSE
    return budget_for(neurons // 24, hidden=128 if name == "stablelm" else 64, ffn=neurons, longest=longest)


@needs_two_cores
@pytest.mark.parametrize("name", ["qwen3", "gemma3", "gpt2", "opt behind", "falcon new", "glm4 moe"])
def test_on_two_workers_and_a_gpu(tiny_family: Make, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With activations that always fire, with and without gates: groups change their workers at every token."""
    folder = tiny_family(name, seed=1)
    where = {"workers": 2, "gpu": "host", "vram_budget": some_memory(name)}
    with Engine.load(str(folder), dtype="f32", verify=True, **where) as engine:
        watch(engine, Restless(), monkeypatch)
        assert_says_the_same(engine, llama_from_folder(folder))
        assert engine.statistics.workers()[-1].neurons > 0


@pytest.mark.parametrize("name", ["opt", "falcon new"])
def test_neurons_without_a_gate_that_do_not_fire_are_left_out(tiny_family: Make, name: str) -> None:
    """By `exact`, which is the default, without a difference; `lowbit` may miss some."""
    folder = tiny_family(name)
    for selector, low, high in (("all", 1, 1), ("exact", 0.2, 0.8), ("lowbit", 0.2, 0.8)):
        with Engine.load(str(folder), dtype="f32", selector=selector) as engine:
            if selector == "lowbit":
                assert len([*engine.generate(PROMPT, max_new_tokens=NEW_TOKENS)]) == NEW_TOKENS
            else:
                assert_answers_the_same(engine, llama_from_folder(folder))
            active = engine.statistics.active_fraction(engine.statistics.workers())
            assert active is not None
            assert low <= active <= high


def rounded(folder: Path, kind: Kind) -> Any:
    """The model of a folder with its matrices, but for learned positions, rounded as they are packed: by rows of
    inputs, and the last one of a feed-forward by neurons."""
    model = llama_from_folder(folder)
    by_column = re.compile(r"(fc2|dense_4h_to_h|c_attn|attn.c_proj|c_fc)\.weight$")
    for name, values in model.state_dict().items():
        if values.dim() == 2 and not re.search(r"wpe|positions|lm_head", name):
            rows = values.T if by_column.search(name) else values
            exact = unpack(pack(rows.contiguous().numpy(), kind), kind, rows.shape[1])
            rows.copy_(torch.from_numpy(exact))
    return model


@pytest.mark.parametrize(
    ("name", "dtype"),
    [("opt", "f16"), ("opt", "bf16"), ("opt", "q8"), ("opt", "q4"), ("gpt2", "q4"), ("falcon new", "q8")],
)
def test_narrower_weights(tiny_family: Make, name: str, dtype: str) -> None:
    """Token by token, for prompts are rounded to bytes or bfloat16 where the machine multiplies these."""
    folder = tiny_family(name)
    model = rounded(folder, Kind.Q4S if dtype == "q4" else Kind[dtype.upper()])
    with Engine.load(str(folder), dtype=dtype, kv="f32") as engine:
        ours = np.stack([engine.step(token).copy() for token in LONG[:24]])
        theirs = all_logits(model, LONG[:24])
        assert np.abs(ours - theirs).max() < 1e-3 * np.abs(theirs).max()


# One of each family.
EACH = ("mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3", "phi3", "olmo2", "stablelm", "granite", "llama yarn")


@needs_two_cores
@pytest.mark.parametrize("name", [*EACH, "mixtral", "qwen2 moe", "qwen2 moe dense", "smallthinker"])
def test_with_relu_on_two_workers_and_a_gpu(tiny_family: Make, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only what fires is computed, wherever it is: groups change their workers at every token."""
    folder = tiny_family(name, seed=1, hidden_act="relu", hidden_activation="relu")
    where = {"workers": 2, "gpu": "host", "vram_budget": some_memory(name)}
    with Engine.load(str(folder), dtype="f32", activation="relu", verify=True, **where) as engine:
        assert engine.plan.selector.name == "exact"
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
    where = {"gpu": "host", "vram_budget": some_memory(name), "policy": "static"}
    with Engine.load(str(folder), dtype="f32", activation="relu", verify=True, **where) as engine:
        assert engine.plan.selector.name == "lowrank"
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


# Where experts do not score so alike that an input of 15 bits makes another choice.
MIXTURES = [
    ("glm4 moe", "q8"),
    ("glm4 moe", "f16"),
    ("qwen2 moe dense", "q4"),
    ("smallthinker softmax", "q4"),
    ("smallthinker", "bf16"),
]


@pytest.mark.parametrize(("name", "dtype"), [*zip(EACH, ("q8", "q4", "f16", "bf16") * 3, strict=False), *MIXTURES])
def test_in_other_weight_types(tiny_family: Make, name: str, dtype: str) -> None:
    """Rounded weights are computed with as they are; what goes into them is rounded to 15 bits where bytes are."""
    folder = tiny_family(name, seed=2)
    with Engine.load(str(folder), dtype=dtype, kv="f32") as engine:
        ours = np.stack([engine.step(token).copy() for token in LONG[:40]])
        theirs = all_logits(model_from_packed(folder, engine.model), LONG[:40])
        assert np.abs(ours - theirs).max() < 1e-3 * np.abs(theirs).max()
