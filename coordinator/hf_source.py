"""Hugging Face folders of the llama family: config.json, safetensors (one file or an index of several), tokenizer.json.

A folder may have low-rank predictors too, in `predictor.safetensors`: tensors layers.{i}.fc1.weight [r, hidden] and
layers.{i}.fc2.weight [ffn, r] for every layer, and as metadata the fields of `model.Predictor`, which are optional.
Covers the activations of `model.ACTIVATIONS`, biases, tied embeddings and RoPE as it is, linear or llama3.
Does not cover: quantised checkpoints, pickled weights, other model types.
"""

import json
from collections.abc import Set
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError, safe_open
from tokenizers import Tokenizer

from warmfront.coordinator import rope
from warmfront.coordinator.source import (
    SourceTensor,
    TokenizerFiles,
    check_predictor,
    check_sizes,
    end_ids,
    file_shapes,
    predictor_shapes,
)
from warmfront.shared.errors import ModelError
from warmfront.shared.model import ModelSpec, Predictor
from warmfront.shared.weights import Kind

__all__ = ["HfSource"]

Floats = npt.NDArray[np.float32]

MODEL_TYPE = "llama"
KINDS = {"F32": Kind.F32, "F16": Kind.F16, "BF16": Kind.BF16}
ACTIVATION_NAMES = {
    "silu": "silu",
    "swish": "silu",
    "relu": "relu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
}
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


class HfSource:
    """An open folder; a `Source`. Raises ModelError if it is incomplete, damaged or not supported."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.notes: list[str] = []
        config = _load(folder / "config.json")
        if config is None:
            raise ModelError(f"{folder} has no config.json; give a Hugging Face folder or a GGUF file")
        _check_family(folder, config)
        try:
            self.spec = _spec(folder, config)
        except KeyError as error:
            raise ModelError(f"{folder / 'config.json'}: {error} is missing") from error
        except (ArithmeticError, AttributeError, TypeError, ValueError) as error:
            raise ModelError(f"{folder / 'config.json'} is not a llama configuration: {error}") from error
        check_sizes(folder, self.spec)
        self._tensors = _tensors(folder, config, self.spec)
        predictor = folder / "predictor.safetensors"
        if predictor.exists():
            settings, matrices = _predictor(predictor, self.spec)
            self.spec = replace(self.spec, predictor=settings)
            self._tensors |= matrices
        self.tokenizer = _tokenizer(folder, config)

    def names(self) -> Set[str]:
        return self._tensors.keys()

    def tensor(self, name: str) -> SourceTensor:
        return self._tensors[name]


class HfTensor(SourceTensor):
    """A tensor of a safetensors file.

    `part` is the last word of its name: `down` is delivered transposed, rows of q and k as RoPE's pairs.
    """

    def __init__(self, values: Any, kind: Kind, part: str, head_dim: int) -> None:
        shape = tuple(values.get_shape())
        self._values = values
        self._transposed = part == "down"
        self._half = head_dim // 2 if part in ("q", "k") else 0
        super().__init__(shape[::-1] if self._transposed else shape, kind, step=head_dim if self._half else 1)

    def _widen(self, start: int, stop: int) -> Floats:
        values = self._values[:, start:stop].T if self._transposed else self._values[start:stop]
        wide: Floats = values.float().numpy()
        if self._half:
            # Published as all first members of the pairs, then all second ones.
            tail = wide.shape[1:]
            wide = wide.reshape(-1, 2, self._half, *tail).swapaxes(1, 2).reshape(-1, *tail)
        return wide


def _load(path: Path) -> dict[str, Any] | None:
    """A JSON object; None if there is no such file."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except OSError as error:
        raise ModelError(f"cannot read {path}: {error.strerror}") from error
    except ValueError as error:
        raise ModelError(f"{path} is not JSON ({error}); fetch it again") from error
    if not isinstance(value, dict):
        raise ModelError(f"{path} is not a JSON object; fetch it again")
    return value


def _check_family(folder: Path, config: dict[str, Any]) -> None:
    model_type = config.get("model_type")
    if model_type != MODEL_TYPE:
        raise ModelError(f"{folder}: model type '{model_type}' is not supported; {MODEL_TYPE} is")
    if config.get("quantization_config"):
        method = config["quantization_config"].get("quant_method", "some method")
        raise ModelError(
            f"{folder} is quantised by {method}, which is not supported; give the unquantised model or a GGUF"
        )
    activation = config.get("hidden_act", "silu")
    if activation not in ACTIVATION_NAMES:
        raise ModelError(f"{folder}: activation '{activation}' is not supported; {', '.join(ACTIVATION_NAMES)} are")


def _spec(folder: Path, config: dict[str, Any]) -> ModelSpec:
    """Raises KeyError, TypeError or ValueError for a config that is none."""
    hidden, heads = int(config["hidden_size"]), int(config["num_attention_heads"])
    head_dim = int(config.get("head_dim") or hidden // heads)
    context = int(config.get("max_position_embeddings", 2048))
    return ModelSpec(
        architecture=MODEL_TYPE,
        name=folder.resolve().name,
        layers=int(config["num_hidden_layers"]),
        hidden=hidden,
        ffn=int(config["intermediate_size"]),
        heads=heads,
        kv_heads=int(config.get("num_key_value_heads") or heads),
        head_dim=head_dim,
        vocab=int(config["vocab_size"]),
        context=context,
        norm_eps=float(config.get("rms_norm_eps", 1e-6)),
        activation=ACTIVATION_NAMES[config.get("hidden_act", "silu")],
        rope_frequencies=_frequencies(folder, config, head_dim, context),
    )


def _frequencies(folder: Path, config: dict[str, Any], head_dim: int, context: int) -> tuple[float, ...]:
    """RoPE's frequencies; transformers 5 writes `rope_parameters`, before it was `rope_theta` and `rope_scaling`."""
    settings = config.get("rope_parameters") or config.get("rope_scaling") or {}
    kind = settings.get("rope_type", settings.get("type", "default"))
    plain = rope.frequencies(head_dim, float(settings.get("rope_theta", config.get("rope_theta", 10000.0))))
    if settings.get("partial_rotary_factor", 1.0) != 1.0:
        raise ModelError(f"{folder}: RoPE on a part of the head is not supported")
    if kind == "linear":
        plain = plain / float(settings["factor"])
    elif kind == "llama3":
        plain = rope.llama3(
            plain,
            factor=float(settings["factor"]),
            low=float(settings["low_freq_factor"]),
            high=float(settings["high_freq_factor"]),
            original_context=float(settings.get("original_max_position_embeddings", context)),
        )
    elif kind != "default":
        raise ModelError(f"{folder}: RoPE type '{kind}' is not supported; default, linear and llama3 are")
    return tuple(plain.tolist())


def _tensors(folder: Path, config: dict[str, Any], spec: ModelSpec) -> dict[str, HfTensor]:
    files = _Files(folder)
    biased = (ATTENTION if config.get("attention_bias") else frozenset()) | (
        MLP if config.get("mlp_bias") else frozenset()
    )
    tensors: dict[str, HfTensor] = {}
    for name, shape in file_shapes(spec, head=not config.get("tie_word_embeddings", False)):
        part = name.rpartition(".")[2]
        published = TOP.get(name) or f"model.{name.rpartition('.')[0]}.{PARTS[part]}.weight"
        tensors[name] = files.tensor(published, shape, part, spec.head_dim)
        if part in biased:
            bias = f"{published.removesuffix('weight')}bias"
            # A bias has no columns to turn, only q's and k's order matters.
            tensors[f"{name}.bias"] = files.tensor(bias, shape[:1], part if part in "qk" else "bias", spec.head_dim)
    return tensors


class _Files:
    """The folder's safetensors files, opened when first needed."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._open: dict[str, Any] = {}
        index = _load(folder / "model.safetensors.index.json")
        self._where: dict[str, str] | None = None
        if index is not None and not (folder / "model.safetensors").exists():
            if not isinstance(index.get("weight_map"), dict):
                raise ModelError(f"{folder / 'model.safetensors.index.json'} has no weight_map; fetch it again")
            self._where = index["weight_map"]
        elif not (folder / "model.safetensors").exists():
            raise ModelError(
                f"{folder} has no model.safetensors; other weight files are not supported, save it as safetensors"
            )

    def tensor(self, name: str, shape: tuple[int, ...], part: str, head_dim: int) -> HfTensor:
        file = "model.safetensors" if self._where is None else self._where.get(name)
        if file is None:
            raise ModelError(f"{self._folder}: tensor {name} is missing from the index; the model is incomplete")
        path = self._folder / file
        try:
            if file not in self._open:
                self._open[file] = safe_open(path, framework="pt")
            values = self._open[file].get_slice(name)
        except OSError as error:
            raise ModelError(f"cannot read {path}, which should hold {name}: {error}") from error
        except SafetensorError as error:
            raise ModelError(f"{path} is damaged or lacks tensor {name} ({error}); fetch it again") from error
        if tuple(values.get_shape()) != shape:
            raise ModelError(f"{path}: tensor {name} has shape {tuple(values.get_shape())}, config.json says {shape}")
        if values.get_dtype() not in KINDS:
            raise ModelError(f"{path}: tensor {name} has type {values.get_dtype()}; {', '.join(KINDS)} are supported")
        return HfTensor(values, KINDS[values.get_dtype()], part, head_dim)


def _predictor(path: Path, spec: ModelSpec) -> tuple[Predictor, dict[str, HfTensor]]:
    """The predictors' settings and matrices; there is no part of it that may be missing or unknown."""
    try:
        file: Any = safe_open(path, framework="pt")
        values = {name: file.get_slice(name) for name in list(file.keys())}
        metadata = file.metadata() or {}
    except (OSError, SafetensorError) as error:
        raise ModelError(f"{path} is damaged ({error}); make it anew or remove it") from error
    settings: dict[str, Any] = {name: metadata[name] for name in ("input", "activation") if name in metadata}
    try:
        predictor = Predictor(**settings, threshold=float(metadata.get("threshold", 0)))
    except ValueError:
        raise ModelError(f"{path}: threshold '{metadata['threshold']}' is not a number; write one like 0.5") from None
    check_predictor(path, predictor)
    tensors: dict[str, HfTensor] = {}
    shapes = {name.removesuffix(".weight"): tuple(found.get_shape()) for name, found in values.items()}
    for name, shape in predictor_shapes(spec, shapes):
        published = f"{name}.weight"
        found = values.pop(published, None)
        if found is None:
            raise ModelError(f"{path}: tensor {published} is missing; make predictors for every layer")
        have, kind = tuple(found.get_shape()), found.get_dtype()
        if have != shape:
            raise ModelError(f"{path}: tensor {published} has shape {have} instead of {shape}; it is of another model")
        if kind not in KINDS:
            raise ModelError(f"{path}: tensor {published} has type {kind}; save it as one of {', '.join(KINDS)}")
        tensors[name] = HfTensor(found, KINDS[kind], name.rpartition(".")[2], spec.head_dim)
    if values:
        raise ModelError(
            f"{path}: tensor {min(values)} is unknown; only fc1.weight and fc2.weight of each layer are read"
        )
    return predictor, tensors


def _tokenizer(folder: Path, config: dict[str, Any]) -> TokenizerFiles | None:
    path = folder / "tokenizer.json"
    if not path.exists():
        return None
    try:
        text = path.read_text(encoding="utf-8")
        tokenizer = Tokenizer.from_str(text)
    except Exception as error:  # tokenizers raises bare Exception
        raise ModelError(f"{path} is not a tokenizer ({error}); fetch it again") from error
    settings = _load(folder / "tokenizer_config.json") or {}
    generation = _load(folder / "generation_config.json") or {}
    ends = [number for source in (generation, config) for number in _ids(source.get("eos_token_id"))]
    bos_id = _named(tokenizer, settings.get("bos_token"), config.get("bos_token_id"))
    add_bos = settings.get("add_bos_token")
    if add_bos is None:
        add_bos = tokenizer.encode("").ids[:1] == [bos_id]
    special = ((i, token.content) for i, token in tokenizer.get_added_tokens_decoder().items() if token.special)
    return TokenizerFiles(
        json=text,
        chat_template=_chat_template(folder, settings),
        bos_id=bos_id,
        eos_id=_named(tokenizer, settings.get("eos_token"), ends[0] if ends else None),
        eos_ids=end_ids(special, ends),
        add_bos=bos_id is not None and bool(add_bos),
    )


def _named(tokenizer: Any, token: Any, otherwise: int | None) -> int | None:
    """Id of a token that the settings name as text or as an object with `content`."""
    text = token.get("content") if isinstance(token, dict) else token
    return tokenizer.token_to_id(text) if text else otherwise


def _ids(value: Any) -> list[int]:
    return value if isinstance(value, list) else [] if value is None else [value]


def _chat_template(folder: Path, settings: dict[str, Any]) -> str | None:
    file = folder / "chat_template.jinja"
    if file.exists():
        return file.read_text(encoding="utf-8")
    template = settings.get("chat_template")
    if isinstance(template, list):
        return next((entry["template"] for entry in template if entry.get("name") == "default"), None)
    return template
