"""What a prompt uses reaches the policies, as transformers has it.  pytest tests/integration/test_prompt_loads.py"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.integration.gpu import MIXTURE, budget_for
from tests.integration.reference import llama_from_folder
from warmfront.coordinator.balancing.interface import PromptLoad
from warmfront.coordinator.engine.engine import Engine
from warmfront.shared.model.bundle import GROUP

Make = Callable[..., Path]
PROMPT = [3 + (7 * i + i // 13) % 290 for i in range(70)]
GROUPS, SLOTS = 39, 30  # of a layer: three of the shared expert, two for each of 18


@pytest.fixture
def mixture(tiny_family: Make) -> Path:
    return tiny_family("qwen2 moe", hidden_act="silu")


def load(folder: Path, policy: str, **overrides: Any) -> Engine:
    budget = budget_for(SLOTS, hidden=64, ffn=GROUPS * GROUP, longest=MIXTURE)
    return Engine.load(
        str(folder), dtype="f32", gpu="host", vram_budget=budget, policy=policy, verify=True, **overrides
    )


def uses_of(folder: Path) -> np.ndarray:
    """How many tokens of the prompt use each group, [layers, groups]."""
    chosen = llama_from_folder(folder)(torch.tensor([PROMPT]), output_router_logits=True).router_logits
    uses = [scores.topk(3).indices.flatten().bincount(minlength=18).numpy() for scores in chosen]
    # The shared expert, which has a gate, is the last branch.
    return np.stack([np.r_[np.repeat(each, 2), np.full(3, len(PROMPT))] for each in uses])


@pytest.mark.parametrize("most", [576, 32])
def test_policies_are_told_what_the_router_chose_for_a_prompt(
    mixture: Path, monkeypatch: pytest.MonkeyPatch, most: int
) -> None:
    told: list[PromptLoad] = []
    with load(mixture, "balance") as engine:
        monkeypatch.setattr(type(engine.session.runtime), "max_tokens", most)
        monkeypatch.setattr(engine.ownership.policy, "read", told.append)
        engine.decode_ids(PROMPT, 5)
        size = engine.model.layout.group_bytes
    assert [load.tokens for load in told] == ([70] if most == 576 else [32, 32, 6])
    read = sum(load.tokens * load.bytes_read for load in told)
    np.testing.assert_allclose(read, uses_of(mixture) * size)


def test_prompt_puts_what_the_prompt_used_most_on_the_gpu(mixture: Path) -> None:
    uses = uses_of(mixture)
    with load(mixture, "prompt") as engine:
        ids = engine.decode_ids(PROMPT, 40)
        ownership = engine.ownership
        held, owned = ownership.resident[-1].copy(), ownership.owners() == 1
        moves = ownership.flow.moves
    assert held.sum() == SLOTS
    assert 0 < moves <= SLOTS
    np.testing.assert_array_equal(np.sort(uses[held]), np.sort(uses, axis=None)[-SLOTS:])
    np.testing.assert_array_equal(owned, held)
    with Engine.load(str(mixture), dtype="f32") as engine:
        assert engine.decode_ids(PROMPT, 40) == ids


def test_of_neurons_it_counts_what_the_prompt_fires(tiny_llama: Make) -> None:
    folder, fired = tiny_llama(intermediate_size=800, hidden_act="relu"), []
    model = llama_from_folder(folder)
    for layer in model.model.layers:
        layer.mlp.gate_proj.register_forward_hook(lambda *args: fired.append((args[2][0] > 0).sum(0).numpy()))
    model(torch.tensor([PROMPT]))
    budget = budget_for(20, hidden=64, ffn=800)
    with Engine.load(str(folder), dtype="f32", gpu="host", vram_budget=budget, policy="prompt") as engine:
        places = engine.model.places()
        engine.decode_ids(PROMPT, 40)
        held = engine.ownership.resident[-1].copy()
    by_group = np.take_along_axis(np.stack(fired), places, 1).reshape(len(places), -1, GROUP).sum(2)
    assert held.sum() == 20
    np.testing.assert_array_equal(np.sort(by_group[held]), np.sort(by_group, axis=None)[-20:])
