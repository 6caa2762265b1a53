"""Copies of model folders with changes, and what transformers reads of one."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
import transformers

from warmfront.coordinator.models.source import Source

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
LINEAR = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.5}


def state(folder: Path) -> dict[str, torch.Tensor]:
    model = transformers.LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return dict(model.state_dict())


def edited(folder: Path, target: Path, **changes: Any) -> Path:
    """A copy of the folder with fields of config.json replaced; None removes one."""
    shutil.copytree(folder, target)
    config = json.loads((target / "config.json").read_text()) | changes
    (target / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not None}))
    return target


def changed(
    folder: Path, target: Path, change: Callable[[dict[str, torch.Tensor]], dict[str, Any]], **config: Any
) -> Path:
    """A copy with other weights, and fields of config.json replaced."""
    copy = edited(folder, target, **config)
    tensors = safetensors.torch.load_file(copy / "model.safetensors")
    safetensors.torch.save_file(change(tensors), copy / "model.safetensors", {"format": "pt"})
    return copy


def frequencies_of(source: Source) -> tuple[float, ...]:
    """Of the one rotary table that all layers have."""
    (rotary,) = source.spec.architecture.positions.rotary
    return rotary.frequencies
