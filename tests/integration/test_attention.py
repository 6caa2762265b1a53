"""The engine with attention by torch, emulated on the CPU, beside real workers.

Run: pytest tests/integration/test_attention.py
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.integration.command import assert_refused, prepack, run
from tests.integration.gpu import budget_for
from tests.integration.reference import all_logits, choices, llama_from_folder
from warmfront.coordinator import Engine

PROMPT = [3 + (7 * i + i // 13) % 290 for i in range(300)]  # two prefill jobs
TOKENS = 24


@pytest.mark.parametrize(
    "overrides",
    [{}, {"gpu": "host", "vram_budget": budget_for(13, hidden=64, ffn=400), "selector": "exact"}],
    ids=["cpu workers", "emulated gpu worker"],
)
def test_tokens_and_logits_are_those_of_transformers(
    tiny_llama: Callable[..., Path], overrides: dict[str, Any]
) -> None:
    folder = tiny_llama(hidden_act="relu", intermediate_size=400, attention_bias=True)
    model = llama_from_folder(folder)
    with Engine.load(str(folder), dtype="f32", attention="host", verify=True, **overrides) as engine:
        answer = [token.id for token in engine.generate(PROMPT, max_new_tokens=TOKENS)]
        assert answer == choices(model, PROMPT, answer)[:-1]
        ids = [*PROMPT, 5, 6, 7, 8]
        got = np.array(list(engine.forced_logits(ids, len(PROMPT))))
    expected = all_logits(model, ids)[len(PROMPT) - 1 :]
    assert np.abs(got - expected).max() < 1e-4 * np.abs(expected).max()


@pytest.mark.usefixtures("compiled")
def test_what_is_refused(tiny_llama: Callable[..., Path]) -> None:
    model = str(prepack(tiny_llama(hidden_act="relu")))
    common = ("generate", "-m", model, "-p", "Hello", "-n", "2", "--attention")
    assert_refused(run(*common, "gpu"), 2, "'gpu'", "auto, cpu, host or cuda:N")
    assert_refused(run(*common, "cuda:99"), 2, "--attention cuda:99, but", "torch")
    assert_refused(run(*common, "host", "--selector", "lowbit"), 2, "--selector lowbit", "--attention cpu")
    assert run(*common, "host").code == 0
