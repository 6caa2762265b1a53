"""Windows of attention, 8-bit keys and values, and texts of several thousand tokens.

Run: pytest tests/integration/test_long_contexts.py
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from tests.integration.command import assert_refused, needs_two_cores, prepack, run
from tests.integration.reference import all_logits, llama_from_folder
from warmfront.coordinator.engine.engine import Engine

MakeLlama = Callable[..., Path]
IDS = [3 + (7 * i + i // 13) % 290 for i in range(300)]


def assert_logits(engine: Engine, expected: np.ndarray, ids: list[int], prefill: int, tolerance: float) -> None:
    """After the prefill and after each further token, relative to the largest logit."""
    got = np.stack(list(engine.forced_logits(ids, prefill)))
    error = np.abs(got - expected[prefill - 1 : len(ids)]).max(1) / np.abs(expected).max()
    assert error.max() < tolerance, f"error {error.max():.1e} after token {prefill - 1 + int(error.argmax())}"


@pytest.mark.parametrize("overrides", [{"workers": 1}, {"attention": "host"}], ids=["compiled", "torch"])
@pytest.mark.parametrize("window", [1, 20, 100])
def test_a_mistral_with_a_window(tiny_llama: MakeLlama, tmp_path: Path, window: int, overrides: dict[str, str]) -> None:
    folder = shutil.copytree(tiny_llama(), tmp_path / f"mistral{window}")
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "mistral", "architectures": ["MistralForCausalLM"], "sliding_window": window}
    (folder / "config.json").write_text(json.dumps(config))
    model = llama_from_folder(folder)
    assert type(model).__name__ == "MistralForCausalLM"
    expected = all_logits(model, IDS)
    assert np.abs(expected - all_logits(llama_from_folder(tiny_llama()), IDS)).max() > 1e-2, "the window hides nothing"
    with Engine.load(str(folder), dtype="f32", **overrides) as engine:
        assert_logits(engine, expected, IDS, 289, 1e-4)
        assert_logits(engine, expected, IDS[:40], 2, 1e-4)


THOUSANDS = (IDS * 15)[:4300]


@pytest.fixture(scope="module")
def long(tiny_llama: MakeLlama) -> tuple[Path, np.ndarray]:
    """A model with room for a long text, and the logits that transformers gives of it."""
    folder = tiny_llama(max_position_embeddings=5000, num_attention_heads=6, num_key_value_heads=3, hidden_size=192)
    return folder, all_logits(llama_from_folder(folder), THOUSANDS)


@pytest.mark.parametrize("kv", ["f32", "f16", "q8"])
@pytest.mark.parametrize("threads", [1, pytest.param(2, marks=needs_two_cores)])
def test_thousands_of_tokens(long: tuple[Path, np.ndarray], kv: str, threads: int) -> None:
    """More positions than attention takes at a time, of one token and of several; the error is that of the cache.

    transformers computes the angles of RoPE in float32, which is off by 2e-4 radians there.
    """
    folder, expected = long
    with Engine.load(str(folder), dtype="f32", context=4400, kv=kv, threads=threads) as engine:
        assert_logits(engine, expected, THOUSANDS, 4290, {"f32": 5e-4, "f16": 3e-2, "q8": 1e-1}[kv])


@pytest.mark.parametrize("kv", ["f32", "f16", "q8"])
def test_what_an_earlier_text_left_behind_changes_no_bit(tiny_llama: MakeLlama, kv: str) -> None:
    """Decoding reads whole tiles, also what is behind the text."""
    ids = IDS[50:100]
    with Engine.load(str(tiny_llama()), dtype="f32", kv=kv, workers=1) as engine:
        fresh = np.array(list(engine.forced_logits(ids, 3)))
        list(engine.forced_logits(IDS, 200))
        np.testing.assert_array_equal(np.array(list(engine.forced_logits(ids, 3))), fresh)


@pytest.mark.usefixtures("compiled")
def test_what_is_refused(tiny_llama: MakeLlama) -> None:
    model = str(prepack(tiny_llama(hidden_act="relu")))
    common = ("generate", "-m", model, "-p", "Hello", "-n", "2")
    assert_refused(run(*common, "--kv", "q4"), 2, "'q4'", "auto", "q8")
    assert_refused(run(*common, "--kv", "q8", "--attention", "host"), 2, "--kv q8", "--attention cpu")
    assert run(*common, "--kv", "q8").code == 0
    assert run(*common, "--kv", "f32", "--attention", "host").code == 0
