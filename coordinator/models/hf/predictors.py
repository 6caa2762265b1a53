"""Low-rank predictors of a folder, from where they are found first:

predictor.safetensors       layers.{i}.fc1.weight [r, hidden] and .fc2.weight [ffn, r], with or without fc1.bias and
                            fc2.bias; fields of `Predictor` as metadata, all optional
model_0.pt, model_1.pt ...  a file for each layer, as PowerInfer and SparkInfer publish them: fc1.weight, fc2.weight
                            and, if SparkInfer's (which look ahead, at the normed input), fc1.bias and fc2.bias
the model's own files       model.layers.{i}.mlp.predictor.fc1.weight and .fc2.weight (TurboSparse-Mistral)
                            ...block_sparse_moe.experts.{e}.predictor.fc1.weight and .fc2.weight (TurboSparse-Mixtral)
"""

import json
import re
import struct
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from warmfront.coordinator.models.fields import faults_of
from warmfront.coordinator.models.hf.folder import inside
from warmfront.coordinator.models.hf.safetensors_file import KINDS, read_safetensors
from warmfront.coordinator.models.hf.torch_file import read_state_dict
from warmfront.coordinator.models.stored_tensor import StoredTensor
from warmfront.shared.errors import ModelError
from warmfront.shared.files import published, write_all
from warmfront.shared.model.spec import ModelSpec, Predictor
from warmfront.shared.model.tensors import predictor_shapes

__all__ = ["INNER", "read_predictor_file", "read_predictors", "write_predictor_file"]

# In the names of a model's own tensors.
INNER = re.compile(r"\.mlp\.predictor\.|\.block_sparse_moe(\.experts\.\d+\.)predictor\.")
Stored = Mapping[str, StoredTensor[str]]
Array = npt.NDArray[np.float16] | npt.NDArray[np.float32]


def read_predictors(folder: Path, inner: Stored, spec: ModelSpec) -> tuple[Predictor | None, Stored]:
    """The predictors' settings, and their tensors by our names; `inner`: those in the model's files.

    Raises ModelError for a tensor that is missing, unknown or of a wrong shape.
    """
    if (path := folder / "predictor.safetensors").exists():
        predictor, tensors, _ = read_predictor_file(inside(folder, path.name), spec)
        return predictor, tensors
    if (folder / "model_0.pt").exists():
        return _from_torch(folder, spec)
    if inner:
        short = {name: INNER.sub(lambda found: found[1] or ".", name).removeprefix("model.") for name in inner}
        named = {short[name]: tensor for name, tensor in inner.items()}
        # Those of experts read what these read.
        mixture = spec.architecture.feed_forward.experts is not None
        return _checked(folder, named, Predictor(input="normed" if mixture else "residual"), spec)
    return None, {}


def read_predictor_file(path: Path, spec: ModelSpec) -> tuple[Predictor, Stored, dict[str, str]]:
    """The settings, the tensors by our names, and all metadata of a file like predictor.safetensors.

    Raises ModelError as `read_predictors` does.
    """
    values, metadata = read_safetensors(path, "make it anew or remove it")
    return *_checked(path, values, _settings(path, values, metadata), spec), metadata


def write_predictor_file(path: Path, layers: Sequence[Mapping[str, Array]], metadata: Mapping[str, str]) -> None:
    """Write such a file: of each layer fc1.weight, fc2.weight and so on, float16 or float32. Raises OSError."""
    tensors = {f"layers.{i}.{part}": values for i, layer in enumerate(layers) for part, values in layer.items()}
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    at = 0
    for name, values in tensors.items():
        element = {"float16": "F16", "float32": "F32"}[values.dtype.name]
        header[name] = {"dtype": element, "shape": values.shape, "data_offsets": [at, at + values.nbytes]}
        at += values.nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with published(path) as fd:
        done = 0
        for piece in (struct.pack("<Q", len(text)), text, *tensors.values()):
            data = piece if isinstance(piece, bytes) else piece.tobytes()
            write_all(fd, data, done)
            done += len(data)


def _settings(path: Path, values: Stored, metadata: Mapping[str, str]) -> Predictor:
    settings: dict[str, Any] = {name: metadata[name] for name in ("input", "activation") if name in metadata}
    settings["biases"] = tuple(part for part in ("fc1", "fc2") if f"layers.0.{part}.bias" in values)
    try:
        threshold = float(metadata.get("threshold", 0))
    except ValueError:
        raise ModelError(f"{path}: threshold '{metadata['threshold']}' is not a number; write one like 0.5") from None
    with faults_of(path):
        return Predictor(**settings, threshold=threshold)


def _from_torch(folder: Path, spec: ModelSpec) -> tuple[Predictor, Stored]:
    values: dict[str, StoredTensor[str]] = {}
    for layer in range(spec.layers):
        name = f"model_{layer}.pt"
        if not (folder / name).exists():
            raise ModelError(f"{folder / name} is missing: there must be predictors for each of {spec.layers} layers")
        values |= {f"layers.{layer}.{part}": tensor for part, tensor in read_state_dict(inside(folder, name)).items()}
    biased = "layers.0.fc1.bias" in values
    how = Predictor(input="normed", look_ahead=True, biases=("fc1", "fc2")) if biased else Predictor()
    return _checked(folder / "model_0.pt", values, how, spec)


def _checked(path: Path, values: Stored, predictor: Predictor, spec: ModelSpec) -> tuple[Predictor, Stored]:
    left, tensors = dict(values), {}
    shapes = {name.removesuffix(".weight"): found.shape for name, found in values.items()}
    for name, shape in predictor_shapes(replace(spec, predictor=predictor), shapes):
        published = name if name.endswith(".bias") else f"{name}.weight"
        found = left.pop(published, None)
        if found is None:
            raise ModelError(f"{path}: tensor {published} is missing; make predictors for every layer")
        if found.shape != shape:
            raise ModelError(
                f"{path}: tensor {published} has shape {found.shape} instead of {shape}; it is of another model"
            )
        if found.type not in KINDS:
            raise ModelError(f"{path}: tensor {published} has type {found.type}; save it as one of {', '.join(KINDS)}")
        tensors[name] = found
    if left:
        raise ModelError(
            f"{path}: tensor {min(left)} is unknown; only fc1, fc2 and their biases are read, of each layer the same"
        )
    return predictor, tensors
