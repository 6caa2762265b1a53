"""The experts of a gpt-oss folder: one stack for each matrix, in which the gates and ups of an expert take turns.

model.layers.{i}.mlp.experts.
    gate_up_proj        [experts, hidden, 2 ffn]             numbers
    down_proj           [experts, ffn, hidden]
    gate_up_proj_bias   [experts, 2 ffn]
    down_proj_bias      [experts, hidden]
    gate_up_proj_blocks [experts, 2 ffn, hidden / 32, 16]    instead, in MXFP4: uint8, a code in the low bits and the
    down_proj_blocks    [experts, hidden, ffn / 32, 16]      next one in the high bits
    gate_up_proj_scales [experts, 2 ffn, hidden / 32]        uint8
    down_proj_scales    [experts, hidden, ffn / 32]
"""

from collections.abc import MutableMapping
from dataclasses import replace
from itertools import product
from math import prod
from pathlib import Path

import numpy as np
import numpy.typing as npt

from warmfront.coordinator.models.gguf.mxfp4 import as_q8, numbers
from warmfront.coordinator.models.hf.safetensors_file import KINDS
from warmfront.coordinator.models.hf.tensor import HfTensor
from warmfront.coordinator.models.source import Order, SourceTensor
from warmfront.coordinator.models.stored_tensor import StoredTensor
from warmfront.shared.errors import ModelError
from warmfront.shared.model.formats import BLOCK, Kind
from warmfront.shared.model.spec import ModelSpec

__all__ = ["read_experts"]

Bytes = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.float32]
Stored = StoredTensor[str]

# The parts of an expert that each stack holds.
_STACKS = (("gate_up_proj", ("gate", "up")), ("down_proj", ("down",)))


def read_experts(
    folder: Path, stored: MutableMapping[str, Stored], spec: ModelSpec, notes: list[str]
) -> dict[str, SourceTensor]:
    """The experts' tensors by our names, taken out of `stored`; a line about what is converted goes to `notes`.

    Raises ModelError for a stack that is missing, of a wrong shape or of a wrong type.
    """
    made: dict[str, SourceTensor] = {}
    for layer, (stack, parts) in product(range(spec.layers), _STACKS):
        reader = _Stack(folder, stored, spec, f"model.layers.{layer}.mlp.experts.{stack}", parts)
        for number in range(reader.experts):
            made |= reader.expert(number, f"layers.{layer}.experts.{number}.")
    packed = sum(isinstance(tensor, _Mxfp4Tensor) for tensor in made.values())
    if packed:
        notes.append(
            f"{packed} matrices of type MXFP4 are kept as Q8, gates and ups exactly; --dtype q4 rounds them to 4 bits"
        )
    return made


class _Stack:
    """One stack of a layer, checked."""

    def __init__(
        self, folder: Path, stored: MutableMapping[str, Stored], spec: ModelSpec, name: str, parts: tuple[str, ...]
    ) -> None:
        assert spec.architecture.feed_forward.experts is not None
        self._folder, self._stored, self._name, self._parts = folder, stored, name, parts
        self.experts = spec.architecture.feed_forward.experts.number
        rows, cols = (2 * spec.ffn, spec.hidden) if len(parts) == 2 else (spec.hidden, spec.ffn)
        self._rows = rows
        self._bias = self._take("_bias", (rows,), tuple(KINDS))
        self._packed: tuple[Stored, Stored] | None = None
        if f"{name}_blocks" in stored:
            if cols % BLOCK:
                raise ModelError(f"{folder}: {name} in MXFP4 has rows of {cols}, not a multiple of {BLOCK}")
            blocks = self._take("_blocks", (rows, cols // BLOCK, BLOCK // 2), ("U8",))
            scales = self._take("_scales", (rows, cols // BLOCK), ("U8",))
            self._packed = blocks, scales
        else:
            # Both as [in, out]: of down that is a row for each neuron, as is wanted.
            self._matrix = self._take("", (cols, rows), tuple(KINDS))

    def _take(self, suffix: str, shape: tuple[int, ...], types: tuple[str, ...]) -> Stored:
        name, whole = f"{self._name}{suffix}", (self.experts, *shape)
        tensor = self._stored.pop(name, None)
        if tensor is None:
            raise ModelError(f"{self._folder}: tensor {name} is missing; the model is incomplete")
        if tensor.shape != whole:
            raise ModelError(f"{tensor.path}: tensor {name} has shape {tensor.shape}, config.json says {whole}")
        if tensor.type not in types:
            raise ModelError(f"{tensor.path}: tensor {name} has type {tensor.type}; {', '.join(types)} are supported")
        if tensor.type == "U8" and tensor.nbytes != prod(whole):
            raise ModelError(f"{tensor.path}: tensor {name} takes {tensor.nbytes} bytes; the file is damaged")
        return tensor

    def expert(self, number: int, prefix: str) -> dict[str, SourceTensor]:
        """The tensors of one expert, under names that begin with `prefix`."""
        made: dict[str, SourceTensor] = {}
        for i, part in enumerate(self._parts):
            turned = part == "down"
            picked = None if turned else np.arange(i, self._rows, 2)
            if self._packed is None:
                made[prefix + part] = HfTensor(self._matrix.item(number), transposed=not turned, picked=picked)
            else:
                blocks, scales = (tensor.item(number) for tensor in self._packed)
                made[prefix + part] = _Mxfp4Tensor(blocks, scales, picked)
            made[f"{prefix}{part}.bias"] = HfTensor(self._bias.item(number), picked=picked)
        return made


class _Mxfp4Tensor(SourceTensor):
    """A matrix [out, in] in MXFP4, of which the rows `picked` are delivered; None: all of it, transposed."""

    def __init__(self, blocks: Stored, scales: Stored, picked: Order | None) -> None:
        rows, count, half = blocks.shape
        self._blocks, self._scales, self._picked = replace(blocks, shape=(rows, count * half)), scales, picked
        shape = (count * BLOCK, rows) if picked is None else (len(picked), count * BLOCK)
        label = f"{blocks.path}: tensor {blocks.name}"
        super().__init__(label, shape, Kind.Q8, step=BLOCK if picked is None else 1)

    def _read(self, start: int, stop: int) -> tuple[Bytes, Bytes]:
        """Codes [rows, blocks, 32] and exponents [rows, blocks] of what is delivered as rows start..stop."""
        if self._picked is None:
            first, last = start // BLOCK, stop // BLOCK
            blocks = self._blocks.columns(first * BLOCK // 2, last * BLOCK // 2)
            scales = self._scales.columns(first, last)
        else:
            rows = self._picked[start:stop]
            low, high = int(rows[0]), int(rows[-1]) + 1
            blocks, scales = (part.rows(low, high)[rows - low] for part in (self._blocks, self._scales))
        pairs = np.stack((blocks & 15, blocks >> 4), axis=2)
        return pairs.reshape(len(blocks), -1, BLOCK), scales

    def _widen(self, start: int, stop: int) -> Floats:
        wide = numbers(*self._read(start, stop))
        return wide.T if self._picked is None else wide

    def _pack(self, start: int, stop: int, kind: Kind) -> Bytes:
        if self._picked is None or kind != Kind.Q8:
            return super()._pack(start, stop, kind)
        return as_q8(*self._read(start, stop))
