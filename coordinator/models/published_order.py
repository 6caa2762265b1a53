"""Orders of a model's neurons, the hottest first, that others have published: made from more text than most users have.

model-split-N.gguf               SparkInfer's: blk.{i}.ffn_reorder_perms, int32 [ffn], the neuron at each place
activation_0.pt, activation_1.pt ...  PowerInfer's, a file for each layer: how often each neuron fired, a tensor [ffn]
"""

from pathlib import Path

import numpy as np
import numpy.typing as npt
from gguf import GGMLQuantizationType as Type

from warmfront.coordinator.models.gguf.file import GgufFile
from warmfront.coordinator.models.hf.torch_file import NUMBERS, read_tensor
from warmfront.shared.errors import ModelError

__all__ = ["read_order"]

Order = npt.NDArray[np.int64]


def read_order(path: Path, layers: int, ffn: int) -> Order:
    """int64 [layers, ffn]: which neuron comes to each place, by SparkInfer's file or PowerInfer's folder.

    Raises ModelError if that is damaged, or of a model of other sizes.
    """
    return np.stack(_counted(path, layers, ffn) if path.is_dir() else _split(path, layers, ffn))


def _counted(folder: Path, layers: int, ffn: int) -> list[Order]:
    orders = []
    for layer in range(layers):
        path = folder / f"activation_{layer}.pt"
        if not path.is_file():
            raise ModelError(f"{path} is missing: there must be counts for each of {layers} layers")
        tensor = read_tensor(path)
        if tensor.shape != (ffn,):
            raise ModelError(f"{path} has shape {tensor.shape}, not one count for each of {ffn} neurons")
        counts = tensor.rows().view(NUMBERS[tensor.type])[0].astype(np.float64)
        if not np.isfinite(counts).all():
            raise ModelError(f"{path} holds NaN or infinity; fetch it again")
        orders.append(np.argsort(-counts, kind="stable"))
    return orders


def _split(path: Path, layers: int, ffn: int) -> list[Order]:
    tensors, orders = GgufFile(path).tensors, []
    for layer in range(layers):
        name = f"blk.{layer}.ffn_reorder_perms"
        found = tensors.get(name)
        if found is None or found.type != Type.I32 or found.shape != (ffn,):
            raise ModelError(f"{path} has no {name} of {ffn} neurons; give the split file that belongs to the model")
        order = found.rows().view("<i4")[0].astype(np.int64)
        if not np.array_equal(np.sort(order), np.arange(ffn)):
            raise ModelError(f"{path}: {name} does not hold each neuron once; fetch it again")
        orders.append(order)
    if f"blk.{layers}.ffn_reorder_perms" in tensors:
        raise ModelError(f"{path} is for a model of more than {layers} layers")
    return orders
