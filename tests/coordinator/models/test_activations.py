"""Which activations are plausible by a model's files.  pytest tests/coordinator/models/test_activations.py"""

from pathlib import Path
from typing import Any

import pytest

from warmfront.coordinator.models.activations import in_config, in_gguf
from warmfront.coordinator.models.default_model import default_file
from warmfront.coordinator.models.fields import Fields
from warmfront.shared.errors import ModelError

UNSAID = ("silu", "relu", "drelu")


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"model_type": "llama", "hidden_act": "silu"}, ("silu",)),
        ({"model_type": "llama", "hidden_act": "relu"}, ("relu",)),  # ReluLLaMA
        ({"model_type": "llama"}, UNSAID),
        ({"model_type": "gemma2"}, ("gelu_tanh",)),
        ({"model_type": "gemma", "hidden_act": "gelu", "hidden_activation": None}, ("gelu_tanh",)),
        ({"model_type": "gemma3_text", "hidden_act": "gelu", "hidden_activation": "relu"}, ("relu",)),
        ({"model_type": "qwen3"}, ("silu",)),
        ({"model_type": "sparsellama", "hidden_act": "fatrelu", "hidden_act_param": 0.01}, ("fatrelu:0.01",)),
        ({"model_type": "minicpm", "hidden_act": "fatrelu", "hidden_act_param": 0.03}, ("fatrelu:0.03",)),
        ({"model_type": "bamboo", "hidden_act": "relu"}, ("drelu",)),
        ({"model_type": "llama_sparse_relu", "hidden_act": "silu"}, ("relu",)),
        ({"model_type": "qwen2", "hidden_act": "relu"}, ("drelu", "relu")),
        ({"model_type": "qwen2", "hidden_act": "silu"}, ("silu",)),
        ({"model_type": "llama", "hidden_act": "relu2"}, ("relu2",)),
    ],
)
def test_folders(fields: dict[str, Any], expected: tuple[str, ...]) -> None:
    assert in_config(Fields(Path("config.json"), fields)) == expected


@pytest.mark.parametrize(
    ("architecture", "name", "dialect", "expected"),
    [
        ("llama", "SmolLM2 135M", "", UNSAID),
        ("llama", "ReluLLaMA-7B", "", ("relu", "silu")),
        ("llama", "prosparse-llama-2-7b", "", ("fatrelu:0.01", "silu")),
        ("llama", "TurboSparse Mistral Instruct", "", ("drelu", "silu")),
        ("minicpm", "MiniCPM-S-1B-sft", "", ("fatrelu:0.03", "silu")),
        ("qwen2", "SparseQwen2-7B", "", ("drelu", "silu")),
        ("gemma2", "Gemma 2 2B", "", ("gelu_tanh",)),
        ("qwen3", "Qwen3 8B", "", ("silu",)),
        ("llama", "some", "powerinfer", ("relu",)),
        ("llama", "prosparse-llama-2-7b", "powerinfer", ("fatrelu:0.01",)),
        ("bamboo", "some", "powerinfer", ("drelu",)),
        ("prosparse-llama", "some", "sparkinfer", ("fatrelu:0.01",)),
        ("bamboo", "some", "sparkinfer", ("drelu",)),
        ("qwen2", "some", "sparkinfer", ("drelu",)),
    ],
)
def test_gguf_files(architecture: str, name: str, dialect: str, expected: tuple[str, ...]) -> None:
    fields = {"general.architecture": architecture, "general.name": name}
    assert in_gguf(Fields(Path("model.gguf"), fields), dialect) == expected


def test_the_default_model_is_known() -> None:
    fields = {"general.architecture": "llama", "general.name": "SmolLM2 135M"}
    assert in_gguf(Fields(default_file(), fields), "") == ("silu",)


@pytest.mark.parametrize(("name", "expected"), [("Mixtral 8x7B", "silu"), ("TurboSparse Mixtral", "drelu")])
def test_no_mixture_of_experts_is_tried(name: str, expected: str) -> None:
    fields = {"general.architecture": "llama", "general.name": name, "llama.expert_count": 8}
    assert in_gguf(Fields(Path("model.gguf"), fields), "") == (expected,)


def test_what_is_not_known() -> None:
    with pytest.raises(ModelError, match=r"activation 'softplus' is not supported; silu, .*, fatrelu are$"):
        in_config(Fields(Path("/model/config.json"), {"model_type": "llama", "hidden_act": "softplus"}))
    with pytest.raises(ModelError, match="field hidden_act_param is missing"):
        in_config(Fields(Path("/model/config.json"), {"model_type": "llama", "hidden_act": "fatrelu"}))
