"""Tiny random models of every family, made by transformers, and what llama.cpp's converter makes of them."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt
import torch
import transformers
from safetensors.numpy import load_file

Floats = npt.NDArray[np.float32]
VOCAB, CONTEXT = 300, 512
# Sizes in the words of most families; heads x head size is not the hidden size.
SIZES = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": VOCAB,
    "max_position_embeddings": CONTEXT,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
# By the name of a test: the family's model_type, and fields of its configuration.
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen2": ("qwen2", {}),
    "qwen2 windows": (
        "qwen2",
        {"use_sliding_window": True, "sliding_window": 24, "max_window_layers": 1, "tie_word_embeddings": True},
    ),
    "qwen3": ("qwen3", {"head_dim": 32}),
    "qwen3 biases": ("qwen3", {"head_dim": 8, "attention_bias": True, "num_key_value_heads": 1}),
}


def write_model(folder: Path, name: str, seed: int = 0, **options: Any) -> Path:
    """Write the folder of a model of `MODELS`, with other fields of its configuration if `options` say so."""
    family, fields = MODELS[name]
    config = transformers.AutoConfig.for_model(family, **(SIZES | fields | options))
    model = transformers.AutoModelForCausalLM.from_config(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            # About what it is, so that norms stay around their one, or zero; large enough to move the logits.
            start = parameter.mean() if parameter.dim() == 1 else 0
            parameter.copy_(start + 0.15 * torch.randn(parameter.shape, generator=generator))
    model.save_pretrained(folder)
    return folder


def write_family_gguf(folder: Path, path: Path) -> Path:
    """What llama.cpp's converter makes of the folder."""
    config = transformers.AutoConfig.from_pretrained(folder)
    architecture = ARCHITECTURES.get(config.model_type, config.model_type)
    writer = gguf.GGUFWriter(path, architecture)
    _write_fields(writer, config)
    for key, value in EXTRA.get(config.model_type, lambda _config: {})(config).items():
        add = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
        add[type(value)](f"{architecture}.{key}", value)
    arch = next(arch for arch, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    names = gguf.get_tensor_name_map(arch, config.num_hidden_layers)
    for name, values in load_file(folder / "model.safetensors").items():
        for published, converted in CONVERSIONS.get(config.model_type, _as_it_is)(config, name, values):
            ours = names.get_name(published, try_suffixes=(".weight", ".bias"))
            assert ours is not None, published
            writer.add_tensor(ours, np.ascontiguousarray(converted, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _write_fields(writer: gguf.GGUFWriter, config: Any) -> None:
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    rope = config.rope_parameters
    writer.add_rope_freq_base(rope.get("full_attention", rope)["rope_theta"])


def _as_it_is(_config: Any, name: str, values: Floats) -> list[tuple[str, Floats]]:
    return [(name, values)]


# Names of families that GGUF calls otherwise; fields beside the common ones; what becomes of a tensor.
ARCHITECTURES: dict[str, str] = {}
EXTRA: dict[str, Callable[[Any], Mapping[str, Any]]] = {}
CONVERSIONS: dict[str, Callable[[Any, str, Floats], list[tuple[str, Floats]]]] = {}
