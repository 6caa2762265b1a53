"""Hugging Face folders of the `FAMILIES`: config.json, safetensors (one file or several by an index), tokenizer.json.

A folder may have low-rank predictors too (`predictors.py`).
Of quantised checkpoints those of 4 bits by GPTQ and AWQ are read (`four_bits.py`).
Does not cover: pickled weights.
"""

import re
from collections.abc import Mapping, Set
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from warmfront.coordinator.models.activations import in_config
from warmfront.coordinator.models.families import FAMILIES
from warmfront.coordinator.models.family import HF, pair_order, part_of
from warmfront.coordinator.models.fields import Fields, faults_of
from warmfront.coordinator.models.hf.expert_stacks import read_experts
from warmfront.coordinator.models.hf.folder import folder_name, read_weights
from warmfront.coordinator.models.hf.four_bits import FOUR_BITS, METHODS, FourBitTensor, Grouped, gather
from warmfront.coordinator.models.hf.made_tensors import Ones, Projected
from warmfront.coordinator.models.hf.predictors import INNER, read_predictors
from warmfront.coordinator.models.hf.refusals import checked_config
from warmfront.coordinator.models.hf.safetensors_file import KINDS
from warmfront.coordinator.models.hf.tensor import HfTensor
from warmfront.coordinator.models.hf.tokenizer import read_tokenizer
from warmfront.coordinator.models.source import SourceTensor, grouped_rows
from warmfront.coordinator.models.stored_tensor import StoredTensor
from warmfront.shared.errors import ModelError
from warmfront.shared.model.tensors import file_shapes, layer_shapes

__all__ = ["HfSource"]

Floats = npt.NDArray[np.float32]

# Buffers that older versions of transformers saved; their values follow from config.json.
HARMLESS = (".rotary_emb.inv_freq", ".attn.bias", ".attn.masked_bias")
# A layer's experts in one tensor, as transformers has them in memory.
STACK = re.compile(r"model\.layers\.(\d+)\.mlp\.experts\.(gate_up_proj|down_proj)")
# Rows of each of two matrices that are read at a time.
ROWS_COMPARED = 1024


class HfSource:
    """An open folder; a `Source`. Raises ModelError if it is incomplete, damaged or not supported."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.notes: list[str] = []
        config = checked_config(folder, {file.name for file in folder.iterdir()})
        self.activations = in_config(config)
        self._family = FAMILIES[config.text("model_type")]
        with faults_of(folder):
            self.spec = self._family.hf(config, folder_name(folder))
        # Norms without weights multiply by one (OPT).
        self._ones = not config.flag("layer_norm_elementwise_affine", True)
        # Layers behind the last, which guess further tokens.
        self._drafts = config.count("num_nextn_predict_layers", 0, low=0)
        settings = config.section("quantization_config")
        stored = self._read(settings if settings.text("quant_method", "") in METHODS else None)
        with faults_of(folder):
            self._describe(positions=self._family.hf_positions(config, self.spec))
        self._tensors: dict[str, SourceTensor] = {name: self._tensor(name, tensor) for name, tensor in stored.items()}
        if self._ones:
            self._tensors |= {name: Ones(shape) for name, shape in file_shapes(self.spec) if name.endswith("norm")}
        self._tensors |= self._experts
        for name, projection in self._projections.items():
            self._tensors[name] = Projected(self._tensors[name], projection)
        predictor, matrices = read_predictors(folder, self._inner, self.spec)
        self.spec = replace(self.spec, predictor=predictor)
        self._tensors |= {name: HfTensor(tensor) for name, tensor in matrices.items()}
        self.tokenizer = read_tokenizer(folder, config, self.spec.vocab)

    def names(self) -> Set[str]:
        return self._tensors.keys()

    def tensor(self, name: str) -> SourceTensor:
        return self._tensors[name]

    def _describe(self, **fields: Any) -> None:
        """Replace fields of the architecture."""
        self.spec = replace(self.spec, architecture=replace(self.spec.architecture, **fields))

    def _read(self, quantised: Fields | None) -> dict[str, StoredTensor[str]]:
        """The model's tensors by our names; raises ModelError for one that is missing, unknown or of a wrong shape.

        `quantised`: how the folder says that its matrices are.
        """
        stored = read_weights(self.folder)
        self._grouped: dict[str, Grouped] = {} if quantised is None else gather(stored, quantised)
        head, embed = self._family.hf_name("head"), self._family.hf_name("embed")
        base = embed.partition(".")[0] + "."
        if embed not in stored and embed.removeprefix(base) in stored:
            # Saved by the base class of the model, which has no head.
            stored = {name if name == head else f"{base}{name}": tensor for name, tensor in stored.items()}
        # A parameter, where all other tensors are parts of a module.
        stored = {f"{name}.weight" if name.endswith(".sinks") else name: tensor for name, tensor in stored.items()}
        self._family = self._family.named(stored, HF)
        stored = self._without_drafts(stored)
        self._inner = {name: stored.pop(name) for name in [*stored] if INNER.search(name)}
        self._experts = read_experts(self.folder, stored, self.spec, self.notes) if self._family.hf_in_turns else {}
        stored = self._apart(stored)
        self._describe(tied_head=self._is_tied(stored.get(head), stored.get(embed)))
        if self.spec.architecture.tied_head:
            stored.pop(head, None)
        self._projections = self._take_projections(stored)
        if self._projections and self.spec.architecture.tied_head and embed in stored:
            # The embedding and the head are two matrices, once they are projected.
            stored[head] = stored[embed]
            self._describe(tied_head=False)
        self._cuts = self._family.cuts(self.spec, HF)
        widths = {name: (len(matrix),) for name, matrix in self._projections.items()}
        tensors = {
            name: self._find(name, stored, (shape[0], *widths.get(name, shape[1:])))
            for name, shape in file_shapes(self.spec)
            if not (self._ones and name.endswith("norm")) and name not in self._experts
        }
        known = {self._family.hf_name(name) for name in tensors}
        unknown = [name for name in stored if name not in known and not name.endswith(HARMLESS)]
        if unknown:
            raise ModelError(
                f"{self.folder}: tensor {min(unknown)} does not belong to the {self.spec.family} model of "
                f"{self.spec.layers} layers that config.json describes; such models are not supported"
            )
        return tensors

    def _without_drafts(self, stored: dict[str, StoredTensor[str]]) -> dict[str, StoredTensor[str]]:
        if not self._drafts:
            return stored
        layers = {name: int(match[1]) for name in stored if (match := re.match(r"model\.layers\.(\d+)\.", name))}
        drafts = range(self.spec.layers, self.spec.layers + self._drafts)
        kept = {name: tensor for name, tensor in stored.items() if layers.get(name) not in drafts}
        if len(kept) < len(stored):
            self.notes.append(f"{self._drafts} layers that guess further tokens are left out")
        return kept

    def _apart(self, stored: dict[str, StoredTensor[str]]) -> dict[str, StoredTensor[str]]:
        """Experts as tensors of their own, as published checkpoints have them, where transformers has saved stacks."""
        experts = self.spec.architecture.feed_forward.experts
        if experts is None:
            return stored
        # A bias that has no dot before it.
        apart = {name.replace("e_score_correction_bias", "e_score_correction.bias"): stored[name] for name in stored}
        for name, tensor in stored.items():
            match = STACK.fullmatch(name)
            if match is None:
                continue
            layer, parts = f"layers.{match[1]}.", ("gate", "up") if match[2] == "gate_up_proj" else ("down",)
            shape = tensor.shape
            if len(shape) != 3 or shape[0] != experts.number or not shape[1] or shape[1] % len(parts):
                raise ModelError(
                    f"{tensor.path}: tensor {name} has shape {shape}, not that of {experts.number} experts"
                )
            rows = shape[1] // len(parts)
            for number, i in product(range(experts.number), range(len(parts))):
                ours = f"{layer}experts.{number}.{parts[i]}"
                apart[self._family.hf_name(ours)] = tensor.item(number).piece(i * rows, rows)
            router = f"model.{layer}mlp.gate.weight"
            if router in apart:
                apart[self._family.hf_name(f"{layer}router")] = apart.pop(router)
            del apart[name]
        return apart

    def _take_projections(self, stored: dict[str, StoredTensor[str]]) -> dict[str, Floats]:
        """What embedding and head are to be multiplied with, [width, hidden] each; mostly nothing."""
        names = [f"{name}.weight" for name in self._family.hf_projections or () if f"{name}.weight" in stored]
        found, hidden = [stored.pop(name) for name in names], self.spec.hidden
        if not found:
            return {}
        width = found[0].shape[-1]
        shapes, known = [tensor.shape for tensor in found], all(tensor.type in KINDS for tensor in found)
        if shapes != [(hidden, width), (width, hidden)] or not known:
            raise ModelError(f"{self.folder}: {', '.join(names)} do not lead to {hidden} numbers and back")
        return {"embed": HfTensor(found[0], transposed=True).float32(), "head": HfTensor(found[1]).float32()}

    def _is_tied(self, head: StoredTensor[str] | None, embed: StoredTensor[str] | None) -> bool:
        """Whether the embedding is the head. As in transformers, two that differ never are."""
        tied = self.spec.architecture.tied_head
        if head is None and not tied:
            name = self._family.hf_name("head")
            raise ModelError(f"{self.folder}: tensor {name} is missing; a model without a head writes no text")
        if head is None or embed is None or not tied:
            return head is None
        if (head.type, head.shape) == (embed.type, embed.shape) and _equal(head, embed):
            return True
        self.notes.append("config.json ties the head to the embedding, but the weights differ: they are not tied")
        return False

    def _find(self, name: str, stored: Mapping[str, StoredTensor[str]], shape: tuple[int, ...]) -> StoredTensor[str]:
        """The tensor, or the published one of which a part is what we call `name`."""
        published = self._family.hf_name(name)
        found = stored.get(published)
        if found is None:
            raise ModelError(f"{self.folder}: tensor {published} is missing; the model is incomplete")
        _, rows = self._cuts.get(part_of(name), (0, shape[0]))
        whole = (rows, *shape[1:])[:: -1 if self._is_turned(name) else 1]
        if found.shape != whole:
            raise ModelError(f"{found.path}: tensor {published} has shape {found.shape}, config.json says {whole}")
        if found.type not in (*KINDS, FOUR_BITS) or (found.type == FOUR_BITS and self._is_turned(name)):
            raise ModelError(
                f"{found.path}: tensor {published} has type {found.type}; {', '.join(KINDS)} are supported"
            )
        return found

    def _is_turned(self, name: str) -> bool:
        """Whether the file has [in, out] for a matrix [out, in]."""
        return self._family.hf_turned and name.startswith("layers.") and not name.endswith(("norm", ".bias"))

    def _tensor(self, name: str, stored: StoredTensor[str]) -> SourceTensor:
        part, picked = part_of(name), None
        if part in self._cuts:
            first, _ = self._cuts[part]
            picked = np.arange(first, first + layer_shapes(self.spec)[part][0])
            if self._family.hf_grouped and part[0] in "qkv":
                picked = grouped_rows(self.spec.architecture.attention, part[0])
        plus = 1 if self._family.norms_plus_one and name.endswith("norm") else 0
        order, transposed = pair_order(self.spec, name), name.endswith(".down") != self._is_turned(name)
        if stored.type == FOUR_BITS:
            grouped = self._grouped[stored.name]
            return FourBitTensor(stored.name, grouped, transposed=transposed, order=order, picked=picked)
        return HfTensor(stored, transposed=transposed, order=order, plus=plus, picked=picked)


def _equal(a: StoredTensor[str], b: StoredTensor[str]) -> bool:
    """Whether two matrices of one shape hold the same bytes."""
    starts = range(0, a.shape[0], ROWS_COMPARED)
    return all(np.array_equal(a.rows(i, i + ROWS_COMPARED), b.rows(i, i + ROWS_COMPARED)) for i in starts)
