"""Packing in tests: in silence, and what the safetensors library reads of it."""

from pathlib import Path

import numpy as np
from safetensors import safe_open

from warmfront.coordinator.packing.packer import ensure_packed
from warmfront.shared.config import DTYPES
from warmfront.shared.model.formats import Kind

# 80 neurons: two groups and a half.
SIZES = {"intermediate_size": 80, "attention_bias": True}
KINDS = {dtype: Kind.Q4S if dtype.startswith("q4") else Kind[dtype.upper()] for dtype in DTYPES if dtype != "auto"}


def pack(path: Path, dtype: str = "auto") -> Path:
    return ensure_packed(path, dtype, lambda line: None, lambda done, total: None)


def tensors_of(packed: Path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Everything in the file but its sums, read by the safetensors library, which checks that the tensors fill it."""
    with safe_open(packed, "np") as file:
        return {name: file.get_tensor(name) for name in set(file.keys()) - {"sums"}}, file.metadata()
