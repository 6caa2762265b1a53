"""Attention by torch on the CPU gives what the compiled team gives, with workers that are a simple function of x.

Run: pytest tests/coordinator/decode/test_torch_team.py
"""

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from tests.coordinator.decode.teams import JOBS, Workers, asked_and_said, opened, packed, place, with_predictors
from tests.family_models import MODELS
from tests.shared.model.specs import changed
from warmfront.coordinator.decode.network import STEPS
from warmfront.shared.config import DTYPES
from warmfront.shared.kernels.gemm import in_pairs
from warmfront.shared.kernels.tiles import in_tiles
from warmfront.shared.model.formats import Kind, pack, unpack
from warmfront.shared.model.store import PackedModel
from warmfront.shared.selector import ALL, LOWRANK, Selector
from warmfront.shared.wire.handoff import DONE

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
MakeLlama = Callable[..., Path]


def assert_equal(
    model: PackedModel, tolerance: float, selector: Selector = ALL, look_ahead: bool = False, device: str = "cpu"
) -> list[np.ndarray]:
    """Returns the masks of the single tokens."""
    options = {"selector": selector, "look_ahead": look_ahead}
    theirs, expected = asked_and_said(model, "compiled", **options)
    ours, got = asked_and_said(model, device, **options)
    assert np.abs(got - expected).max() < tolerance * np.abs(expected).max()
    assert len(ours) == len(theirs) == len(JOBS) * model.spec.layers
    masks = []
    for (job, x, mask), (their_job, their_x, their_mask) in zip(ours, theirs, strict=True):
        assert job == their_job
        assert np.abs(x - their_x).max() < tolerance * np.abs(their_x).max()
        if job[1] == 1:
            assert (mask == their_mask).all()
            masks.append(mask)
    if tolerance < 1e-3:
        assert (got.argmax(1) == expected.argmax(1)).all()
    return masks


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"num_key_value_heads": 4},
        {"num_key_value_heads": 1, "head_dim": 32},
        {"head_dim": 8, "rope_parameters": LLAMA3},
        {"attention_bias": True, "tie_word_embeddings": True},
    ],
    ids=["plain", "one head each", "one key head", "llama3", "biases and tied head"],
)
def test_what_the_compiled_team_says(tiny_llama: MakeLlama, options: dict[str, Any]) -> None:
    with packed(tiny_llama(**options)) as model:
        assert_equal(model, 2e-5)


@pytest.mark.parametrize("name", MODELS)
def test_every_family(tiny_family: Callable[..., Path], name: str) -> None:
    with packed(tiny_family(name)) as model:
        assert_equal(model, 5e-5)


def logits_in_float64(model: PackedModel, jobs: Sequence[list[int]] = JOBS, cached: Kind = Kind.F32) -> np.ndarray:
    """The logits after each of `jobs`, of the packed weights as they are: float64 [jobs, vocab].

    `cached`: what keys and values are rounded to, but for float32.
    """
    spec = model.spec
    ids = [token for tokens in jobs for token in tokens]
    attention, (rotary,) = spec.architecture.attention, spec.architecture.positions.rotary
    half, tokens = attention.head_dim // 2, len(ids)
    angles = np.outer(np.arange(tokens), rotary.frequencies)[:, None]

    def weights(name: str) -> np.ndarray:
        entry = model.entries[name]
        if entry.kind is None:
            return model.floats(name).astype(np.float64)
        cols = attention.heads * attention.head_dim if name.endswith(".o") else spec.hidden
        return unpack(model.bytes_of(name).reshape(entry.shape), entry.kind, cols).astype(np.float64)

    def normed(x: np.ndarray, name: str) -> np.ndarray:
        return x / np.sqrt(np.square(x).mean(1, keepdims=True) + spec.architecture.norm.epsilon) * weights(name)

    def rotated(rows: np.ndarray) -> np.ndarray:
        even, odd = rows[..., 0::2], rows[..., 1::2]
        turned = even * np.cos(angles) - odd * np.sin(angles), odd * np.cos(angles) + even * np.sin(angles)
        return np.stack(turned, axis=-1).reshape(*rows.shape[:2], 2 * half)

    def rounded(rows: np.ndarray) -> np.ndarray:
        padded = np.pad(rows, ((0, 0), (0, 0), (0, -rows.shape[2] % 32)))
        flat = padded.reshape(-1, padded.shape[2])
        exact = unpack(pack(flat.astype(np.float32), cached), cached, flat.shape[1])
        return exact.reshape(padded.shape)[:, :, : rows.shape[2]].astype(np.float64)

    x = weights("embed")[ids]
    for layer in range(spec.layers):
        at = f"layers.{layer}."
        h = normed(x, at + "attn_norm")
        q, k, v = (
            (h @ weights(at + part).T + weights(f"{at}{part}.bias")).reshape(tokens, -1, attention.head_dim)
            for part in "qkv"
        )
        q, k = rotated(q), rotated(k)
        k, v = (part if cached == Kind.F32 else rounded(part) for part in (k, v))
        k, v = (np.repeat(part, attention.heads // attention.kv_heads, axis=1) for part in (k, v))
        scores = np.einsum("ihd,jhd->hij", q, k) / np.sqrt(attention.head_dim)
        behind = np.arange(tokens)[:, None] - np.arange(tokens)
        window = attention.windows[layer] if attention.windows else 0
        scores[:, (behind < 0) | ((behind >= window) & (window > 0))] = -np.inf
        chances = np.exp(scores - scores.max(2, keepdims=True))
        mixed = np.einsum("hij,jhd->ihd", chances / chances.sum(2, keepdims=True), v).reshape(tokens, -1)
        x = x + mixed @ weights(at + "o").T + weights(at + "o.bias")
        h = normed(x, at + "ffn_norm")
        x = x + np.tanh(h) / 2 - h / 5
    ends = np.cumsum([len(job) for job in jobs]) - 1
    return normed(x[ends], "norm") @ weights("head").T


@pytest.mark.parametrize("kind", ["compiled", "cpu"])
@pytest.mark.parametrize("dtype", [dtype for dtype in DTYPES if dtype not in ("auto", "f32", "q4f")])
def test_narrower_weights(tiny_llama: MakeLlama, dtype: str, kind: str) -> None:
    """What is multiplied is rounded: by torch to the type of the weights (8 and 4 bits are widened to float16), by the
    compiled team in prefill to bfloat16 where the CPU is fast at that, with 8 and 4 bits to 8 bits where it multiplies
    bytes, and by the cache of both to float16. The errors of some ten roundings on the way add up, each of half a unit
    in the last place."""
    with packed(tiny_llama(attention_bias=True), dtype) as model:
        rows = int(model.entries["embed"].kind or 0)
        rounds_to_bfloat = dtype == "bf16" if kind == "cpu" else in_pairs(rows)
        rounds_to_bytes = kind == "compiled" and in_tiles(rows)
        half_unit = 2.0**-8 if rounds_to_bytes else 2.0**-9 if rounds_to_bfloat else 2.0**-11
        exact, (_, got) = logits_in_float64(model), asked_and_said(model, kind)
        assert np.abs(got - exact).max() < 10 * half_unit * np.abs(exact).max()


@pytest.mark.parametrize("kind", ["compiled", "cpu"])
@pytest.mark.parametrize("windows", [(7, 0), (1, 33), (64, 65)])
def test_windows(tiny_llama: MakeLlama, monkeypatch: pytest.MonkeyPatch, windows: tuple[int, int], kind: str) -> None:
    """Of each layer its own; shorter than a panel, than a tile of the cache, and hardly shorter than the text."""
    with packed(tiny_llama(attention_bias=True)) as model:
        monkeypatch.setattr(model, "spec", changed(model.spec, "architecture.attention.windows", windows))
        exact, (_, got) = logits_in_float64(model), asked_and_said(model, kind)
        assert np.abs(got - exact).max() < 2e-5 * np.abs(exact).max()


@pytest.mark.parametrize(("kind", "tolerance"), [(Kind.F16, 2e-4), (Kind.Q8, 2e-3)])
@pytest.mark.parametrize("head_dim", [16, 40])
def test_narrower_keys_and_values(tiny_llama: MakeLlama, head_dim: int, kind: Kind, tolerance: float) -> None:
    """Tokens one by one, so that only the cache rounds; a number that is almost halfway may be rounded otherwise."""
    jobs = [[token] for job in JOBS for token in job]
    with packed(tiny_llama(attention_bias=True, head_dim=head_dim)) as model:
        exact = logits_in_float64(model, jobs, kind)
        _, got = asked_and_said(model, "compiled", jobs, cache_kind=kind)
        error = np.abs(got - exact).max(1) / np.abs(exact).max()
        assert error.max() < tolerance
        assert np.abs(got - logits_in_float64(model, jobs)).max() > 2 * error.max() * np.abs(exact).max()


@pytest.mark.parametrize("look_ahead", [False, True])
@pytest.mark.parametrize("metadata", [{}, {"input": "normed", "activation": "none", "threshold": "0.5"}])
def test_predictors(tiny_llama: MakeLlama, tmp_path: Path, metadata: dict[str, str], look_ahead: bool) -> None:
    folder = with_predictors(tiny_llama(hidden_act="relu", intermediate_size=200), tmp_path / "made", **metadata)
    with packed(folder) as model:
        masks = np.array(assert_equal(model, 2e-5, LOWRANK, look_ahead))
    share = np.bitwise_count(masks).sum() / (len(masks) * 200)
    assert 0.1 < share < 0.9
    assert not (masks[:, -1] >> 8).any(), "what is padding was predicted"


def test_predictors_beside_attention(tiny_family: Callable[..., Path], tmp_path: Path) -> None:
    """With a parallel residual they read what enters the layer: of the first one the token's embedding."""
    shape = {"ffn_hidden_size": 200, "intermediate_size": 200, "num_hidden_layers": 2}
    folder = with_predictors(tiny_family("falcon new", **shape), tmp_path / "made")
    with packed(folder) as model:
        first = np.array(assert_equal(model, 2e-5, LOWRANK))[::2]
        embed = model.floats("embed").reshape(-1, 64)
    fc1, fc2 = (load_file(folder / "predictor.safetensors")[f"layers.0.{part}.weight"] for part in ("fc1", "fc2"))
    expected = np.maximum(embed[[job[0] for job in JOBS if len(job) == 1]] @ fc1.T, 0) @ fc2.T > 0
    got = np.unpackbits(first.view(np.uint8), axis=1, bitorder="little")[:, :200]
    assert (got == expected).all()


@pytest.mark.gpu
@pytest.mark.parametrize(("dtype", "tolerance"), [("f32", 1e-4), ("bf16", 3e-2)])
def test_a_real_card(tiny_llama: MakeLlama, tmp_path: Path, dtype: str, tolerance: float) -> None:
    if not torch.cuda.is_available():
        pytest.skip("torch sees no CUDA device")
    with packed(tiny_llama(attention_bias=True), dtype) as model:
        assert_equal(model, tolerance, device="cuda:0")
    folder = with_predictors(tiny_llama(hidden_act="relu", intermediate_size=200), tmp_path / "made")
    with packed(folder) as model:
        assert_equal(model, 1e-4, LOWRANK, device="cuda:0")


def test_times_and_inputs_of_a_job(tiny_llama: MakeLlama) -> None:
    with packed(tiny_llama()) as model:
        workers = Workers(model)
        team = opened(model, workers, "cpu")
        before = time.monotonic_ns()
        for tokens in ([5, 6, 7], [8]):
            workers.asked.clear()
            assert team.run(tokens, [place(0)], False, decode=len(tokens) == 1, capture=True) == DONE
            inputs = team.captured(len(tokens))
            assert inputs.shape == (2, len(tokens), 64)
            for (_, x, _), given in zip(workers.asked, inputs, strict=True):
                np.testing.assert_array_equal(x, given)
        steps, spans = team.times()
        assert steps.shape == (2, len(STEPS))
        assert before < steps[0, 0]
        assert (np.diff(steps.ravel()) >= 0).all()
        assert ((spans > steps[:, :1, None]) & (spans < steps[:, -1:, None])).all()
        assert not team.logits.any(), "logits that nobody wanted"
        team.stop()
        workers.end()
