"""--activation, against transformers with the activation put in its place.

Run: pytest tests/integration/test_activations.py
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.activations import described
from tests.integration.command import assert_refused, prepack, run
from tests.integration.gpu import budget_for
from tests.integration.reference import all_logits, llama_from_folder
from tests.integration.test_equality import LONG, assert_equal_throughout
from warmfront.coordinator.engine.engine import Engine

Make = Callable[..., Path]
SHAPE = {"hidden_act": "relu", "intermediate_size": 400}
HALF = {"gpu": "host", "policy": "static", "vram_budget": budget_for(13, hidden=64, ffn=400)}
THRESHOLD = 0.25
FORMULAS: dict[str, Callable[[Any, Any], Any]] = {
    "silu": lambda g, u: torch.nn.functional.silu(g) * u,
    "relu2": lambda g, u: g.relu() ** 2 * u,
    "drelu": lambda g, u: g.relu() * u.relu(),
    f"fatrelu:{THRESHOLD}": lambda g, u: torch.where(g > THRESHOLD, g, 0) * u,
}


def with_formula(model: Any, formula: Callable[[Any, Any], Any]) -> Any:
    """The model, in which every feed-forward layer computes with this."""
    for layer in model.model.layers:
        mlp = layer.mlp
        mlp.forward = lambda x, mlp=mlp: mlp.down_proj(formula(mlp.gate_proj(x), mlp.up_proj(x)))
    return model


@pytest.mark.parametrize(
    ("name", "overrides"),
    [(name, {"selector": "all"}) for name in FORMULAS]
    + [(name, {"selector": "exact", **HALF}) for name in FORMULAS if name != "silu"]
    + [("drelu", {"selector": "lowbit", "bits": 4, "recall": 0.9999})],
    ids=lambda value: value if isinstance(value, str) else value["selector"],
)
def test_other_activations(tiny_llama: Make, name: str, overrides: dict[str, Any]) -> None:
    """One packed file serves them all, in whatever order they come."""
    folder = tiny_llama(**SHAPE)
    model = with_formula(llama_from_folder(folder), FORMULAS[name])
    with Engine.load(str(folder), dtype="f32", activation=name, verify=True, **overrides) as engine:
        assert engine.model.spec.activation == name
        assert engine.plan.selector.name == overrides["selector"]
        if engine.plan.selector.name == "lowbit":  # misses neurons on purpose
            ours = np.stack(list(engine.forced_logits(LONG[:40], 20)))
            theirs = all_logits(model, LONG[:40])[19:]
            assert np.abs(ours - theirs).max() < 2e-2 * np.abs(theirs).max()
        else:
            assert_equal_throughout(engine, model)
        active = engine.statistics.active_fraction(engine.statistics.workers())
        assert active is not None
        most = {"relu2": 0.7, "drelu": 0.4}.get(name, 0.5) if described(name).sparse else 1
        assert active == 1 if overrides["selector"] == "all" else 0.05 < active < most
        assert engine.model.profile.get("activation", name) == name or not described(name).sparse


def test_an_activation_that_cannot_be(tiny_llama: Make) -> None:
    model = prepack(tiny_llama(**SHAPE))
    for option, words in (("swish", ["no activation 'swish'", "fatrelu:T"]), ("fatrelu:", ["no activation"])):
        assert_refused(run("generate", "-m", model, "-p", "Hi", f"--activation={option}"), 2, *words)
    assert_refused(run("info", model, "--activation=some"), 2, "no activation 'some'")
    outcome = run("generate", "-m", model, "-p", "Hi", "-n1", "--activation=silu", "--selector=exact")
    assert_refused(outcome, 2, "is not ReLU-like: it uses silu")
