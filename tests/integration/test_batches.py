"""A batch of tokens gives the logits of the same tokens one by one, bit for bit.

Run: pytest tests/integration/test_batches.py
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from tests.integration.command import needs_two_cores
from warmfront.coordinator.engine.engine import Engine
from warmfront.shared.errors import UsageError

MAKER = Path(__file__).parents[2] / "scripts" / "make_synthetic_model.py"
SHAPE = {"hidden": 256, "layers": 3, "ffn": 1024, "heads": 4, "kv-heads": 2, "vocab": 512, "rank": 31}
RNG = np.random.default_rng(8)
PROMPT = RNG.integers(259, 512, 21).tolist()
# One token alone between batches of several sizes.
BATCHES = [RNG.integers(259, 512, count).tolist() for count in (2, 16, 1, 5, 3)]

pytestmark = pytest.mark.usefixtures("compiled")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small synthetic ReLU model with predictors, as a Hugging Face folder."""
    folder = tmp_path_factory.mktemp("synthetic") / "model"
    sizes = [f"--{name}={size}" for name, size in SHAPE.items()]
    subprocess.run([sys.executable, MAKER, folder, *sizes, "--formats=hf"], check=True, capture_output=True)
    return folder / "hf"


def in_batches(engine: Engine, prompt: list[int], batches: list[list[int]]) -> np.ndarray:
    """The logits after each token of `batches`, which are accepted."""
    session, rows = engine.session, []
    engine.reset()
    with session.text() as turn:
        session.prefill(turn, prompt)
        for batch in batches:
            rows.append(session.verify(turn, batch).copy())
            for _ in batch[1:]:
                session.accept(turn)
    return np.concatenate(rows)


def one_by_one(engine: Engine, prompt: list[int], batches: list[list[int]]) -> np.ndarray:
    return in_batches(engine, prompt, [[token] for batch in batches for token in batch])


def assert_the_same(engine: Engine, prompt: list[int], batches: list[list[int]]) -> None:
    expected, got = one_by_one(engine, prompt, batches), in_batches(engine, prompt, batches)
    assert np.isfinite(expected).all()
    assert len(np.unique(expected.argmax(1))) > 1
    np.testing.assert_array_equal(got.view(np.int32), expected.view(np.int32))


@pytest.mark.parametrize(
    "overrides",
    [
        {"selector": "all"},
        {"selector": "exact"},
        {"selector": "lowrank"},
        {"selector": "lowrank", "look_ahead": True},
        {"selector": "lowbit", "bits": 2, "recall": 0.95},
        {"selector": "lowrank", "threads": 1},
        {"selector": "exact", "threads": 1},
        {"selector": "lowrank", "gpu": "host", "vram_budget": 3_000_000, "verify": True},
        {"selector": "exact", "gpu": "host", "vram_budget": 3_000_000, "verify": True},
        pytest.param({"selector": "lowrank", "workers": 2, "verify": True}, marks=needs_two_cores),
        pytest.param({"selector": "exact", "workers": 2, "verify": True}, marks=needs_two_cores),
    ],
    ids=lambda overrides: "-".join(map(str, overrides.values())),
)
def test_selectors(made: Path, overrides: dict[str, Any]) -> None:
    with Engine.load(str(made), dtype="q8", **overrides) as engine:
        assert_the_same(engine, PROMPT, BATCHES)


@pytest.mark.parametrize("dtype", ["f32", "f16", "bf16", "q4"])
@pytest.mark.parametrize("selector", ["all", "lowrank"])
def test_dtypes(made: Path, dtype: str, selector: str) -> None:
    with Engine.load(str(made), dtype=dtype, selector=selector) as engine:
        assert_the_same(engine, PROMPT, BATCHES)


@pytest.mark.parametrize("overrides", [{}, {"threads": 1}, {"gpu": "host", "vram_budget": 20_000_000}])
def test_smollm2(smollm2: Path, overrides: dict[str, Any]) -> None:
    """Down rows with the scales of columns (Q4C), behind a prompt of several blocks of positions."""
    prompt = np.random.default_rng(2).integers(300, 49000, 150).tolist()
    with Engine.load(str(smollm2), **overrides) as engine:
        assert_the_same(engine, prompt, BATCHES)


@pytest.mark.parametrize("window", [0, 20])
@pytest.mark.parametrize("kv", ["f32", "f16", "q8"])
def test_attention(tiny_llama: Callable[..., Path], tmp_path: Path, window: int, kv: str) -> None:
    """Heads that the threads divide by chunks of positions; tokens whose windows begin in different tiles."""
    made = tiny_llama(num_attention_heads=6, num_key_value_heads=3, hidden_size=192)
    folder = shutil.copytree(made, tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "mistral", "architectures": ["MistralForCausalLM"], "sliding_window": window or None}
    (folder / "config.json").write_text(json.dumps(config))
    ids = [3 + (7 * i + i // 13) % 290 for i in range(300)]
    with Engine.load(str(folder), kv=kv) as engine:
        assert_the_same(engine, ids[:90], [ids[at : at + 16] for at in range(90, 170, 16)])


def test_a_guess_that_is_not_finite(tiny_llama: Callable[..., Path], tmp_path: Path) -> None:
    """Token 7 drives a value beyond what the cache holds: as a guess it changes nothing of what is before it."""
    folder = shutil.copytree(tiny_llama(), tmp_path / "model")
    tensors = dict(load_file(folder / "model.safetensors"))
    embed, values = (tensors[f"model.{name}.weight"].copy() for name in ("embed_tokens", "layers.0.self_attn.v_proj"))
    values[0], values[0, 0] = 0, 3e4
    embed[:, 0], embed[7], embed[7, 0] = 0, 0, 5
    tensors |= {"model.embed_tokens.weight": embed, "model.layers.0.self_attn.v_proj.weight": values}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with Engine.load(str(folder), dtype="f16") as engine:
        expected = one_by_one(engine, [5, 6], [[8, 9, 10]])
        session = engine.session
        engine.reset()
        with session.text() as turn:
            session.prefill(turn, [5, 6])
            rows = [session.verify(turn, [token, 11, 7, 12]).copy() for token in (8, 9)]
            assert [len(row) for row in rows] == [1, 1]
            rows.append(session.verify(turn, [10, 11]).copy()[:1])
    np.testing.assert_array_equal(np.concatenate(rows), expected)


@pytest.mark.parametrize("delay", [0.0, 0.01, 0.03])
def test_a_gpu_worker_dies(made: Path, delay: float) -> None:
    """Between two batches or within one: the logits are those with it."""
    batches = [PROMPT[at : at + 7] for at in range(14)] * 8
    with Engine.load(str(made), dtype="q8", gpu="host", vram_budget=3_000_000, verify=True) as engine:
        expected = in_batches(engine, PROMPT, batches)
        pid = engine.session.runtime.supervisor.hellos["gpu0"].pid
        killer = threading.Timer(delay, os.kill, (pid, signal.SIGKILL))
        killer.start()
        got = in_batches(engine, PROMPT, batches)
        killer.join()
        assert engine.session.runtime.supervisor.hellos["gpu0"].pid != pid or not engine.ownership._present[-1]
    np.testing.assert_array_equal(got, expected)


def test_what_is_not_accepted_leaves_no_trace(made: Path) -> None:
    """Wrong guesses before every token, up to the end of the context."""
    with Engine.load(str(made), dtype="q8", context=64) as engine:
        tokens = RNG.integers(259, 512, 64 - len(PROMPT)).tolist()
        expected = one_by_one(engine, PROMPT, [tokens])
        session, rows = engine.session, []
        engine.reset()
        with session.text() as turn:
            session.prefill(turn, PROMPT)
            for at, token in enumerate(tokens):
                guess = RNG.integers(259, 512, min(15, len(tokens) - at - 1)).tolist()
                rows.append(session.verify(turn, [token, *guess])[0].copy())
            with pytest.raises(UsageError, match="--ctx"):
                session.verify(turn, [300])
    np.testing.assert_array_equal(np.array(rows), expected)


def test_a_batch_is_checked(tiny_llama: Callable[..., Path]) -> None:
    with Engine.load(str(tiny_llama())) as engine, engine.session.text() as turn:
        engine.session.prefill(turn, [5, 6, 7])
        with pytest.raises(UsageError, match="a job of 17 tokens: give 1 to 16"):
            engine.session.verify(turn, [5] * 17)
        with pytest.raises(UsageError, match="outside the vocabulary"):
            engine.session.verify(turn, [5, 100_000])
