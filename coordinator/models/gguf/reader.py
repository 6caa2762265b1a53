"""GGUF files of the `FAMILIES`, and those of the dialects of PowerInfer and SparkInfer.

GGUF's blocks of a `down` matrix run across neurons. Those of Q4_0, Q4_1 and Q4_K are kept (as Q4C), others become Q8.
PowerInfer's files begin with PWRI instead of GGUF, store `down` with a row for each neuron (`ffn_down_t`) and, in all
layers or in none, predictors (`fc1`, `fc2`). SparkInfer's with predictors (`ffn_pred_up`, `ffn_pred_down`) store it so
under its usual name, `ffn_down`; those without are llama.cpp's, but for a field `pred_lora` of zeros.
A model may lie in several files (`parts.py`). The experts of a layer lie in stacks, one for each matrix (`_exps`), of
which one expert is read at a time.
Does not cover: PowerInfer's split files (`gpu_idx`), old files with a tensor for each expert.
See also: `blocks.py` for the weight blocks, `tokenizer.py` for the vocabulary.
"""

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Set
from dataclasses import replace
from pathlib import Path

import gguf
import numpy as np
import numpy.typing as npt
from gguf import GGMLQuantizationType as Type

from warmfront.coordinator.models.activations import in_gguf
from warmfront.coordinator.models.families import FAMILIES
from warmfront.coordinator.models.family import GGUF, Cuts, pair_order, part_of, published_name
from warmfront.coordinator.models.fields import Fields, faults_of
from warmfront.coordinator.models.gguf.blocks import FLOATS, ROUNDED_TO_Q8, kind_of, repack
from warmfront.coordinator.models.gguf.config import Found
from warmfront.coordinator.models.gguf.file import OTHER_FILE, GgufFile
from warmfront.coordinator.models.gguf.refusals import checked_architecture
from warmfront.coordinator.models.gguf.tokenizer import read_tokenizer
from warmfront.coordinator.models.parts import parts_of
from warmfront.coordinator.models.rope import Doubles
from warmfront.coordinator.models.source import IGNORE_OVERFLOW, Order, SourceTensor
from warmfront.coordinator.models.stored_tensor import StoredTensor
from warmfront.shared.errors import ModelError
from warmfront.shared.model.formats import BLOCK, Kind, join_nibbles, split_q4
from warmfront.shared.model.tensors import file_shapes, predictor_shapes

__all__ = ["GgufSource"]

Bytes = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.float32]

# What the dialects of sparse models have instead of "ffn_down", and beside it.
DIALECTS = {
    "powerinfer": {"down": "blk.{i}.ffn_down_t", "fc1": "blk.{i}.fc1", "fc2": "blk.{i}.fc2"},
    "sparkinfer": {"fc1": "blk.{i}.ffn_pred_up", "fc2": "blk.{i}.ffn_pred_down"},
    "": {},
}
# Divisors of the rotary frequencies.
ROPE_FACTORS = ("rope_freqs", "rope_factors_short", "rope_factors_long")


class GgufSource:
    """An open GGUF file; a `Source`. Raises ModelError if it is damaged or not supported."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.notes: list[str] = []
        files = [GgufFile(part) for part in parts_of(path)]
        file = files[0]
        fields = Fields(file.path, file.fields)
        architecture = checked_architecture(path, fields)
        self._experts = fields.count(f"{architecture}.expert_count", 0, low=0)
        self._family = FAMILIES["mixtral" if architecture == "llama" and self._experts else architecture]
        if self._experts and "router" not in self._family.tensors:
            raise ModelError(f"{path}: {architecture} models with experts are not supported; those without are")
        tensors = _joined(files)
        self._family = self._family.named(tensors, GGUF)
        self._dialect = _dialect(file.powerinfer, tensors)
        self.activations = in_gguf(fields, self._dialect)
        # Whether `down` has a row for each neuron.
        self._turned = self._dialect != ""
        factors = {
            name: _read_factors(tensors.pop(f"{name}.weight")) for name in ROPE_FACTORS if f"{name}.weight" in tensors
        }
        named = self._named(self._without_drafts(tensors, fields.under(f"{architecture}.")), architecture)
        if "embed" not in named:
            raise ModelError(f"{path}: tensor token_embd.weight is missing; the file is incomplete")
        shapes = {name: tensor.shape for name, tensor in named.items()}
        with faults_of(path):
            self.spec = self._family.gguf(fields, Found(shapes, self._dialect))
        stored = self._checked(named)
        with faults_of(path):
            positions = self._family.gguf_positions(fields, self.spec, factors)
            self.spec = replace(self.spec, architecture=replace(self.spec.architecture, positions=positions))
        self._tensors = {name: self._tensor(name, tensor) for name, tensor in stored.items()}
        self._note_conversions()
        self.tokenizer = read_tokenizer(path, file.fields)
        if self.tokenizer is not None and len(file.fields["tokenizer.ggml.tokens"]) > self.spec.vocab:
            raise ModelError(f"{path}: there are more tokens than the {self.spec.vocab} rows of token_embd.weight")

    def names(self) -> Set[str]:
        return self._tensors.keys()

    def tensor(self, name: str) -> SourceTensor:
        return self._tensors[name]

    def _without_drafts(self, tensors: dict[str, StoredTensor[Type]], keys: Fields) -> dict[str, StoredTensor[Type]]:
        """The tensors but for those of layers behind the last, which guess further tokens; a note tells of them."""
        drafts = keys.count("nextn_predict_layers", 0, low=0)
        if not drafts:
            return tensors
        blocks = keys.count("block_count")
        guessing = range(blocks - drafts, blocks)
        layers = {name: int(match[1]) for name in tensors if (match := re.match(r"blk\.(\d+)\.", name))}
        self.notes.append(f"{drafts} layers that guess further tokens are left out")
        return {name: tensor for name, tensor in tensors.items() if layers.get(name) not in guessing}

    def _named(self, tensors: Mapping[str, StoredTensor[Type]], architecture: str) -> dict[str, StoredTensor[Type]]:
        """The tensors by the names of `tensors.py`; raises ModelError for one that the family does not have."""
        self._names = {part: gguf for part, (_, gguf) in self._family.tensors.items()} | DIALECTS[self._dialect]
        parts: dict[str, list[str]] = {}
        for part, name in self._names.items():
            parts.setdefault(name, []).append(part)
        named: dict[str, StoredTensor[Type]] = {}
        for name, tensor in tensors.items():
            match = re.fullmatch(r"(?:blk\.(\d+)\.)?(\w+)\.(weight|bias)", name)
            found = parts.get(f"blk.{{i}}.{match[2]}" if match[1] else match[2]) if match else None
            if match is None or found is None:
                model = f"{'PowerInfer ' if self._dialect == 'powerinfer' else ''}{architecture} model"
                model += " with experts" if self._experts else ""
                raise ModelError(
                    f"{self.path}: tensor {name} does not belong to a {model}; such files are not supported"
                )
            layer, bias = f"layers.{match[1]}." if match[1] else "", ".bias" if match[3] == "bias" else ""
            for part in found:
                named |= self._apart(f"{layer}{part}{bias}", tensor)
        return named

    def _apart(self, name: str, tensor: StoredTensor[Type]) -> dict[str, StoredTensor[Type]]:
        """The tensor that we call `name`, or of a stack the experts' own."""
        stack, _, part = name.partition("experts.")
        if not part:
            # The gate of the shared expert is a vector in some files.
            one_row = name.endswith(".shared_router") and len(tensor.shape) == 1
            return {name: replace(tensor, shape=(1, *tensor.shape)) if one_row else tensor}
        if len(tensor.shape) != (2 if part.endswith(".bias") else 3) or tensor.shape[0] != self._experts:
            raise ModelError(
                f"{self.path}: tensor {tensor.name} has shape {tensor.shape}, not that of a stack of {self._experts} "
                "experts; the file is damaged"
            )
        return {f"{stack}experts.{number}.{part}": tensor.item(number) for number in range(self._experts)}

    def _checked(self, named: Mapping[str, StoredTensor[Type]]) -> dict[str, StoredTensor[Type]]:
        """The model's tensors; raises ModelError if one is missing, unexpected or of a wrong shape or type."""
        cuts = self._family.cuts(self.spec, GGUF)
        tensors = {name: self._find(name, named, shape, cuts) for name, shape in file_shapes(self.spec)}
        if self.spec.predictor is not None:
            shapes = predictor_shapes(self.spec, {name: tensor.shape for name, tensor in named.items()})
            tensors |= {name: self._find(name, named, shape, cuts) for name, shape in shapes}
        extra = sorted(named.keys() - tensors.keys())
        if extra:
            what = f"tensor {named[extra[0]].name} is unexpected in a {self.spec.family} of {self.spec.layers} layers"
            raise ModelError(f"{self.path}: {what}")
        return tensors

    def _find(
        self, name: str, named: Mapping[str, StoredTensor[Type]], shape: tuple[int, ...], cuts: Cuts
    ) -> StoredTensor[Type]:
        """The tensor, or the piece of the file's, that we call `name`."""
        tensor = named.get(name)
        if tensor is None:
            published = published_name(name, self._names.__getitem__)
            raise ModelError(f"{self.path}: tensor {published} is missing; the file is incomplete")
        if name.endswith(".down") and self._turned:
            shape = shape[::-1]
        first, rows = cuts.get(part_of(name), (0, shape[0]))
        whole = (rows, *shape[1:]) if rows != shape[0] else shape
        if tensor.shape != whole:
            raise ModelError(
                f"{self.path}: tensor {tensor.name} has shape {tensor.shape} instead of {whole}; the file is damaged"
            )
        if kind_of(tensor.type) is None or (len(shape) == 1 and tensor.type not in FLOATS):
            raise ModelError(
                f"{self.path}: {tensor.name} has type {tensor.type.name}, which cannot be read; {OTHER_FILE}"
            )
        return tensor if rows == shape[0] else tensor.piece(first, shape[0])

    def _tensor(self, name: str, stored: StoredTensor[Type]) -> "GgufTensor":
        order = None if self._family.gguf_pairs else pair_order(self.spec, name)
        return GgufTensor(stored, transposed=name.endswith(".down") and not self._turned, order=order)

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
            elif block == Type.MXFP4:
                self.notes.append(
                    f"{count} tensors of type MXFP4 are kept exactly, as Q8; --dtype q4 rounds them to 4 bits"
                )
            elif block in ROUNDED_TO_Q8:
                self.notes.append(f"{count} tensors of type {block.name} are rounded to Q8")
            elif block not in FLOATS and repack(block, kind) is None:
                self.notes.append(f"{count} tensors of type {block.name} are rounded to Q4, which loses quality")


class GgufTensor(SourceTensor):
    """A tensor of the file; if `transposed`, [out, in] in the file is delivered as [in, out]."""

    def __init__(self, tensor: StoredTensor[Type], *, transposed: bool = False, order: Order | None = None) -> None:
        self.type = tensor.type
        self.transposed = transposed
        kind = kind_of(self.type)
        assert kind is not None
        self._block_size, self._block_bytes = gguf.GGML_QUANT_SIZES[self.type]
        self._stored = tensor
        label, shape = f"{tensor.path}: tensor {tensor.name}", tensor.shape
        if not transposed:
            super().__init__(label, shape, kind, step=1 if order is None else len(order), order=order)
        elif self.type in FLOATS:
            super().__init__(label, shape[::-1], kind)
        else:
            across = repack(self.type, Kind.Q4) is not None
            super().__init__(label, shape[::-1], Kind.Q4C if across else Kind.Q8, step=self._block_size)

    def _widen(self, start: int, stop: int) -> Floats:
        if len(self.shape) == 1:
            return self._ordered(self._dequantised(self._stored.rows())[0, start:stop])
        if not self.transposed:
            return self._ordered(self._dequantised(self._stored.rows(start, stop)))
        first, last = (at // self._block_size * self._block_bytes for at in (start, stop))
        return self._dequantised(self._stored.columns(first, last)).T

    def _dequantised(self, rows: Bytes) -> Floats:
        return np.asarray(gguf.dequantize(rows, self.type), np.float32)

    def _pack(self, start: int, stop: int, kind: Kind) -> Bytes:
        if kind == self.kind == Kind.Q4C:
            q, _, _ = self._split()
            return join_nibbles(np.ascontiguousarray(q.T[start:stop]).reshape(stop - start, -1, BLOCK))
        exact = None if self.transposed else repack(self.type, kind)
        if exact is None:
            return super()._pack(start, stop, kind)
        return self._ordered(exact(self._stored.rows(start, stop)))

    @IGNORE_OVERFLOW
    def column_scales(self) -> npt.NDArray[np.float16]:
        _, scale, minimum = self._split()
        scales = np.ascontiguousarray(np.stack((scale.T, minimum.T), axis=1))
        self.check_finite(bool(np.isfinite(scales).all()), self.kind)
        return scales

    def _split(self) -> tuple[Bytes, npt.NDArray[np.float16], npt.NDArray[np.float16]]:
        """Numbers, scales and minima in the order of the file: [out, in] and [out, in / 32]."""
        exact = repack(self.type, Kind.Q4)
        assert exact is not None
        return split_q4(exact(self._stored.rows()), self.shape[0])


def _dialect(powerinfer: bool, tensors: Iterable[str]) -> str:
    """Whose file it is: a key of DIALECTS. `powerinfer`: by its first bytes."""
    if powerinfer or any(".ffn_down_t." in name for name in tensors):
        return "powerinfer"
    return "sparkinfer" if any(".ffn_pred_" in name for name in tensors) else ""


def _joined(files: list[GgufFile]) -> dict[str, StoredTensor[Type]]:
    """The tensors of all parts of a model."""
    tensors: dict[str, StoredTensor[Type]] = {}
    for i, file in enumerate(files):
        fields = Fields(file.path, file.fields)
        place = fields.count("split.no", 0, low=0), max(fields.count("split.count", 1, low=0), 1)
        if place != (i, len(files)):
            raise ModelError(
                f"{file.path} is part {place[0] + 1} of {place[1]}, whatever its name says: "
                f"name the parts NAME-00001-of-{place[1]:05}.gguf and so on, or fetch them again"
            )
        twice = sorted(tensors.keys() & file.tensors.keys())
        if twice:
            raise ModelError(f"{file.path}: tensor {twice[0]} is in another part too; fetch the parts again")
        tensors |= file.tensors
    return tensors


def _read_factors(factors: StoredTensor[Type]) -> Doubles:
    if len(factors.shape) != 1 or factors.type not in FLOATS:
        raise ModelError(
            f"{factors.path}: {factors.name} has shape {factors.shape} and type {factors.type.name}; "
            "the file is damaged"
        )
    return GgufTensor(factors).float32().astype(np.float64)
