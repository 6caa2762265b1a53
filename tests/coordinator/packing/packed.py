"""Packing in tests: in silence, and what the safetensors library reads of it."""

from pathlib import Path

import numpy as np
from safetensors import safe_open

from warmfront.coordinator.packing.packer import ensure_packed
from warmfront.shared.model.formats import Kind

# 80 neurons: two groups and a half.
SIZES = {"intermediate_size": 80, "attention_bias": True}
KINDS = {"f32": Kind.F32, "f16": Kind.F16, "bf16": Kind.BF16, "q8": Kind.Q8, "q4": Kind.Q4S}


def pack(path: Path, dtype: str = "auto") -> Path:
    return ensure_packed(path, dtype, lambda line: None, lambda done, total: None)


def tensors_of(packed: Path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Everything in the file but its sums, read by the safetensors library, which checks that the tensors fill it."""
    with safe_open(packed, "np") as file:
        return {name: file.get_tensor(name) for name in set(file.keys()) - {"sums"}}, file.metadata()
