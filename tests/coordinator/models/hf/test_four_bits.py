"""Folders rounded by GPTQ and AWQ, against the definition.  pytest tests/coordinator/models/hf/test_four_bits.py

The reference packs and widens number by number, in Python; the whole model is compared with transformers, which gets
the widened weights.
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file
from transformers import AutoModelForCausalLM

from warmfront.coordinator.models.hf.reader import HfSource
from warmfront.coordinator.models.source import head_order
from warmfront.coordinator.packing.packer import PackingPlan
from warmfront.shared.errors import ModelError
from warmfront.shared.model.formats import Kind, unpack

GROUP, TURNS = 32, (0, 2, 4, 6, 1, 3, 5, 7)
Folder = Callable[..., tuple[Path, dict[str, np.ndarray]]]


def words(numbers: np.ndarray, turns: tuple[int, ...]) -> np.ndarray:
    """Eight numbers of each row to a word, by the definition."""
    rows, cols = numbers.shape
    out = np.zeros((rows, cols // 8), np.uint32)
    for i in range(rows):
        for j in range(cols // 8):
            for place, turn in enumerate(turns):
                out[i, j] |= np.uint32(int(numbers[i, 8 * j + turn]) << 4 * place)
    return out.view(np.int32)


@pytest.fixture
def folder(tiny_llama: Callable[..., Path], tmp_path: Path) -> Folder:
    """A factory of folders, and the weights that they stand for."""

    def make(method: str, *, symmetric: bool = False, settings: dict[str, Any] | None = None) -> Any:
        plain, out = tiny_llama(dtype="float16"), tmp_path / method
        shutil.copytree(plain, out)
        rng, tensors, meant = np.random.default_rng(3), load_file(plain / "model.safetensors"), {}
        version = (settings or {}).get("checkpoint_format", "gptq")
        for name in [each for each in tensors if each.endswith("proj.weight")]:
            outputs, inputs = tensors.pop(name).shape
            numbers = rng.integers(0, 16, (outputs, inputs))
            zeros = rng.integers(0, 16, (outputs, inputs // GROUP))
            if symmetric:
                zeros[:] = 8
            scales = rng.uniform(0.005, 0.03, zeros.shape).astype(np.float16)
            base = name.removesuffix("weight")
            if method == "awq":
                tensors[f"{base}qweight"] = words(numbers.T, TURNS)
                tensors[f"{base}qzeros"] = words(zeros.T, TURNS)
            else:
                tensors[f"{base}qweight"] = np.ascontiguousarray(words(numbers, tuple(range(8))).T)
                stored = zeros.T - 1 & 15 if version == "gptq" else zeros.T
                tensors[f"{base}qzeros"] = words(stored, tuple(range(8)))
                tensors[f"{base}g_idx"] = (np.arange(inputs) // GROUP).astype(np.int32)
            tensors[f"{base}scales"] = np.ascontiguousarray(scales.T)
            groups = [[(zeros[i, j // GROUP], scales[i, j // GROUP]) for j in range(inputs)] for i in range(outputs)]
            meant[name] = np.array(
                [
                    [(int(numbers[i, j]) - int(groups[i][j][0])) * float(groups[i][j][1]) for j in range(inputs)]
                    for i in range(outputs)
                ]
            )
        save_file(tensors, out / "model.safetensors")
        config = json.loads((out / "config.json").read_text())
        config["quantization_config"] = {"quant_method": method, "bits": 4, "group_size": GROUP} | (settings or {})
        (out / "config.json").write_text(json.dumps(config))
        return out, meant

    return make


def matrices(source: HfSource) -> dict[str, np.ndarray]:
    """The packed matrices of the first layer, widened, in float64."""
    plan, found = PackingPlan(source, "auto"), {}
    for part in "qkvo":
        name = f"layers.0.{part}"
        tensor = source.tensor(name)
        found[part] = unpack(np.concatenate([*plan.data(name)]), plan.kinds[name], tensor.shape[1])[: tensor.shape[0]]
    layout, groups = plan.layout, np.concatenate([*plan.data("layers.0.ffn")])
    bundles = groups[:, : layout.tail_offset].reshape(-1, layout.bundle_bytes)
    for part in ("gate", "up"):
        at, kind = layout.place_of(part)
        found[part] = unpack(np.ascontiguousarray(bundles[:, at : at + layout.gate_row_bytes]), kind, layout.hidden)
    assert layout.down_kind == Kind.Q4C
    rows = bundles[:, layout.down_offset : layout.down_offset + layout.down_row_bytes].reshape(len(groups), 32, -1, 16)
    numbers = np.concatenate((rows & 15, rows >> 4), axis=3).reshape(len(groups), 32, layout.hidden)
    tails = np.ascontiguousarray(groups[:, layout.tail_offset : layout.tail_offset + 4 * layout.hidden])
    scale, minimum = np.split(tails.view(np.float16).astype(np.float64), 2, axis=1)
    found["down"] = (numbers * scale[:, None] + minimum[:, None]).reshape(-1, layout.hidden)
    return {part: values.astype(np.float64) for part, values in found.items()}


NAMES = {part: f"self_attn.{part}_proj" for part in "qkvo"} | {part: f"mlp.{part}_proj" for part in ("gate", "up")}


@pytest.mark.parametrize(
    ("method", "symmetric", "settings"),
    [
        ("gptq", True, {}),
        ("gptq", False, {}),
        ("gptq", False, {"checkpoint_format": "gptq_v2"}),
        ("awq", False, {"version": "gemm", "zero_point": True}),
    ],
)
def test_nothing_is_rounded_again(folder: Folder, method: str, symmetric: bool, settings: dict[str, Any]) -> None:
    path, meant = folder(method, symmetric=symmetric, settings=settings)
    source = HfSource(path)
    kind = Kind.Q4S if symmetric else Kind.Q4
    assert source.tensor("layers.0.q").kind == source.tensor("layers.1.gate").kind == kind
    found, head_dim = matrices(source), source.spec.architecture.attention.head_dim
    order = head_order(head_dim, head_dim)
    # A minimum is rounded to float16, by 2^-12 of 15 steps at the most; a scale is not.
    most = 0 if symmetric else 0.03 * 15 * 2.0**-11
    for part, values in found.items():
        expected = meant[f"model.layers.0.{'mlp.down_proj' if part == 'down' else NAMES[part]}.weight"]
        if part in "qk":
            expected = expected.reshape(-1, head_dim, expected.shape[1])[:, order].reshape(expected.shape)
        expected = expected.T if part == "down" else expected
        np.testing.assert_allclose(values[: len(expected)], expected, rtol=0, atol=max(most, 1e-9), err_msg=part)
    exact = source.tensor("layers.1.down").float32()
    np.testing.assert_allclose(exact.T, meant["model.layers.1.mlp.down_proj.weight"], rtol=1e-6)


@pytest.mark.parametrize("method", ["gptq", "awq"])
def test_whole_models_say_what_transformers_says(folder: Folder, tmp_path: Path, method: str) -> None:
    from warmfront.coordinator import Engine

    # With zeros of 8 all weights are exact.
    path, meant = folder(method, symmetric=True)
    plain = tmp_path / "plain"
    shutil.copytree(path, plain)
    config = json.loads((plain / "config.json").read_text())
    del config["quantization_config"]
    (plain / "config.json").write_text(json.dumps(config))
    kept = load_file(path / "model.safetensors").items()
    tensors = {name: value for name, value in kept if not name.endswith(("qweight", "qzeros", "scales", "g_idx"))}
    save_file(
        {name: value.astype(np.float32) for name, value in (tensors | meant).items()}, plain / "model.safetensors"
    )
    model, ids = AutoModelForCausalLM.from_pretrained(plain, dtype=torch.float32), [1, 7, 3, 40, 22, 9, 9, 31]
    with torch.inference_mode():
        expected = model(torch.tensor([ids])).logits[0, -1].numpy()
    with Engine.load(str(path), workers=1, threads=1, kv="f32", tuning=False) as engine:
        # Decoded, not read as a prompt: that rounds its inputs to 8 bits.
        *_, logits = (engine.step(token).copy() for token in ids)
    np.testing.assert_allclose(logits[: len(expected)], expected, atol=1e-3 * np.abs(expected).max(), rtol=1e-3)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"bits": 8}, "weights of 8 bits are not supported in folders; give a GGUF"),
        ({"checkpoint_format": "marlin"}, "version marlin of gptq is not supported"),
    ],
)
def test_what_is_not_read_is_named(folder: Folder, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        HfSource(folder("gptq", settings=settings)[0])


@pytest.mark.parametrize(
    ("part", "change", "message"),
    [
        ("g_idx", lambda values: values[::-1].copy(), "mixes the groups' inputs"),
        ("qzeros", lambda values: values[:-1].copy(), "do not fit each other"),
        ("scales", lambda values: values.astype(np.float32), "has type F32 instead of F16"),
        ("scales", lambda values: values * np.float16(np.inf), "holds NaN or infinity"),
        ("scales", None, "scales is missing"),
        ("qweight", lambda values: values.reshape(-1), "are not matrices"),
    ],
)
def test_damaged_parts(folder: Folder, part: str, change: Any, message: str) -> None:
    path, _ = folder("gptq")
    tensors = load_file(path / "model.safetensors")
    name = f"model.layers.1.mlp.up_proj.{part}"
    value = tensors.pop(name)
    if change is not None:
        tensors[name] = change(value)
    save_file(tensors, path / "model.safetensors")

    def read() -> None:
        plan = PackingPlan(HfSource(path), "auto")
        for each in plan.shapes:
            list(plan.data(each))

    with pytest.raises(ModelError, match=message):
        read()
