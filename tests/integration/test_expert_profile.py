"""`warmfront profile` of a mixture, against transformers' router.  pytest tests/integration/test_expert_profile.py"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.integration.command import assert_refused, prepack, run
from tests.integration.gpu import MIXTURE, budget_for
from tests.integration.reference import llama_from_folder
from warmfront.coordinator.engine.engine import Engine
from warmfront.coordinator.profile.sample_text import SAMPLE_TEXT
from warmfront.shared.model.bundle import GROUP

GROUPS, SLOTS = 39, 40  # of a layer: two for each of 18 experts, three of the shared one

pytestmark = pytest.mark.usefixtures("compiled")


@pytest.fixture(scope="module")
def model(tiny_family: Callable[..., Path], tiny_llama: Callable[..., Path], tmp_path_factory: Any) -> Path:
    """A mixture with a tokenizer."""
    folder = shutil.copytree(tiny_family("qwen2 moe", hidden_act="silu"), tmp_path_factory.mktemp("mixture") / "model")
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tiny_llama() / file, folder)
    return folder


def test_experts_are_counted_and_the_gpu_begins_with_the_busiest(model: Path, tmp_path: Path) -> None:
    text = tmp_path / "mine.txt"
    text.write_text(SAMPLE_TEXT[:700])
    outcome = run("profile", prepack(model), "--text", text, "--json", timeout=120)
    assert outcome.code == 0, outcome.err
    facts = json.loads(outcome.out)
    with Engine.load(str(model), gpu="host", vram_budget=budget(), policy="static") as engine:
        ids = engine.tokenizer.encode(text.read_text())
        held = engine.ownership.resident[-1].copy()
    assert facts["tokens"] == len(ids)
    assert (facts["experts"], facts["active"], facts["texts"]) == (18, 3, ["mine.txt"])
    uses = np.zeros((len(facts["shares"]), 18))
    reference = llama_from_folder(model)
    for at in range(0, len(ids), 288):
        chosen = reference(torch.tensor([ids[at : at + 288]]), output_router_logits=True).router_logits
        uses += [scores.topk(3).indices.flatten().bincount(minlength=18).numpy() for scores in chosen]
    np.testing.assert_allclose(facts["shares"], uses / uses.sum(1, keepdims=True))
    tenth = uses.max(1) / uses.sum(1)
    assert facts["busiest_tenth"] == pytest.approx({"least": tenth.min(), "mean": tenth.mean(), "most": tenth.max()})
    # The shared expert is used by all tokens; then come the experts that were chosen most.
    by_group = np.stack([np.r_[np.repeat(each, 2), np.full(3, len(ids))] for each in uses])
    assert held.sum() == SLOTS
    np.testing.assert_array_equal(np.sort(by_group[held]), np.sort(by_group, axis=None)[-SLOTS:])
    table = run("profile", model, "--text", text).out
    assert f"the 1 busiest of 18 experts get {tenth.mean():.1%} of the choices" in table
    assert f"{uses[0].argmax()} {tenth[0]:.1%}" in table


def budget() -> int:
    return budget_for(SLOTS, hidden=64, ffn=GROUPS * GROUP, longest=MIXTURE)


def test_an_order_of_neurons_is_refused(model: Path, tmp_path: Path) -> None:
    text = tmp_path / "mine.txt"
    text.write_text("some words")
    refused = run("profile", prepack(model), "--text", text, "--order", tmp_path)
    assert_refused(refused, 2, "--order, but", "mixture of experts")
