"""Folders that are no language model that runs: one line says what each is.

pytest tests/coordinator/models/hf/test_refusals.py
"""

import json
from pathlib import Path
from typing import Any

import pytest

from warmfront.coordinator.models.open import open_source
from warmfront.shared.errors import ModelError

LLAMA = {"model_type": "llama"}
WEIGHTS = ["model.safetensors"]


@pytest.mark.parametrize(
    ("config", "files", "message"),
    [
        (LLAMA, ["pytorch_model.bin"], r"has its weights only as pytorch_model\.bin, which is pickled: loading"),
        (LLAMA, ["pytorch_model-00001-of-00002.bin"], "which is pickled: .*; save them as model.safetensors"),
        (LLAMA, ["consolidated.00.pth"], "only as consolidated"),
        (LLAMA, ["training_args.bin", "optimizer.pt"], r"has no model\.safetensors"),
        (LLAMA, ["model.onnx"], r"has weights of another program, model\.onnx; give safetensors or a GGUF file"),
        (LLAMA, ["b.gguf", "a.gguf"], r"has GGUF files and no safetensors; give one of them, such as a\.gguf"),
        (None, ["a.gguf"], r"give one of them, such as a\.gguf"),
        (None, ["adapter_config.json", "adapter_model.safetensors"], r"is an adapter \(LoRA\) without the model"),
        (LLAMA, ["adapter_config.json", *WEIGHTS], "has an adapter, which is not supported; merge it into the model's"),
        (LLAMA | {"quantization_config": {"quant_method": "hqq"}}, WEIGHTS, "is quantised by hqq, which is not"),
        (LLAMA | {"quantization_config": {"quant_method": "aqlm"}}, WEIGHTS, "by aqlm.*; give the unquantised model"),
        (LLAMA | {"quantization_config": {"quant_method": "bitsandbytes"}}, WEIGHTS, "is quantised by bitsandbytes"),
        (LLAMA | {"quantization_config": {"load_in_4bit": True}}, WEIGHTS, "is quantised by some method"),
        (LLAMA, ["quantize_config.json", *WEIGHTS], "is quantised by gptq"),
        (LLAMA, ["quant_config.json", *WEIGHTS], "is quantised by awq"),
        (LLAMA | {"quantization": {"bits": 4}, "quantization_config": {"bits": 4}}, WEIGHTS, "is quantised by MLX"),
        ({"model_type": "llava", "vision_config": {"a": 1}}, WEIGHTS, "'llava' sees or hears.*: only models of"),
        ({"model_type": "ultravox", "audio_config": {"a": 1}}, WEIGHTS, "'ultravox' sees or hears"),
        ({"model_type": "bert"}, WEIGHTS, "'bert' is an encoder, which writes no text"),
        ({"model_type": "new", "architectures": ["NewForMaskedLM"]}, WEIGHTS, "'new' is an encoder"),
        ({"model_type": "t5", "is_encoder_decoder": True}, WEIGHTS, "'t5' is an encoder with a decoder"),
        (None, ["model_index.json", "unet"], "is a pipeline of diffusers, which makes pictures or the like; give a"),
        ({"model_type": "mamba"}, WEIGHTS, "model type 'mamba' is not supported; .*llama.* are"),
        (None, [], r"has no config\.json; give a Hugging Face folder or a GGUF file"),
        ({}, WEIGHTS, "model type '' is not supported"),
    ],
)
def test_what_a_folder_is_instead(tmp_path: Path, config: Any, files: list[str], message: str) -> None:
    """The weights are empty: nothing of them is read."""
    if config is not None:
        (tmp_path / "config.json").write_text(json.dumps(config))
    for file in files:
        (tmp_path / file).touch()
    with pytest.raises(ModelError, match=message) as caught:
        open_source(tmp_path)
    assert str(caught.value).startswith(str(tmp_path))
    assert "\n" not in str(caught.value)
