"""TurboSparse-Mixtral: a Mixtral whose experts have dReLU, and a predictor each.

transformers does not have it: the reference is its Mixtral, with experts as the published code computes them.
pytest tests/integration/test_turbosparse_mixtral.py
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.coordinator.models.hf.folders import changed
from tests.integration.command import needs_two_cores
from tests.integration.gpu import Restless, budget_for, watch
from tests.integration.reference import choices, llama_from_folder
from warmfront.coordinator.engine.engine import Engine
from warmfront.coordinator.models.open import open_source

Make = Callable[..., Path]
PROMPT = [5, 17, 200, 42, 101, 7, 250, 33]
NEW_TOKENS, RANK, EXPERTS = 32, 40, 5


def with_predictors(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Random ones, with which a neuron is left out as often as not."""
    generator = torch.Generator().manual_seed(9)
    for name in [*tensors]:
        if name.endswith(".w1.weight"):
            ffn, hidden = tensors[name].shape
            at = name.removesuffix("w1.weight") + "predictor."
            tensors[f"{at}fc1.weight"] = torch.randn(RANK, hidden, generator=generator)
            tensors[f"{at}fc2.weight"] = torch.randn(ffn, RANK, generator=generator)
    return tensors


def reference(mixtral: Path) -> Any:
    """The Mixtral of the folder with dReLU."""
    model = llama_from_folder(mixtral)
    for layer in model.model.layers:
        experts = layer.mlp.experts

        def forward(
            x: torch.Tensor, index: torch.Tensor, weights: torch.Tensor, experts: Any = experts
        ) -> torch.Tensor:
            out = torch.zeros_like(x)
            for token, turn in torch.cartesian_prod(torch.arange(len(x)), torch.arange(index.shape[1])).tolist():
                number = index[token, turn]
                gate, up = (experts.gate_up_proj[number] @ x[token]).chunk(2)
                out[token] += weights[token, turn] * (experts.down_proj[number] @ (gate.relu() * up.relu()))
            return out

        experts.forward = forward
    return model


@pytest.mark.parametrize(
    "overrides",
    [
        {},
        {"selector": "all"},
        pytest.param({"workers": 2}, marks=needs_two_cores),
        {"gpu": "host", "vram_budget": budget_for(4, hidden=64, ffn=15 * 32)},
    ],
    ids=["exact", "all", "two workers", "gpu with moves"],
)
def test_tokens(tiny_family: Make, tmp_path: Path, overrides: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    mixtral = tiny_family("mixtral")
    folder = changed(mixtral, tmp_path / "model", with_predictors, model_type="turbosparsemixtral", hidden_act="relu")
    assert open_source(folder).notes == [
        f"{3 * EXPERTS * 2} tensors of predictors of experts' neurons are not used: gates tell what fires"
    ]
    with Engine.load(str(folder), dtype="f32", verify=True, **overrides) as engine:
        assert engine.plan.selector == overrides.get("selector", "exact")
        if "gpu" in overrides:
            watch(engine, Restless(), monkeypatch)
        answer = [token.id for token in engine.generate(PROMPT, max_new_tokens=NEW_TOKENS)]
        assert answer == choices(reference(mixtral), PROMPT, answer)[:-1]
        assert len(answer) == NEW_TOKENS
        active = engine.statistics.active_fraction(engine.statistics.workers())
        assert active is not None
        # Two experts of five.
        assert active == pytest.approx(0.4) if "selector" in overrides else 0.05 < active < 0.2
