"""Predictors beside the model.  pytest tests/coordinator/models/hf/test_predictors.py"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch

from tests.coordinator.models.hf.folders import edited
from warmfront.coordinator.models.open import open_source
from warmfront.shared.errors import ModelError
from warmfront.shared.model.formats import Kind, unpack
from warmfront.shared.model.spec import Predictor

Make = Callable[..., Path]


def with_predictor(folder: Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str] | None = None) -> Path:
    safetensors.torch.save_file(tensors, folder / "predictor.safetensors", metadata)
    return folder


def predictors(dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    """Of rank 40 and 7, for `tiny_llama`."""
    generator = torch.Generator().manual_seed(3)
    shapes = {f"layers.{i}.fc1.weight": (rank, 64) for i, rank in enumerate((40, 7))}
    shapes |= {f"layers.{i}.fc2.weight": (96, rank) for i, rank in enumerate((40, 7))}
    return {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()}


@pytest.mark.parametrize(
    ("dtype", "kind"), [(torch.float32, Kind.F32), (torch.float16, Kind.F16), (torch.bfloat16, Kind.BF16)]
)
@pytest.mark.parametrize("shards", [{}, {"max_shard_size": "60KB"}])
def test_predictors(tiny_llama: Make, tmp_path: Path, dtype: torch.dtype, kind: Kind, shards: dict[str, str]) -> None:
    folder = edited(tiny_llama(**shards), tmp_path / "copy")
    plain = open_source(folder)
    assert plain.spec.predictor is None
    tensors = predictors(dtype)
    metadata = {"input": "normed", "activation": "none", "threshold": "-1.5", "format": "pt"}
    source = open_source(with_predictor(folder, tensors, metadata))
    assert source.spec == replace(plain.spec, predictor=Predictor(input="normed", activation="none", threshold=-1.5))
    assert source.names() - plain.names() == {f"layers.{i}.{part}" for i in (0, 1) for part in ("fc1", "fc2")}
    for name, values in tensors.items():
        tensor = source.tensor(name.removesuffix(".weight"))
        assert (tensor.shape, tensor.kind) == (tuple(values.shape), kind)
        np.testing.assert_array_equal(tensor.float32(), values.float())
        columns = -(-values.shape[1] // 32) * 32
        whole = unpack(tensor.packed(kind), kind, columns)
        np.testing.assert_array_equal(whole, np.pad(values.float(), ((0, 0), (0, columns - values.shape[1]))))


def test_predictor_settings_are_optional(tiny_llama: Make, tmp_path: Path) -> None:
    folder = edited(tiny_llama(), tmp_path / "copy")
    for metadata in (None, {}, {"threshold": "0"}):
        source = open_source(with_predictor(folder, predictors(), metadata))
        assert source.spec.predictor == Predictor(input="residual", activation="relu", threshold=0.0)


@pytest.mark.parametrize(
    ("metadata", "changes", "message"),
    [
        ({"input": "gate"}, {}, "predictor input 'gate' is not supported; residual and normed are"),
        ({"activation": "silu"}, {}, "predictor activation 'silu' is not supported; relu and none are"),
        ({"threshold": "low"}, {}, "threshold 'low' is not a number; write one like 0.5"),
        ({"threshold": "nan"}, {}, "predictor threshold nan is not a number"),
        ({}, {"layers.1.fc1.weight": None}, "tensor layers.1.fc1.weight is missing; make predictors for every layer"),
        ({}, {"layers.0.fc2.weight": None}, "tensor layers.0.fc2.weight is missing"),
        (
            {},
            {"layers.0.fc1.weight": (40, 32)},
            r"tensor layers.0.fc1.weight has shape \(40, 32\) instead of \(40, 64\); it is",
        ),
        ({}, {"layers.0.fc1.weight": (0, 64)}, r"tensor layers.0.fc1.weight has shape \(0, 64\)"),
        ({}, {"layers.0.fc1.weight": ()}, r"tensor layers.0.fc1.weight has shape \(\)"),
        ({}, {"layers.1.fc2.weight": (7, 96)}, r"tensor layers.1.fc2.weight has shape \(7, 96\) instead of \(96, 7\)"),
        ({}, {"layers.2.fc1.weight": (7, 64)}, "tensor layers.2.fc1.weight is unknown"),
        ({}, {"layers.0.fc1.bias": (40,)}, "tensor layers.1.fc1.bias is missing"),
        ({}, {"layers.1.fc2.bias": (96,)}, "tensor layers.1.fc2.bias is unknown"),
        ({}, {"layers.0.fc1": (40, 64)}, "tensor layers.0.fc1 is unknown"),
    ],
)
def test_predictors_that_are_refused(
    tiny_llama: Make,
    tmp_path: Path,
    metadata: dict[str, str],
    changes: dict[str, tuple[int, ...] | None],
    message: str,
) -> None:
    tensors = predictors()
    for name, shape in changes.items():
        if shape is None:
            del tensors[name]
        else:
            tensors[name] = torch.zeros(shape)
    folder = with_predictor(edited(tiny_llama(), tmp_path / "copy"), tensors, metadata)
    with pytest.raises(ModelError, match=rf"predictor\.safetensors: {message}") as caught:
        open_source(folder)
    assert "\n" not in str(caught.value)


def test_predictors_of_integers_or_damaged(tiny_llama: Make, tmp_path: Path) -> None:
    folder = with_predictor(edited(tiny_llama(), tmp_path / "copy"), predictors(torch.int8))
    with pytest.raises(
        ModelError, match=r"tensor layers\.0\.fc1\.weight has type I8; save it as one of F32, F16, BF16$"
    ):
        open_source(folder)
    (folder / "predictor.safetensors").write_bytes(b"no weights")
    with pytest.raises(ModelError, match=r"predictor\.safetensors is damaged \(.*\); make it anew or remove it$"):
        open_source(folder)


def test_predictors_alone_are_no_model(tiny_llama: Make, tmp_path: Path) -> None:
    folder = with_predictor(edited(tiny_llama(), tmp_path / "copy"), predictors())
    (folder / "model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"has no model\.safetensors"):
        open_source(folder)
