"""A predictor that did not come with the model (`--predictor FILE`): its packed rows, beside the packed model.

The file is made when the predictor is first used with that model and weight type, for the present order of the neurons.
So another predictor does not pack the model again.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from warmfront.coordinator.models.hf.predictors import read_predictor_file
from warmfront.coordinator.models.hf.tensor import HfTensor
from warmfront.coordinator.packing.beside import beside, opened_or_made
from warmfront.coordinator.packing.content import content_of
from warmfront.coordinator.packing.packed_file import Shapes, write_packed
from warmfront.coordinator.packing.packer import predictor_kind, predictor_rows
from warmfront.shared.errors import ModelError, UsageError
from warmfront.shared.files import published
from warmfront.shared.model.bundle import GROUP
from warmfront.shared.model.formats import row_bytes, unpack
from warmfront.shared.model.store import PackedModel

__all__ = ["GATE_SIGNS", "attach_predictor", "gate_signs"]

# The metadata of a predictor's file by which its model is known again.
GATE_SIGNS = "gate_signs"
_GATES, _WEIGHTS = 16, 32
# Of the signs: 4 bits round an eighth of all weights to zero, another model of the same shape has half of them.
_ALIKE = 0.8


def attach_predictor(model: PackedModel, path: Path, dtype: str, say: Callable[[str], None]) -> None:
    """Have `model`, packed as `dtype`, predicted by the file `path` instead of by its own predictors.

    Raises UsageError if there is no such file or the model takes none, ModelError if it is damaged or of another model,
    ResourceError where the packed rows cannot be written.
    """
    if model.spec.architecture.feed_forward.experts is not None:
        raise UsageError(f"--predictor, but {model.spec.name} is a mixture of experts: leave it out")
    if not path.is_file():
        raise UsageError(f"--predictor {path}: there is no such file; make one with `warmfront train-predictor`")
    target = beside(model, f"predictor-{content_of(path, say)}", ".safetensors")
    model.attach(opened_or_made(target, "the packed predictor", lambda: _write(target, model, path, dtype), say))


def _write(target: Path, model: PackedModel, path: Path, dtype: str) -> None:
    predictor, stored, metadata = read_predictor_file(path, model.spec)
    if GATE_SIGNS in metadata and _alike(metadata[GATE_SIGNS], gate_signs(model)) < _ALIKE:
        raise ModelError(
            f"{path} predicts another model of the shape of {model.spec.name}: train one for this model, "
            "with `warmfront train-predictor`"
        )
    tensors = {name: HfTensor(tensor) for name, tensor in stored.items()}
    kinds = {name: predictor_kind(tensor, dtype) for name, tensor in tensors.items() if len(tensor.shape) == 2}
    padded = {name: tuple(-(-size // GROUP) * GROUP for size in tensor.shape) for name, tensor in tensors.items()}
    shapes: Shapes = {
        name: ("U8", (rows, row_bytes(kinds[name], *cols))) if cols else ("F32", (rows,))
        for name, (rows, *cols) in padded.items()
    }
    places = model.places()

    def data() -> Iterator[npt.NDArray[Any]]:
        for name, tensor in tensors.items():
            _, layer, part = name.split(".", 2)
            if name in kinds:
                rows: npt.NDArray[Any] = predictor_rows(tensor, kinds[name], f"{path}: {name}")
            else:
                rows = np.pad(tensor.float32(), (0, padded[name][0] - tensor.shape[0]))
            yield rows[places[int(layer)]] if part.startswith("fc2") else rows

    numbers = {name: int(kind) for name, kind in kinds.items()}
    numbers |= {"gate": int(model.layout.gate_kind), "down": int(model.layout.down_kind)}
    with published(target) as fd:
        write_packed(fd, replace(model.spec, predictor=predictor), numbers, {}, shapes, ([tensor] for tensor in data()))


def gate_signs(model: PackedModel) -> str:
    """The signs of some weights of some gates in the middle of the model, as hexadecimal digits.

    Whatever the weight type and the order of the neurons, they are nearly the same.
    """
    layout, layer = model.layout, model.spec.layers // 2
    places = np.argsort(model.places()[layer])
    group = np.empty((1, layout.group_bytes), np.uint8)
    signs = []
    for neuron in np.linspace(0, model.spec.ffn - 1, _GATES).astype(int):
        number, within = divmod(int(places[neuron]), GROUP)
        model.read_groups(layer, number, group)
        row = group[:, within * layout.bundle_bytes :][:, : layout.gate_row_bytes]
        signs.append(unpack(row, layout.gate_kind, layout.hidden)[0, :_WEIGHTS] > 0)
    return np.packbits(np.concatenate(signs)).tobytes().hex()


def _alike(some: str, others: str) -> float:
    """The share of equal signs; 0 for what are none."""
    try:
        bits = [np.unpackbits(np.frombuffer(bytes.fromhex(text), np.uint8)) for text in (some, others)]
    except ValueError:
        return 0.0
    return float((bits[0] == bits[1]).mean()) if len(bits[0]) == len(bits[1]) else 0.0
