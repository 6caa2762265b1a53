"""Hugging Face folders of the llama family: config.json, safetensors (one file or an index of several), tokenizer.json.

A folder may have low-rank predictors too, in `predictor.safetensors`: tensors layers.{i}.fc1.weight [r, hidden] and
layers.{i}.fc2.weight [ffn, r] for every layer, and as metadata the fields of `model.Predictor`, which are optional.
Covers the activations of `model.ACTIVATIONS`, biases, tied embeddings and RoPE as it is, linear or llama3.
Does not cover: quantised checkpoints, pickled weights, other model types.
"""

from collections.abc import Set
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from warmfront.coordinator.models import rope
from warmfront.coordinator.models.fields import Fields
from warmfront.coordinator.models.hf_folder import inside, read_fields, read_weights
from warmfront.coordinator.models.hf_tokenizer import read_tokenizer
from warmfront.coordinator.models.safetensors_file import ITEM_BYTES, KINDS, read_safetensors
from warmfront.coordinator.models.source import (
    SourceTensor,
    check_predictor,
    check_sizes,
    file_shapes,
    predictor_shapes,
)
from warmfront.coordinator.models.stored_tensor import StoredTensor
from warmfront.shared.errors import ModelError
from warmfront.shared.model.formats import unpack
from warmfront.shared.model.spec import ModelSpec, Predictor

__all__ = ["HfSource"]

Floats = npt.NDArray[np.float32]

MODEL_TYPE = "llama"
ACTIVATION_NAMES = {
    "silu": "silu",
    "swish": "silu",
    "relu": "relu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
}
BASE = "model."
TOP = {"embed": "model.embed_tokens.weight", "head": "lm_head.weight", "norm": "model.norm.weight"}
PARTS = {
    "attn_norm": "input_layernorm",
    "q": "self_attn.q_proj",
    "k": "self_attn.k_proj",
    "v": "self_attn.v_proj",
    "o": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "gate": "mlp.gate_proj",
    "up": "mlp.up_proj",
    "down": "mlp.down_proj",
}
ATTENTION, MLP = frozenset("qkvo"), frozenset(("gate", "up", "down"))
# Buffers that older versions of transformers saved: what they hold follows from config.json.
HARMLESS = ".rotary_emb.inv_freq"
# Rows of two matrices that are in memory at a time.
ROWS_COMPARED = 1024


class HfSource:
    """An open folder; a `Source`. Raises ModelError if it is incomplete, damaged or not supported."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.notes: list[str] = []
        config = read_fields(folder, "config.json")
        if config is None:
            raise ModelError(f"{folder} has no config.json; give a Hugging Face folder or a GGUF file")
        if (folder / "adapter_config.json").exists():
            raise ModelError(f"{folder} has an adapter, which is not supported; merge it into the model's weights")
        _check_family(folder, config)
        self.spec = _sizes(folder, config)
        check_sizes(folder, self.spec)
        self._tensors = self._read(config)
        self.spec = replace(self.spec, rope_frequencies=_frequencies(config, self.spec))
        if (folder / "predictor.safetensors").exists():
            settings, matrices = _predictor(inside(folder, "predictor.safetensors"), self.spec)
            self.spec = replace(self.spec, predictor=settings)
            self._tensors |= matrices
        self.tokenizer = read_tokenizer(folder, config, self.spec.vocab)

    def names(self) -> Set[str]:
        return self._tensors.keys()

    def tensor(self, name: str) -> SourceTensor:
        return self._tensors[name]

    def _read(self, config: Fields) -> dict[str, "HfTensor"]:
        """The model's tensors; raises ModelError if one is missing, of another shape or type, or not the model's."""
        stored = read_weights(self.folder)
        if TOP["embed"] not in stored and TOP["embed"].removeprefix(BASE) in stored:
            # Saved by the base class of the model, which knows of no head.
            stored = {name if name == TOP["head"] else f"{BASE}{name}": tensor for name, tensor in stored.items()}
        biased = set(ATTENTION if config.flag("attention_bias", False) else ())
        biased |= MLP if config.flag("mlp_bias", False) else set()
        tensors: dict[str, HfTensor] = {}
        for name, shape in file_shapes(self.spec, head=self._has_head(config, stored)):
            part = name.rpartition(".")[2]
            published = TOP.get(name) or f"{BASE}{name.rpartition('.')[0]}.{PARTS[part]}.weight"
            tensors[name] = self._tensor(published, stored, shape, part)
            if part in biased:
                bias = f"{published.removesuffix('weight')}bias"
                # A bias has no columns to turn, only q's and k's order matters.
                tensors[f"{name}.bias"] = self._tensor(bias, stored, shape[:1], part if part in "qk" else "bias")
        unknown = [name for name in stored if not name.endswith(HARMLESS)]
        if unknown:
            raise ModelError(
                f"{self.folder}: tensor {min(unknown)} does not belong to the llama model of {self.spec.layers} layers "
                "that config.json describes; such models are not supported"
            )
        return tensors

    def _has_head(self, config: Fields, stored: dict[str, StoredTensor[str]]) -> bool:
        """Whether the head is not the embedding. Like transformers: two that differ are not tied, whatever is asked."""
        head, embed, tied = stored.get(TOP["head"]), stored.get(TOP["embed"]), config.flag("tie_word_embeddings", False)
        if head is None and not tied:
            raise ModelError(f"{self.folder}: tensor {TOP['head']} is missing; a model without a head writes no text")
        if head is None or embed is None or not tied:
            return head is not None
        if (head.type, head.shape) == (embed.type, embed.shape) and _equal(head, embed):
            del stored[TOP["head"]]
            return False
        self.notes.append("config.json ties the head to the embedding, but the weights differ: they are not tied")
        return True

    def _tensor(self, name: str, stored: dict[str, StoredTensor[str]], shape: tuple[int, ...], part: str) -> "HfTensor":
        """Take a tensor out of those that are `stored`."""
        found = stored.pop(name, None)
        if found is None:
            raise ModelError(f"{self.folder}: tensor {name} is missing; the model is incomplete")
        if found.shape != shape:
            raise ModelError(f"{found.path}: tensor {name} has shape {found.shape}, config.json says {shape}")
        if found.type not in KINDS:
            raise ModelError(f"{found.path}: tensor {name} has type {found.type}; {', '.join(KINDS)} are supported")
        return HfTensor(found, part, self.spec.head_dim)


class HfTensor(SourceTensor):
    """A tensor of a safetensors file.

    `part` is the last word of its name: `down` is delivered transposed, rows of q and k as RoPE's pairs.
    """

    def __init__(self, stored: StoredTensor[str], part: str, head_dim: int) -> None:
        shape = stored.shape
        self._stored = stored
        self._transposed = part == "down"
        self._half = head_dim // 2 if part in ("q", "k") else 0
        label, step = f"{stored.path}: tensor {stored.name}", head_dim if self._half else 1
        super().__init__(label, shape[::-1] if self._transposed else shape, KINDS[stored.type], step)

    def _widen(self, start: int, stop: int) -> Floats:
        if self._transposed:
            size = ITEM_BYTES[self._stored.type]
            return unpack(self._stored.columns(start * size, stop * size), self.kind, stop - start).T
        if len(self.shape) == 1:
            wide = unpack(self._stored.rows(), self.kind, self.shape[0])[0, start:stop]
        else:
            wide = unpack(self._stored.rows(start, stop), self.kind, self.shape[1])
        if self._half:
            # Published as all first members of the pairs, then all second ones.
            tail = wide.shape[1:]
            wide = wide.reshape(-1, 2, self._half, *tail).swapaxes(1, 2).reshape(-1, *tail)
        return wide


def _equal(a: StoredTensor[str], b: StoredTensor[str]) -> bool:
    """Whether two matrices of one shape hold the same bytes."""
    starts = range(0, a.shape[0], ROWS_COMPARED)
    return all(np.array_equal(a.rows(i, i + ROWS_COMPARED), b.rows(i, i + ROWS_COMPARED)) for i in starts)


def _check_family(folder: Path, config: Fields) -> None:
    model_type = config.text("model_type", "")
    if model_type != MODEL_TYPE:
        raise ModelError(f"{folder}: model type '{model_type}' is not supported; {MODEL_TYPE} is")
    quantised = config.section("quantization_config")
    if [*quantised]:
        method = quantised.text("quant_method", "some method")
        raise ModelError(
            f"{folder} is quantised by {method}, which is not supported; give the unquantised model or a GGUF"
        )
    activation = config.text("hidden_act", "silu")
    if activation not in ACTIVATION_NAMES:
        raise ModelError(f"{folder}: activation '{activation}' is not supported; {', '.join(ACTIVATION_NAMES)} are")


def _sizes(folder: Path, config: Fields) -> ModelSpec:
    """The model but for its rotary frequencies, which take room by a size that the tensors must bear out first."""
    hidden, heads = config.count("hidden_size"), config.count("num_attention_heads")
    return ModelSpec(
        architecture=MODEL_TYPE,
        name=folder.resolve().name,
        layers=config.count("num_hidden_layers"),
        hidden=hidden,
        ffn=config.count("intermediate_size"),
        heads=heads,
        kv_heads=config.count("num_key_value_heads", heads),
        head_dim=config.count("head_dim", hidden // heads),
        vocab=config.count("vocab_size"),
        context=config.count("max_position_embeddings", 2048),
        norm_eps=config.positive("rms_norm_eps", 1e-6),
        activation=ACTIVATION_NAMES[config.text("hidden_act", "silu")],
        rope_frequencies=(),
    )


def _frequencies(config: Fields, spec: ModelSpec) -> tuple[float, ...]:
    """RoPE's frequencies; transformers 5 writes `rope_parameters`, before it was `rope_theta` and `rope_scaling`."""
    settings = config.section("rope_parameters" if "rope_parameters" in config else "rope_scaling")
    kind = settings.text("rope_type", settings.text("type", "default"))
    plain = rope.frequencies(spec.head_dim, settings.positive("rope_theta", config.positive("rope_theta", 10000.0)))
    if any(fields.number("partial_rotary_factor", 1.0) != 1.0 for fields in (settings, config)):
        raise ModelError(f"{config.path}: RoPE on a part of the head is not supported")
    if kind == "linear":
        return rope.checked(config.path, plain, settings.positive("factor"))
    if kind == "llama3":
        low, high = settings.positive("low_freq_factor"), settings.positive("high_freq_factor")
        if low >= high:
            raise settings.wrong("low_freq_factor", f"below high_freq_factor, {high}")
        plain = rope.llama3(
            plain,
            factor=settings.positive("factor"),
            low=low,
            high=high,
            original_context=settings.positive("original_max_position_embeddings", spec.context),
        )
    elif kind != "default":
        raise ModelError(f"{config.path}: RoPE type '{kind}' is not supported; default, linear and llama3 are")
    return rope.checked(config.path, plain)


def _predictor(path: Path, spec: ModelSpec) -> tuple[Predictor, dict[str, HfTensor]]:
    """The predictors' settings and matrices; there is no part of it that may be missing or unknown."""
    values, metadata = read_safetensors(path, "make it anew or remove it")
    settings: dict[str, Any] = {name: metadata[name] for name in ("input", "activation") if name in metadata}
    try:
        predictor = Predictor(**settings, threshold=float(metadata.get("threshold", 0)))
    except ValueError:
        raise ModelError(f"{path}: threshold '{metadata['threshold']}' is not a number; write one like 0.5") from None
    check_predictor(path, predictor)
    tensors: dict[str, HfTensor] = {}
    shapes = {name.removesuffix(".weight"): found.shape for name, found in values.items()}
    for name, shape in predictor_shapes(spec, shapes):
        published = f"{name}.weight"
        found = values.pop(published, None)
        if found is None:
            raise ModelError(f"{path}: tensor {published} is missing; make predictors for every layer")
        if found.shape != shape:
            raise ModelError(
                f"{path}: tensor {published} has shape {found.shape} instead of {shape}; it is of another model"
            )
        if found.type not in KINDS:
            raise ModelError(f"{path}: tensor {published} has type {found.type}; save it as one of {', '.join(KINDS)}")
        tensors[name] = HfTensor(found, name.rpartition(".")[2], spec.head_dim)
    if values:
        raise ModelError(
            f"{path}: tensor {min(values)} is unknown; only fc1.weight and fc2.weight of each layer are read"
        )
    return predictor, tensors
