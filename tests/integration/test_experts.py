"""Mixtures of experts: whoever computes which groups, and in which type, the answer is the model's.

What every family says in float32 is in `test_families.py`.  pytest tests/integration/test_experts.py
"""

import json
import os
import re
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from safetensors.numpy import load_file, save_file

from tests.family_gguf import write_family_gguf
from tests.integration.command import needs_two_cores
from tests.integration.gpu import MIXTURE, Restless, budget_for, watch
from tests.integration.reference import all_logits, llama_from_folder, model_from_packed
from warmfront.coordinator.cli.report import as_text
from warmfront.coordinator.engine.engine import Engine
from warmfront.coordinator.models.open import open_source
from warmfront.shared.errors import ModelError
from warmfront.shared.model.bundle import GROUP

Make = Callable[..., Path]
Floats = npt.NDArray[np.float32]
# Groups of a layer: two for each of 18 experts and three of the shared one; three for each of 5.
GROUPS = {"qwen2 moe": 39, "gpt oss": 15}
PROMPT = [3 + (7 * i + i // 13) % 290 for i in range(70)]
BATCHES = [[5, 9, 250, 33, 17], [101], [7, 8]]


@pytest.fixture(scope="module", params=[("qwen2 moe", "silu"), ("qwen2 moe", "relu"), ("gpt oss", "swiglu_oai")])
def case(request: pytest.FixtureRequest) -> tuple[str, str]:
    """A model of `MODELS`, and its activation."""
    name, activation = request.param
    return name, activation


@pytest.fixture(scope="module")
def folder(tiny_family: Make, case: tuple[str, str]) -> Path:
    name, activation = case
    # Many gates and ups are beyond the limit.
    return tiny_family(name, **({"swiglu_limit": 1.0} if name == "gpt oss" else {"hidden_act": activation}))


@pytest.fixture(scope="module")
def answer(folder: Path, case: tuple[str, str]) -> Floats:
    """The logits of one worker, after the prompt and after each token of `BATCHES`, one by one."""
    with Engine.load(str(folder), dtype="f32", verify=True) as engine:
        assert engine.plan.selector.name == ("exact" if case[1] == "relu" else "all")
        return one_by_one(engine)


def one_by_one(engine: Engine, size: int = 1) -> Floats:
    """The same in batches of up to `size` tokens."""
    session, tokens = engine.session, [token for batch in BATCHES for token in batch]
    with session.text() as turn:
        rows = [session.prefill(turn, PROMPT)[0].copy()[None]]
        for at in range(0, len(tokens), size):
            batch = tokens[at : at + size]
            rows.append(session.verify(turn, batch).copy())
            for _ in batch[1:]:
                session.accept(turn)
    return np.concatenate(rows)


@pytest.mark.parametrize(
    "overrides",
    [
        pytest.param({"workers": 2}, marks=needs_two_cores),
        {"threads": 1},
        {"gpu": "host", "workers": 1},
    ],
    ids=["two workers", "one thread", "gpu with moves"],
)
def test_who_computes_what_changes_no_bit(
    folder: Path, case: tuple[str, str], answer: Floats, overrides: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    groups = GROUPS[case[0]]
    if "gpu" in overrides:
        overrides = overrides | {"vram_budget": budget_for(groups, hidden=64, ffn=groups * GROUP, longest=MIXTURE)}
    with Engine.load(str(folder), dtype="f32", verify=True, **overrides) as engine:
        if "gpu" in overrides:
            watch(engine, Restless(), monkeypatch)
        for size in (1, 5):
            engine.reset()
            np.testing.assert_array_equal(one_by_one(engine, size), answer)
        if "gpu" in overrides:
            assert engine.statistics.workers()[-1].neurons > 0
            assert engine.ownership.flow.moves > 0


def test_without_its_gpu_worker_the_answer_is_the_same(folder: Path, case: tuple[str, str], answer: Floats) -> None:
    budget = budget_for(30, hidden=64, ffn=GROUPS[case[0]] * GROUP, longest=MIXTURE)
    with Engine.load(str(folder), dtype="f32", verify=True, gpu="host", vram_budget=budget) as engine:
        os.kill(engine.session.runtime.supervisor._processes["gpu0"].pid, signal.SIGKILL)
        np.testing.assert_array_equal(one_by_one(engine), answer)


def test_what_is_computed_and_counted(folder: Path, case: tuple[str, str]) -> None:
    """All neurons of the experts that are used are computed, or only the gates of those that do not fire."""
    with Engine.load(str(folder), dtype="f32") as engine:
        one_by_one(engine)
        layout, (worker,) = engine.model.layout, engine.statistics.workers()
        # Of each of three experts, and two groups each and three of the shared one, or three each.
        gates = worker.jobs * 9 * GROUP
        ids = torch.tensor([[*PROMPT, *(token for batch in BATCHES for token in batch)]])
        chosen = llama_from_folder(folder)(ids, output_router_logits=True).router_logits
        number = chosen[0].shape[-1]
        uses = [scores.topk(3).indices.flatten().bincount(minlength=number).tolist() for scores in chosen]
        assert engine.statistics.expert_uses().tolist() == uses
        assert re.search(rf"the 1 busiest of {number} experts took \d+\.\d% of the choices", as_text(engine))
        assert worker.bytes == gates * layout.gate_bytes + worker.neurons * layout.rest_bytes
        assert worker.neurons == gates if case[1] != "relu" else 0.2 * gates < worker.neurons < 0.7 * gates


def test_a_mixture_of_layers_without_experts_alone(tiny_family: Make) -> None:
    """No expert is chosen, and the lines of `--stats` do not count any."""
    folder = tiny_family("glm4 moe", first_k_dense_replace=4)
    with Engine.load(str(folder), dtype="f32") as engine:
        ours, theirs = np.stack(list(engine.forced_logits(PROMPT, 60))), all_logits(llama_from_folder(folder), PROMPT)
        assert np.abs(ours - theirs[59:]).max() < 1e-3 * np.abs(theirs).max()
        uses = engine.statistics.expert_uses()
        assert uses is not None
        assert not uses.any()
        assert "100.0% of the neurons computed" in as_text(engine)
        assert "experts" not in as_text(engine)


@pytest.mark.parametrize("dtype", ["bf16", "f16", "q8", "q4"])
def test_each_weight_type(folder: Path, dtype: str) -> None:
    """Decoded tokens within what float16 keys and 15 bits of an input allow; a prompt's inputs have 8 bits."""
    with Engine.load(str(folder), dtype=dtype) as engine:
        theirs = all_logits(model_from_packed(folder, engine.model), PROMPT)
        decoded = [engine.step(token).copy() for token in PROMPT]
        prompted = list(engine.forced_logits(PROMPT, 60))
        for ours, most, median in ((decoded, 2e-3, 1e-3), (prompted, 0.3, 5e-2)):
            errors = np.abs(ours - theirs[-len(ours) :]).max(1) / np.abs(theirs).max()
            assert errors.max() < most
            assert np.median(errors) < median


@pytest.mark.parametrize("name", ["qwen3 moe", "mixtral"])
def test_experts_in_stacks(tiny_family: Make, tmp_path: Path, name: str) -> None:
    """As transformers has them in memory, and saves them if it is told to."""
    published = tiny_family(name)
    folder = shutil.copytree(published, tmp_path / "stacks")
    state = llama_from_folder(published).state_dict()
    assert "model.layers.0.mlp.experts.gate_up_proj" in state
    assert "model.layers.0.mlp.experts.gate_up_proj" not in load_file(folder / "model.safetensors")
    save_file({name: values.numpy() for name, values in state.items()}, folder / "model.safetensors", {"format": "pt"})
    ours, theirs = open_source(folder), open_source(published)
    assert ours.names() == theirs.names()
    for tensor in theirs.names():
        np.testing.assert_array_equal(ours.tensor(tensor).float32(), theirs.tensor(tensor).float32(), tensor)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"clip_qkv": 8.0}, "an OLMoE with clip_qkv is not supported; one without is$"),
        ({"num_experts_per_tok": 7}, "number of active experts is 7, not a whole number from 1 to 6$"),
        ({"num_experts": 7}, r"mlp\.gate\.weight has shape \(6, 64\), config\.json says \(7, 64\)$"),
        ({"num_experts": None}, "field num_local_experts is missing; the model is incomplete$"),
        ({"model_type": "qwen3_moe", "mlp_only_layers": 1}, "mlp_only_layers is 1, not a list of whole numbers$"),
    ],
)
def test_folders_that_are_refused(tiny_family: Make, tmp_path: Path, change: dict[str, Any], message: str) -> None:
    folder = shutil.copytree(tiny_family("olmoe"), tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(ModelError, match=message):
        open_source(folder)


def test_layers_that_guess_are_not_all_behind_the_last(tiny_family: Make, tmp_path: Path) -> None:
    """Of four layers and one that guesses a file claims two and one: nothing is left out in silence."""
    folder = shutil.copytree(tiny_family("glm4 moe"), tmp_path / "model")
    whole = write_family_gguf(folder, tmp_path / "whole.gguf").read_bytes()
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 2}))
    with pytest.raises(ModelError, match=r"model\.layers\.3\..* does not belong to the glm4_moe model of 2 layers"):
        open_source(folder)
    key = b"glm4moe.block_count" + (4).to_bytes(4, "little")
    shorter = whole.replace(key + (5).to_bytes(4, "little"), key + (3).to_bytes(4, "little"))
    assert shorter != whole
    (tmp_path / "shorter.gguf").write_bytes(shorter)
    with pytest.raises(ModelError, match=r"tensor blk\.[34]\..* "):
        open_source(tmp_path / "shorter.gguf")
