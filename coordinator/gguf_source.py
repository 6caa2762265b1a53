"""GGUF files of the llama architecture, and PowerInfer's of ReLU models.

GGUF's blocks of a `down` matrix run across neurons: Q4_0, Q4_1 and Q4_K keep them so (Q4C), other blocks become Q8.
PowerInfer's files begin with PWRI instead of GGUF, hold `down` one row per neuron (`ffn_down_t`) and, in all layers
or in none, predictors (`fc1`, `fc2`).
Does not cover: PowerInfer's split files (`gpu_idx`), experts, files split over several parts, YaRN.
See also: `gguf_blocks.py` for the weight blocks, `gguf_tokenizer.py` for the vocabulary.
"""

import re
from collections import Counter
from collections.abc import Mapping, Set
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import gguf
import numpy as np
import numpy.typing as npt
from gguf import GGMLQuantizationType as Type

from warmfront.coordinator import rope
from warmfront.coordinator.gguf_blocks import FLOATS, ROUNDED_TO_Q8, kind_of, repack
from warmfront.coordinator.gguf_tokenizer import read_tokenizer
from warmfront.coordinator.source import SourceTensor, check_predictor, check_sizes, file_shapes, predictor_shapes
from warmfront.shared.errors import ModelError
from warmfront.shared.model import ModelSpec, Predictor
from warmfront.shared.weights import BLOCK, Kind, join_nibbles, split_q4

__all__ = ["GgufSource"]

Bytes = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.float32]
T = TypeVar("T", int, float, str)

ARCHITECTURE = "llama"
TOP = {"token_embd.weight": "embed", "output.weight": "head", "output_norm.weight": "norm"}
PARTS = {
    "attn_norm": "attn_norm",
    "attn_q": "q",
    "attn_k": "k",
    "attn_v": "v",
    "attn_output": "o",
    "ffn_norm": "ffn_norm",
    "ffn_gate": "gate",
    "ffn_up": "up",
    "ffn_down": "down",
}
POWERINFER_MAGIC = b"PWRI"
POWERINFER_PARTS = {name: part for name, part in PARTS.items() if part != "down"} | {
    "ffn_down_t": "down",
    "fc1": "fc1",
    "fc2": "fc2",
}
ROPE_FACTORS = "rope_freqs.weight"


class GgufSource:
    """An open GGUF file; a `Source`. Raises ModelError if it is damaged or not supported."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.notes: list[str] = []
        reader, fields = _read(path)
        metadata = Metadata(path, fields)
        architecture = metadata.get("general.architecture", str)
        if architecture != ARCHITECTURE:
            raise ModelError(f"{path}: architecture '{architecture}' is not supported; {ARCHITECTURE} is")
        if metadata.get("split.count", int, 1) > 1:
            raise ModelError(f"{path}: one part of a split file; join the parts with llama-gguf-split --merge")
        if metadata.get("llama.expert_count", int, 0) > 0:
            raise ModelError(f"{path}: mixtures of experts are not supported; dense llama models are")
        found = {tensor.name: tensor for tensor in reader.tensors}
        self._powerinfer = reader.powerinfer or any(".ffn_down_t." in name for name in found)
        factors = found.pop(ROPE_FACTORS, None)
        named = {self._canonical(name): tensor for name, tensor in found.items()}
        if "embed" not in named:
            raise ModelError(f"{path}: tensor token_embd.weight is missing; the file is incomplete")
        self.spec = replace(
            _spec(metadata, _shape(named["embed"])[0], None if factors is None else np.array(factors.data)),
            activation="relu" if self._powerinfer else "silu",
            predictor=_predictor(metadata) if any(name.endswith((".fc1", ".fc2")) for name in named) else None,
        )
        check_sizes(path, self.spec)
        self._tensors = self._checked(named)
        self._note_conversions()
        self.tokenizer = read_tokenizer(path, fields, self.notes)

    def names(self) -> Set[str]:
        return self._tensors.keys()

    def tensor(self, name: str) -> SourceTensor:
        return self._tensors[name]

    def _canonical(self, name: str) -> str:
        if name in TOP:
            return TOP[name]
        match = re.fullmatch(r"blk\.(\d+)\.(\w+)\.(weight|bias)", name)
        parts = POWERINFER_PARTS if self._powerinfer else PARTS
        part = parts.get(match[2]) if match else None
        if match is None or part is None:
            model = "PowerInfer llama model" if self._powerinfer else "llama model"
            raise ModelError(f"{self.path}: tensor {name} does not belong to a {model}; such files are not supported")
        return f"layers.{match[1]}.{part}" + (".bias" if match[3] == "bias" else "")

    def _checked(self, named: Mapping[str, gguf.ReaderTensor]) -> dict[str, "GgufTensor"]:
        """Every tensor that the model must have and the biases it may have, of the right shape."""
        tensors: dict[str, GgufTensor] = {}
        for name, shape in file_shapes(self.spec, head="head" in named):
            tensors[name] = self._tensor(name, named, shape)
            if f"{name}.bias" in named:
                tensors[f"{name}.bias"] = self._tensor(f"{name}.bias", named, shape[:1])
        if self.spec.predictor is not None:
            for name, shape in predictor_shapes(self.spec, {name: _shape(tensor) for name, tensor in named.items()}):
                tensors[name] = self._tensor(name, named, shape)
        extra = sorted(named.keys() - tensors.keys())
        if extra:
            raise ModelError(f"{self.path}: tensor {extra[0]} is unexpected in a model of {self.spec.layers} layers")
        return tensors

    def _tensor(self, name: str, named: Mapping[str, gguf.ReaderTensor], shape: tuple[int, ...]) -> "GgufTensor":
        tensor = named.get(name)
        if tensor is None:
            raise ModelError(f"{self.path}: tensor {name} is missing; the file is incomplete")
        have, down = _shape(tensor), name.endswith(".down")
        if down and self._powerinfer:
            shape = shape[::-1]
        if have != shape:
            raise ModelError(
                f"{self.path}: tensor {tensor.name} has shape {have} instead of {shape}; the file is damaged"
            )
        if kind_of(tensor.tensor_type) is None or (len(shape) == 1 and tensor.tensor_type not in FLOATS):
            raise ModelError(f"{self.path}: {tensor.name} has type {tensor.tensor_type.name}, which cannot be read")
        return GgufTensor(tensor, transposed=down and not self._powerinfer)

    def _note_conversions(self) -> None:
        down = Counter(t.type for t in self._tensors.values() if t.transposed and t.type not in FLOATS)
        other = Counter((t.type, t.kind) for t in self._tensors.values() if not t.transposed)
        for block, count in down.items():
            if repack(block, Kind.Q4) is not None:
                continue
            self.notes.append(f"{count} down matrices of type {block.name} are turned and kept as Q8")
        for (block, kind), count in other.items():
            if block == Type.Q4_K:
                self.notes.append(f"{count} tensors of type Q4_K are kept as Q4 with scales rounded to float16")
            elif block in ROUNDED_TO_Q8:
                self.notes.append(f"{count} tensors of type {block.name} are rounded to Q8")
            elif block not in FLOATS and repack(block, kind) is None:
                self.notes.append(f"{count} tensors of type {block.name} are rounded to Q4, which loses quality")


class GgufTensor(SourceTensor):
    """A tensor of the mapped file; `transposed` delivers [out, in] of the file as [in, out]."""

    def __init__(self, tensor: gguf.ReaderTensor, *, transposed: bool) -> None:
        self.type: Type = tensor.tensor_type
        self.transposed = transposed
        kind = kind_of(self.type)
        assert kind is not None
        self._block_size, self._block_bytes = gguf.GGML_QUANT_SIZES[self.type]
        shape = _shape(tensor)
        # A byte row per row of the file; a vector is one row.
        self._data: Bytes = tensor.data.reshape(-1, tensor.data.shape[-1]).view(np.uint8)
        if not transposed:
            super().__init__(shape, kind)
        elif self.type in FLOATS:
            super().__init__(shape[::-1], kind)
        else:
            across = repack(self.type, Kind.Q4) is not None
            super().__init__(shape[::-1], Kind.Q4C if across else Kind.Q8, step=self._block_size)

    def _widen(self, start: int, stop: int) -> Floats:
        if len(self.shape) == 1:
            return self._dequantised(self._data)[0, start:stop]
        if not self.transposed:
            return self._dequantised(self._data[start:stop])
        first, last = (at // self._block_size * self._block_bytes for at in (start, stop))
        return self._dequantised(self._data[:, first:last]).T

    def _dequantised(self, rows: Bytes) -> Floats:
        return np.asarray(gguf.dequantize(np.ascontiguousarray(rows), self.type), np.float32)

    def _pack(self, start: int, stop: int, kind: Kind) -> Bytes:
        if kind == self.kind == Kind.Q4C:
            q, _, _ = self._split()
            return join_nibbles(np.ascontiguousarray(q.T[start:stop]).reshape(stop - start, -1, BLOCK))
        exact = None if self.transposed else repack(self.type, kind)
        if exact is None:
            return super()._pack(start, stop, kind)
        return exact(np.ascontiguousarray(self._data[start:stop]))

    def column_scales(self) -> npt.NDArray[np.float16]:
        _, scale, minimum = self._split()
        return np.ascontiguousarray(np.stack((scale.T, minimum.T), axis=1))

    def _split(self) -> tuple[Bytes, npt.NDArray[np.float16], npt.NDArray[np.float16]]:
        """Numbers, scales and minima as they lie in the file, [out, in] and [out, in / 32]."""
        exact = repack(self.type, Kind.Q4)
        assert exact is not None
        return split_q4(exact(np.ascontiguousarray(self._data)), self.shape[0])


class Metadata:
    """The file's key-value fields with types checked."""

    def __init__(self, path: Path, fields: Mapping[str, Any]) -> None:
        self.path = path
        self._fields = fields

    def get(self, key: str, kind: type[T], default: T | None = None) -> T:
        """The field; raises ModelError if it is absent without a default, or of another type."""
        value = self._fields.get(key, default)
        if value is None:
            raise ModelError(f"{self.path}: field {key} is missing; the file is incomplete")
        if kind is float and isinstance(value, int):
            value = float(value)
        if not isinstance(value, kind):
            raise ModelError(f"{self.path}: field {key} is {value!r:.60}, which is not supported for llama models")
        return value


class _Reader(gguf.GGUFReader):  # type: ignore[misc]  # the package has no types
    """Reads PowerInfer's files too, which are GGUF but for the first four bytes."""

    @property
    def powerinfer(self) -> bool:
        return bytes(self.data[:4]) == POWERINFER_MAGIC

    def _get(self, offset: int, *args: Any, **options: Any) -> npt.NDArray[Any]:
        if offset == 0 and self.powerinfer:
            return np.array([gguf.GGUF_MAGIC])
        return np.asarray(super()._get(offset, *args, **options))


def _read(path: Path) -> tuple[_Reader, dict[str, Any]]:
    """The mapped file and its decoded fields."""
    try:
        reader = _Reader(path)
        fields = {name: field.contents() for name, field in reader.fields.items()}
    except OSError as error:
        raise ModelError(f"cannot read {path}: {error.strerror or error}") from error
    except Exception as error:  # the reader checks nothing: missing bytes and damage surface as any exception
        raise ModelError(f"{path} is not a whole GGUF file ({error}); fetch it again") from error
    if reader.byte_order != "I":
        raise ModelError(f"{path}: big-endian GGUF files are not supported")
    return reader, fields


def _shape(tensor: gguf.ReaderTensor) -> tuple[int, ...]:
    """Rows first; GGUF writes the contiguous dimension first."""
    return tuple(int(n) for n in reversed(tensor.shape)) or (0,)


def _predictor(metadata: Metadata) -> Predictor:
    predictor = Predictor(threshold=metadata.get("powerinfer.sparse_threshold", float, 0.0))
    check_predictor(metadata.path, predictor)
    return predictor


def _spec(metadata: Metadata, vocab: int, rope_factors: Floats | None) -> ModelSpec:
    hidden = metadata.get("llama.embedding_length", int)
    heads = metadata.get("llama.attention.head_count", int)
    head_dim = metadata.get("llama.attention.key_length", int, hidden // max(heads, 1))
    for key in ("llama.attention.value_length", "llama.rope.dimension_count"):
        if metadata.get(key, int, head_dim) != head_dim:
            raise ModelError(f"{metadata.path}: {key} differs from the head size {head_dim}, which is not supported")
    return ModelSpec(
        architecture=ARCHITECTURE,
        name=metadata.get("general.name", str, metadata.path.stem),
        layers=metadata.get("llama.block_count", int),
        hidden=hidden,
        ffn=metadata.get("llama.feed_forward_length", int),
        heads=heads,
        kv_heads=metadata.get("llama.attention.head_count_kv", int, heads),
        head_dim=head_dim,
        vocab=vocab,
        context=metadata.get("llama.context_length", int),
        norm_eps=metadata.get("llama.attention.layer_norm_rms_epsilon", float),
        activation="silu",
        rope_frequencies=_frequencies(metadata, head_dim, rope_factors),
    )


def _frequencies(metadata: Metadata, head_dim: int, factors: Floats | None) -> tuple[float, ...]:
    """RoPE's frequencies; Llama 3.1's stretching is in the file as a divisor of each."""
    scaling = metadata.get("llama.rope.scaling.type", str, "")
    linear = metadata.get("llama.rope.scale_linear", float, 1.0)
    if scaling == "linear":
        linear = metadata.get("llama.rope.scaling.factor", float, linear)
    elif scaling not in ("", "none"):
        raise ModelError(f"{metadata.path}: RoPE scaling '{scaling}' is not supported; linear and llama3 are")
    if factors is not None and factors.shape != (head_dim // 2,):
        raise ModelError(f"{metadata.path}: {ROPE_FACTORS} has shape {factors.shape}; the file is damaged")
    divisor = linear * (np.ones(head_dim // 2) if factors is None else factors.astype(np.float64))
    if not (np.isfinite(divisor).all() and (divisor > 0).all()):
        raise ModelError(f"{metadata.path}: RoPE's scaling factors are not positive; the file is damaged")
    base = metadata.get("llama.rope.freq_base", float, 10000.0)
    return tuple((rope.frequencies(head_dim, base) / divisor).tolist())
