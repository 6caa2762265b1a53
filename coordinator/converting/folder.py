"""What a GGUF file says of a model that comes as a Hugging Face folder: llama.cpp's fields, and its names of tensors.

Of the families that llama.cpp has no further fields for: Llama, Mistral without windows, Qwen 2 and 3.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from warmfront.coordinator.converting.vocabulary import vocabulary_fields
from warmfront.coordinator.models import rope
from warmfront.coordinator.models.families import FAMILIES
from warmfront.coordinator.models.family import GGUF, pair_order, published_name
from warmfront.coordinator.models.source import Order, Source, SourceTensor
from warmfront.shared.errors import ModelError
from warmfront.shared.model.architecture import Architecture, Attention, FeedForward, Norm
from warmfront.shared.model.formats import FLOATS
from warmfront.shared.model.tensors import file_shapes

__all__ = ["ARCHITECTURES", "fields_of", "rotary_of", "tensors_of"]

Floats = npt.NDArray[np.float32]
Doubles = npt.NDArray[np.float64]
# What GGUF calls the families.
ARCHITECTURES = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}


def fields_of(source: Source) -> dict[str, Any]:
    """The fields of the file but for `general.architecture`. Raises ModelError for what cannot be written."""
    spec, architecture = source.spec, source.spec.architecture
    name = ARCHITECTURES.get(spec.family)
    attention = architecture.attention
    plain = Architecture(
        norm=Norm(epsilon=architecture.norm.epsilon),
        positions=architecture.positions,
        attention=Attention(
            heads=attention.heads,
            kv_heads=attention.kv_heads,
            head_dim=attention.head_dim,
            qk_norm=attention.qk_norm,
            biases=attention.biases,
        ),
        feed_forward=FeedForward(activation="silu", biases=architecture.feed_forward.biases),
        tied_head=architecture.tied_head,
    )
    if name is None:
        raise ModelError(
            f"a folder of a {spec.family} model cannot be written as GGUF; those of {', '.join(ARCHITECTURES)} can"
        )
    if architecture != plain or spec.predictor is not None:
        raise ModelError(
            f"{spec.name} has an activation, windows, factors or predictors that GGUF has no field for in a {name}; "
            "it cannot be written"
        )
    if any(source.tensor(each).kind not in FLOATS for each, shape in file_shapes(spec) if len(shape) > 1):
        raise ModelError(f"{spec.name} has its weights in 4 bits already; convert the model that it was made from")
    if source.tokenizer is None:
        raise ModelError(f"{spec.name} has no tokenizer.json; a GGUF file without its tokens is of no use")
    base, _ = rotary_of(source)
    return {
        "general.type": "model",
        "general.name": spec.name,
        f"{name}.block_count": spec.layers,
        f"{name}.context_length": spec.context,
        f"{name}.embedding_length": spec.hidden,
        f"{name}.feed_forward_length": spec.ffn,
        f"{name}.vocab_size": spec.vocab,
        f"{name}.attention.head_count": attention.heads,
        f"{name}.attention.head_count_kv": attention.kv_heads,
        f"{name}.attention.key_length": attention.head_dim,
        f"{name}.attention.value_length": attention.head_dim,
        f"{name}.attention.layer_norm_rms_epsilon": architecture.norm.epsilon,
        f"{name}.rope.dimension_count": architecture.positions.rotary[0].dim,
        f"{name}.rope.freq_base": base,
    } | vocabulary_fields(source.tokenizer, spec.vocab, spec.name)


def rotary_of(source: Source) -> tuple[float, Doubles | None]:
    """The base of the frequencies, and, where they are scaled, the divisor of each of them."""
    spec = source.spec
    (table,) = spec.architecture.positions.rotary
    frequencies = np.array(table.frequencies)
    # As accurate as the file's float32. The first two are scaled alike, or not at all.
    base = round((frequencies[0] / frequencies[1]) ** (table.dim / 2), 2)
    divisor = rope.frequencies(table.dim, base) / frequencies
    scaled = bool(np.abs(divisor - 1).max() > 1e-5)
    if table.magnitude != 1 or table.long_frequencies or (scaled and spec.family != "llama"):
        raise ModelError(f"{spec.name} has scaled rotary positions, which cannot be written; linear and llama3 can")
    return float(base), divisor if scaled else None


def tensors_of(source: Source) -> Iterator[tuple[str, SourceTensor]]:
    """The tensors as GGUF has them, with its names."""
    family = FAMILIES[source.spec.family]
    for name, _ in file_shapes(source.spec):
        tensor = source.tensor(name)
        order = None if family.gguf_pairs else pair_order(source.spec, name)
        if name.endswith(".down"):
            tensor = _Turned(name, tensor)
        elif order is not None:
            tensor = _Apart(name, tensor, order)
        yield published_name(name, lambda part: family.tensors[part][GGUF]), tensor


class _Turned(SourceTensor):
    """[in, out] as [out, in]."""

    def __init__(self, label: str, tensor: SourceTensor) -> None:
        super().__init__(label, tensor.shape[::-1], tensor.kind)
        self._tensor = tensor

    def _widen(self, start: int, stop: int) -> Floats:
        return np.ascontiguousarray(self._tensor.float32().T[start:stop])


class _Apart(SourceTensor):
    """Rotated pairs, which come side by side, half a head apart as in the folder."""

    def __init__(self, label: str, tensor: SourceTensor, order: Order) -> None:
        super().__init__(label, tensor.shape, tensor.kind, step=len(order), order=np.argsort(order))
        self._tensor = tensor

    def _widen(self, start: int, stop: int) -> Floats:
        return self._ordered(self._tensor.widened(start, stop))
