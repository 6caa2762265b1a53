"""TurboSparse-Mixtral: a Mixtral whose experts have dReLU, and a predictor each.

transformers does not have it: the reference is its Mixtral, with experts as the published code computes them.
pytest tests/integration/test_turbosparse_mixtral.py
"""

from collections.abc import Callable
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.coordinator.models.hf.folders import changed
from tests.integration.command import needs_two_cores
from tests.integration.gpu import MIXTURE, Restless, budget_for, watch
from tests.integration.reference import choices, llama_from_folder
from warmfront.coordinator.engine.engine import Engine
from warmfront.shared.errors import UsageError

Make = Callable[..., Path]
Tensors = dict[str, torch.Tensor]
PROMPT = [5, 17, 200, 42, 101, 7, 250, 33]
NEW_TOKENS, RANK = 32, 40


def with_predictors(tensors: Tensors) -> Tensors:
    """Random ones, with which a neuron is left out as often as not."""
    generator = torch.Generator().manual_seed(9)
    for name in [*tensors]:
        if name.endswith(".w1.weight"):
            ffn, hidden = tensors[name].shape
            at = name.removesuffix("w1.weight") + "predictor."
            tensors[f"{at}fc1.weight"] = torch.randn(RANK, hidden, generator=generator)
            tensors[f"{at}fc2.weight"] = torch.randn(ffn, RANK, generator=generator)
    return tensors


@pytest.fixture(scope="module")
def mixtral(tiny_family: Make) -> Path:
    return tiny_family("mixtral")


@pytest.fixture(scope="module")
def folder(mixtral: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("turbosparse") / "model"
    return changed(mixtral, path, with_predictors, model_type="turbosparsemixtral", hidden_act="relu")


def reference(mixtral: Path, predictors: Tensors) -> Any:
    """The Mixtral of a folder with dReLU and, behind the prompt, with predictors, if there are any."""
    model = llama_from_folder(mixtral)
    for number, layer in enumerate(model.model.layers):
        at, experts = f"model.layers.{number}.block_sparse_moe.experts.", layer.mlp.experts
        own = {name.removeprefix(at): tensor for name, tensor in predictors.items() if name.startswith(at)}
        experts.forward = partial(experts_forward, experts, own)
    return model


def experts_forward(
    experts: Any, predictors: Tensors, x: torch.Tensor, index: torch.Tensor, weights: torch.Tensor
) -> torch.Tensor:
    out = torch.zeros_like(x)
    for token, turn in product(range(len(x)), range(index.shape[1])):
        number = int(index[token, turn])
        gate, up = (experts.gate_up_proj[number] @ x[token]).chunk(2)
        neurons = gate.relu() * up.relu()
        if predictors and token >= len(PROMPT):
            fc1, fc2 = (predictors[f"{number}.predictor.{part}.weight"] for part in ("fc1", "fc2"))
            neurons = neurons * (fc2 @ (fc1 @ x[token]).relu()).sigmoid().round()
        out[token] += weights[token, turn] * (experts.down_proj[number] @ neurons)
    return out


@pytest.mark.parametrize(
    "overrides",
    [
        {},
        {"attention": "host"},
        {"selector": "exact"},
        {"selector": "all"},
        pytest.param({"workers": 2}, marks=needs_two_cores),
        {"gpu": "host", "vram_budget": budget_for(4, hidden=64, ffn=15 * 32, longest=MIXTURE)},
    ],
    ids=["predicted", "torch", "exact", "all", "two workers", "gpu with moves"],
)
def test_tokens(folder: Path, mixtral: Path, overrides: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    with Engine.load(str(folder), dtype="f32", verify=True, **overrides) as engine:
        selector = engine.plan.selector.name
        assert selector == overrides.get("selector", "lowrank")
        if "gpu" in overrides:
            watch(engine, Restless(), monkeypatch)
        answer = [token.id for token in engine.generate(PROMPT, max_new_tokens=NEW_TOKENS)]
        predictors = load_file(folder / "model.safetensors") if selector == "lowrank" else {}
        assert answer == choices(reference(mixtral, predictors), PROMPT, answer)[:-1]
        assert len(answer) == NEW_TOKENS
        active = engine.statistics.active_fraction(engine.statistics.workers())
        assert active is not None
        # Two experts of five.
        low, high = {"all": (0.399, 0.401), "exact": (0.05, 0.2), "lowrank": (0.02, 0.1)}[selector]
        assert low < active < high


def test_a_batch_is_predicted_as_its_tokens_are_alone(folder: Path) -> None:
    with Engine.load(str(folder), dtype="q8") as engine:
        session, batch = engine.session, [5, 9, 250, 33, 17]
        with session.text() as turn:
            session.prefill(turn, PROMPT)
            together = session.verify(turn, batch).copy()
        engine.reset()
        with session.text() as turn:
            session.prefill(turn, PROMPT)
            for token, expected in zip(batch, together, strict=True):
                assert (session.verify(turn, [token])[0] == expected).all()


def test_no_looking_ahead(folder: Path) -> None:
    with pytest.raises(UsageError, match="which experts model uses is not known ahead: leave it out"):
        Engine.load(str(folder), look_ahead=True)
