"""PowerInfer's dialect of GGUF.  pytest tests/coordinator/models/gguf/test_powerinfer.py"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from tests.conftest import GGUF_SHAPES
from tests.coordinator.models.gguf.tensors import EXACT, NAMES, ROUNDED, bound
from warmfront.coordinator.models.open import open_source
from warmfront.shared.errors import ModelError
from warmfront.shared.model.formats import Kind, unpack
from warmfront.shared.model.spec import Predictor

Make = Callable[..., Path]
POWERINFER_SHAPES = {
    "blk.0.ffn_down_t.weight": (512, 256),
    "blk.0.fc1.weight": (256, 256),
    "blk.0.fc2.weight": (512, 256),
}
POWERINFER: dict[str, Any] = {"shapes": POWERINFER_SHAPES, "without": ["blk.0.ffn_down.weight"]}
POWERINFER_NAMES = {
    **NAMES,
    "layers.0.down": "blk.0.ffn_down_t",
    "layers.0.fc1": "blk.0.fc1",
    "layers.0.fc2": "blk.0.fc2",
}


def marked(path: Path) -> Path:
    """The file with the first four bytes of PowerInfer's files, which the gguf package does not read."""
    with path.open("r+b") as file:
        file.write(b"PWRI")
    return path


@pytest.mark.parametrize("mark", [marked, Path])
@pytest.mark.parametrize("kind", [*EXACT, "Q4_K", *ROUNDED])
def test_powerinfer_files(tiny_gguf: Make, kind: str, mark: Callable[[Path], Path]) -> None:
    """Rows of ffn_down_t are neurons as they lie, so every matrix keeps its blocks."""
    path = tiny_gguf(kind=kind, **POWERINFER)
    published = {t.name: gguf.dequantize(t.data, t.tensor_type) for t in gguf.GGUFReader(path).tensors}
    source = open_source(mark(path))
    assert source.spec.architecture.feed_forward.activation == "relu"
    assert source.spec.predictor == Predictor(input="residual", activation="relu", threshold=0.0)
    assert source.names() == POWERINFER_NAMES.keys()
    for name, theirs in POWERINFER_NAMES.items():
        tensor, values = source.tensor(name), published[f"{theirs}.weight"].copy()
        assert tensor.shape == values.shape
        np.testing.assert_array_equal(tensor.float32(), values, err_msg=name)
        if values.ndim == 2:
            assert tensor.kind == EXACT.get(kind, ROUNDED.get(kind, Kind.Q4)), name
            packed = unpack(tensor.packed(tensor.kind), tensor.kind, 256)
            if kind in EXACT:
                np.testing.assert_array_equal(packed, values, err_msg=name)
            elif kind == "Q4_K":
                assert np.abs(packed - values).max() <= np.abs(values).max() * 2**-10
            else:
                assert (np.abs(packed - values) <= bound(values, tensor.kind)).all(), name
    assert not any("turned" in note for note in source.notes)


def test_powerinfer_threshold(tiny_gguf: Make) -> None:
    path = tiny_gguf(**POWERINFER, fields={"powerinfer.sparse_threshold": -0.375})
    assert open_source(path).spec.predictor == Predictor(threshold=-0.375)


def test_powerinfer_file_without_predictors(tiny_gguf: Make) -> None:
    without = [*POWERINFER["without"], "blk.0.fc1.weight", "blk.0.fc2.weight"]
    source = open_source(marked(tiny_gguf(shapes=POWERINFER_SHAPES, without=without)))
    assert (source.spec.architecture.feed_forward.activation, source.spec.predictor) == ("relu", None)
    assert source.names() == NAMES.keys()


def test_ranks_are_those_of_each_layer(tiny_gguf: Make) -> None:
    shapes = {name.replace("blk.0", "blk.1"): shape for name, shape in (GGUF_SHAPES | POWERINFER_SHAPES).items()}
    shapes |= POWERINFER_SHAPES | {"blk.0.fc1.weight": (40, 256), "blk.0.fc2.weight": (512, 40)}
    without = ["blk.0.ffn_down.weight", "blk.1.ffn_down.weight"]
    two = {"llama.block_count": 2}
    path = tiny_gguf(kind="F16", shapes=shapes, without=without, fields=two)
    source = open_source(path)
    assert [source.tensor(f"layers.{i}.{part}").shape for i in (0, 1) for part in ("fc1", "fc2")] == [
        (40, 256),
        (512, 40),
        (256, 256),
        (512, 256),
    ]
    fc2 = next(t.data for t in gguf.GGUFReader(path).tensors if t.name == "blk.0.fc2.weight")
    packed = source.tensor("layers.0.fc2").packed(Kind.F16).view(np.float16)
    np.testing.assert_array_equal(packed, np.pad(fc2, ((0, 0), (0, 24))))
    for missing in ("blk.1.fc1", "blk.0.fc2"):
        some = tiny_gguf(shapes=shapes, without=[*without, f"{missing}.weight"], fields=two)
        with pytest.raises(ModelError, match=rf"tensor {missing}\.weight is missing; .* incomplete$"):
            open_source(some)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"architecture": "opossum"}, "architecture 'opossum' is not supported; llama, mistral, .* are"),
        (
            {"architecture": "generic.gpu_index"},
            "architecture 'generic.gpu_index' is not supported; llama, mistral, .* are",
        ),
        ({"fields": {"powerinfer.sparse_threshold": float("nan")}}, "predictor threshold nan is not a number"),
        ({"fields": {"powerinfer.sparse_threshold": "low"}}, "field powerinfer.sparse_threshold is 'low'"),
        ({"without": []}, "blk.0.ffn_down.weight does not belong to a PowerInfer llama model"),
        ({"without": ["blk.0.ffn_down.weight", "blk.0.ffn_down_t.weight"]}, "blk.0.ffn_down_t.weight is missing"),
        ({"shapes": POWERINFER_SHAPES | {"blk.0.ffn_down_t.weight": (256, 512)}}, r"shape \(256, 512\) instead of \(5"),
        ({"shapes": POWERINFER_SHAPES | {"blk.0.fc1.weight": (256, 512)}}, r"fc1.weight has shape \(256, 512\)"),
        ({"shapes": POWERINFER_SHAPES | {"blk.0.fc1.weight": (512,)}}, r"fc1.weight has shape \(512,\)"),
        ({"shapes": POWERINFER_SHAPES | {"blk.0.fc2.weight": (512, 512)}}, r"fc2.weight has shape \(512, 512\)"),
        (
            {"shapes": POWERINFER_SHAPES | {"blk.0.fc1.bias": (256,)}},
            "blk.0.fc1.bias is unexpected in a llama of 1 layers",
        ),
        ({"shapes": POWERINFER_SHAPES | {"blk.1.fc1.weight": (256, 256)}}, "blk.1.fc1.weight is unexpected"),
        ({"shapes": POWERINFER_SHAPES | {"blk.0.gpu_idx": (512,)}}, "blk.0.gpu_idx does not belong to a PowerInfer"),
    ],
)
def test_powerinfer_files_that_are_refused(tiny_gguf: Make, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelError, match=message) as caught:
        open_source(marked(tiny_gguf(**POWERINFER | options)))
    assert "\n" not in str(caught.value)
