"""Folders of gpt-oss, also in MXFP4, as they are published.

pytest tests/coordinator/models/hf/test_expert_stacks.py
"""

import json
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from tests.coordinator.models.hf.folders import changed, edited
from warmfront.coordinator.models.open import open_source
from warmfront.shared.errors import ModelError
from warmfront.shared.model.formats import Kind, unpack

Make = Callable[..., Path]
Tensors = dict[str, torch.Tensor]
LAYERS, EXPERTS, HIDDEN, FFN = 3, 5, 64, 96
STACK = "model.layers.1.mlp.experts."
QUANTISED = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn", "lm_head"]}


def in_mxfp4(tensors: Tensors) -> Tensors:
    """Random blocks and scales instead of the experts' matrices, with some exponents at float16's end."""
    generator = torch.Generator().manual_seed(5)
    for layer in range(LAYERS):
        for name, rows, cols in (("gate_up_proj", 2 * FFN, HIDDEN), ("down_proj", HIDDEN, FFN)):
            stack = f"model.layers.{layer}.mlp.experts.{name}"
            del tensors[stack]
            shape = (EXPERTS, rows, cols // 32, 16)
            tensors[f"{stack}_blocks"] = torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)
            scales = torch.randint(118, 124, shape[:-1], generator=generator, dtype=torch.uint8)
            scales[0, 0] = 104
            tensors[f"{stack}_scales"] = scales
    return tensors


def published(tiny_family: Make, tmp_path: Path, change: Callable[[Tensors], Tensors] = in_mxfp4) -> Path:
    return changed(tiny_family("gpt oss"), tmp_path / "model", change, quantization_config=QUANTISED)


def test_mxfp4_is_what_transformers_reads(tiny_family: Make, tmp_path: Path) -> None:
    """Gates and ups lose nothing as Q8; down rows are rounded, as their blocks ran across neurons."""
    source, kept = open_source(published(tiny_family, tmp_path)), all_in_mxfp4()
    for layer in range(LAYERS):
        stack = f"model.layers.{layer}.mlp.experts."
        wide = {
            name: convert_moe_packed_tensors(
                kept[f"{stack}{name}_blocks"], kept[f"{stack}{name}_scales"], dtype=torch.float32
            ).numpy()
            for name in ("gate_up_proj", "down_proj")
        }
        for expert in range(EXPERTS):
            at = f"layers.{layer}.experts.{expert}."
            expected = {
                "gate": wide["gate_up_proj"][expert, :, 0::2].T,
                "up": wide["gate_up_proj"][expert, :, 1::2].T,
                "down": wide["down_proj"][expert],
            }
            for part, values in expected.items():
                tensor = source.tensor(at + part)
                np.testing.assert_array_equal(tensor.float32(), values, at + part)
                exact = unpack(tensor.packed(Kind.Q8), Kind.Q8, HIDDEN)
                assert np.abs(exact - values).max() <= (0 if part != "down" else np.abs(values).max() / 250)
                assert tensor.packed(Kind.Q4S).shape == (FFN, HIDDEN // 2 + HIDDEN // 16)
    assert source.notes == [
        "45 matrices of type MXFP4 are kept as Q8, gates and ups exactly; --dtype q4 rounds them to 4 bits"
    ]


def all_in_mxfp4() -> Tensors:
    stacks = product(range(LAYERS), ("gate_up_proj", "down_proj"))
    return in_mxfp4({f"model.layers.{layer}.mlp.experts.{stack}": torch.zeros(1) for layer, stack in stacks})


def without(name: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {key: values for key, values in tensors.items() if key != STACK + name}


def instead(name: str, make: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Tensors], Tensors]:
    return lambda tensors: tensors | {STACK + name: make(tensors[STACK + name]).contiguous()}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without("gate_up_proj"), "1.mlp.experts.gate_up_proj is missing; the model is incomplete$"),
        (without("down_proj_bias"), "1.mlp.experts.down_proj_bias is missing; the model is incomplete$"),
        (instead("down_proj", lambda t: t[1:]), r"down_proj has shape \(4, 96, 64\), config.json says \(5, 96, 64\)$"),
        (instead("gate_up_proj", lambda t: t.mT), r"has shape \(5, 192, 64\), config.json says \(5, 64, 192\)$"),
        (instead("gate_up_proj_bias", torch.Tensor.int), "up_proj_bias has type I32; F32, F16, BF16 are supported$"),
        (lambda t: t | {STACK + "gate": torch.zeros(1)}, "experts.gate does not belong to the gpt_oss model"),
    ],
)
def test_stacks_that_are_refused(
    tiny_family: Make, tmp_path: Path, change: Callable[[Tensors], Tensors], message: str
) -> None:
    with pytest.raises(ModelError, match=message):
        open_source(changed(tiny_family("gpt oss"), tmp_path / "model", change))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without("down_proj_scales"), "1.mlp.experts.down_proj_scales is missing; the model is incomplete$"),
        (instead("down_proj_scales", lambda t: t[:, :, :1]), r"has shape \(5, 64, 1\), config.json says \(5, 64, 3\)$"),
        (instead("gate_up_proj_blocks", torch.Tensor.int), "gate_up_proj_blocks has type I32; U8 are supported$"),
        (instead("gate_up_proj_scales", lambda t: t.fill_(254)), "holds NaN or infinity, or weights too large for q8"),
    ],
)
def test_mxfp4_that_is_refused(
    tiny_family: Make, tmp_path: Path, change: Callable[[Tensors], Tensors], message: str
) -> None:
    with pytest.raises(ModelError, match=message):
        open_source(published(tiny_family, tmp_path, lambda t: change(in_mxfp4(t)))).tensor(
            "layers.1.experts.2.up"
        ).packed(Kind.Q8)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"swiglu_alpha": 1.5}, "a swiglu_alpha other than 1.702 is not supported$"),
        ({"swiglu_limit": 0}, "field swiglu_limit is 0, not a positive number$"),
        ({"layer_types": ["full_attention"]}, "full_attention for each of 3 layers$"),
        ({"num_local_experts": 1 << 20}, "number of experts is 1048576, not a whole number from 1 to 16384$"),
        ({"quantization_config": {"quant_method": "mxfp8"}}, "is quantised by mxfp8, which is not supported"),
    ],
)
def test_configurations_that_are_refused(
    tiny_family: Make, tmp_path: Path, config: dict[str, Any], message: str
) -> None:
    with pytest.raises(ModelError, match=message):
        open_source(edited(tiny_family("gpt oss"), tmp_path / "model", **config))


def test_mxfp4_of_another_family(tiny_family: Make, tmp_path: Path) -> None:
    folder = edited(tiny_family("qwen3 moe"), tmp_path / "model", quantization_config=QUANTISED)
    with pytest.raises(ModelError, match="is quantised by mxfp4, which is not supported"):
        open_source(folder)


def test_older_settings_of_rope(tiny_family: Make, tmp_path: Path) -> None:
    """As the published folders have them."""
    folder = tiny_family("gpt oss")
    rope: dict[str, Any] = json.loads((folder / "config.json").read_text())["rope_parameters"]
    older = edited(
        folder, tmp_path / "model", rope_parameters=None, rope_scaling=rope, rope_theta=rope.pop("rope_theta")
    )
    assert open_source(older).spec.architecture == open_source(folder).spec.architecture
