"""Tiny random models of every family, made by transformers, and what llama.cpp's converter makes of them."""

import math
import re
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
OPT = {"ffn_dim": 96, "word_embed_proj_dim": 64, "num_key_value_heads": 4}
# What families with layer norms call their epsilon.
EPSILONS = ("layer_norm_eps", "layer_norm_epsilon", "norm_epsilon", "norm_eps")
# By the name of a test: the family's model_type, and fields of its configuration.
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "mistral": ("mistral", {"head_dim": 32, "sliding_window": 24}),
    "qwen2": ("qwen2", {}),
    "qwen2 windows": (
        "qwen2",
        {"use_sliding_window": True, "sliding_window": 24, "max_window_layers": 1, "tie_word_embeddings": True},
    ),
    "qwen3": ("qwen3", {"head_dim": 32}),
    "gemma": ("gemma", {"head_dim": 32}),
    "gemma2": ("gemma2", {"head_dim": 32, "sliding_window": 24, "query_pre_attn_scalar": 32}),
    "gemma2 scale": (
        "gemma2",
        {"head_dim": 16, "query_pre_attn_scalar": 40, "attn_logit_softcapping": 3.0, "final_logit_softcapping": 4.0},
    ),
    "gemma3": (
        "gemma3_text",
        {"head_dim": 32, "num_hidden_layers": 7, "sliding_window": 24, "query_pre_attn_scalar": 32},
    ),
    "gemma3 linear": (
        "gemma3_text",
        {
            "head_dim": 16,
            "num_key_value_heads": 1,
            "layer_types": ["full_attention", "sliding_attention", "full_attention"],
            "sliding_window": 20,
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
            },
        },
    ),
    "phi3": ("phi3", {}),
    "phi3 longrope": (
        "phi3",
        {
            "max_position_embeddings": 512,
            "original_max_position_embeddings": 64,
            "sliding_window": 24,
            "rope_parameters": {
                "rope_type": "longrope",
                "rope_theta": 10000.0,
                "partial_rotary_factor": 0.5,
                "original_max_position_embeddings": 64,
                "short_factor": [1.0, 1.5, 2.0, 2.5],
                "long_factor": [1.0, 3.0, 5.0, 9.0],
            },
        },
    ),
    "olmo2": ("olmo2", {}),
    "stablelm": ("stablelm", {"use_qkv_bias": True, "head_dim": None, "hidden_size": 128}),
    "granite": (
        "granite",
        {
            "embedding_multiplier": 6.0,
            "attention_multiplier": 0.1,
            "residual_multiplier": 0.4,
            "logits_scaling": 3.0,
        },
    ),
    "llama yarn": (
        "llama",
        {
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 10000.0,
                "factor": 8.0,
                "original_max_position_embeddings": 64,
            }
        },
    ),
    "llama dynamic": ("llama", {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}}),
    "llama biases": ("llama", {"mlp_bias": True, "head_dim": 32}),
    "gpt2": ("gpt2", {"n_inner": 96, "num_key_value_heads": 4}),
    "opt": ("opt", OPT),
    "opt plain": ("opt", OPT | {"enable_bias": False, "layer_norm_elementwise_affine": False}),
    "opt behind": ("opt", OPT | {"do_layer_norm_before": False, "word_embed_proj_dim": 32}),
    # More heads than a vector has lanes share one key, as in the 7B model.
    "falcon": (
        "falcon",
        {"hidden_size": 160, "num_attention_heads": 20, "ffn_hidden_size": 96, "num_key_value_heads": 1},
    ),
    "falcon new": (
        "falcon",
        {"ffn_hidden_size": 96, "new_decoder_architecture": True, "num_kv_heads": 2, "activation": "relu"},
    ),
    "falcon serial": (
        "falcon",
        {"ffn_hidden_size": 96, "multi_query": False, "parallel_attn": False, "bias": True},
    ),
    "nemotron": ("nemotron", {"head_dim": 32}),
    "starcoder2": ("starcoder2", {"head_dim": 32, "sliding_window": 24}),
    # Experts whose last group is not full, as many as the vectors do not have lanes.
    "mixtral": ("mixtral", {"num_local_experts": 5, "num_experts_per_tok": 2}),
    "qwen2 moe": (
        "qwen2_moe",
        {
            "moe_intermediate_size": 40,
            "shared_expert_intermediate_size": 72,
            "num_experts": 18,
            "num_experts_per_tok": 3,
        },
    ),
    "qwen3 moe": (
        "qwen3_moe",
        {
            "head_dim": 32,
            "moe_intermediate_size": 64,
            "num_experts": 12,
            "num_experts_per_tok": 4,
            "norm_topk_prob": True,
        },
    ),
    "olmoe": ("olmoe", {"num_experts": 6, "num_experts_per_tok": 6, "intermediate_size": 32}),
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


def write_family_gguf(folder: Path, path: Path, dialect: str = "") -> Path:
    """What llama.cpp's converter makes of the folder, or another's; of an OPT, which it does not know, PowerInfer's."""
    config = transformers.AutoConfig.from_pretrained(folder)
    architecture = ARCHITECTURES.get(config.model_type, config.model_type)
    writer = gguf.GGUFWriter(path, architecture)
    dialect = dialect or ("powerinfer" if architecture == "opt" else "")
    if architecture == "opt" and dialect == "powerinfer":
        config.max_position_embeddings += 2  # as many as there are rows
    elif architecture == "opt":
        writer.add_array("opt.pred_lora", [0] * config.num_hidden_layers)
    _write_fields(writer, config)
    for key, value in EXTRA.get(config.model_type, lambda _config: {})(config).items():
        add = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
        add[type(value)](f"{architecture}.{key}", value)
    arch = next((arch for arch, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture), gguf.MODEL_ARCH.LLAMA)
    names = gguf.get_tensor_name_map(arch, config.num_hidden_layers)
    for name, values in _stacked(load_file(folder / "model.safetensors")).items():
        if architecture == "opt":
            writer.add_tensor(*_opt_tensor(name, values, dialect))
            continue
        for published, converted in CONVERSIONS.get(config.model_type, _as_it_is)(config, name, values):
            ours = names.get_name(published, try_suffixes=(".weight", ".bias"))
            assert ours is not None, published
            if dialect == "powerinfer" and ".ffn_down." in ours:
                ours, converted = ours.replace("ffn_down", "ffn_down_t"), converted.T
            writer.add_tensor(ours, np.ascontiguousarray(converted, np.float32))
    for size in ("long", "short"):
        factors = (getattr(config, "rope_parameters", None) or {}).get(f"{size}_factor")
        if factors:
            writer.add_tensor(f"rope_factors_{size}.weight", np.array(factors, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _stacked(tensors: dict[str, Floats]) -> dict[str, Floats]:
    """The experts of a layer in one tensor for each matrix, under the names that the converter gives those."""
    stacks: dict[str, dict[int, Floats]] = {}
    for name, values in tensors.items():
        match = re.fullmatch(r"(model\.layers\.\d+\.)(?:mlp|block_sparse_moe)\.experts\.(\d+)\.(\w+)\.weight", name)
        if match is not None:
            where = "feed_forward" if match[3].startswith("w") else "mlp"
            prefix = match[1] if where == "mlp" else match[1].removeprefix("model.")
            stacks.setdefault(f"{prefix}{where}.experts.{match[3]}.weight", {})[int(match[2])] = values
    apart = {name: values for name, values in tensors.items() if not re.search(r"\.experts\.\d+\.", name)}
    return apart | {name: np.stack([own[i] for i in range(len(own))]) for name, own in stacks.items()}


def _write_fields(writer: gguf.GGUFWriter, config: Any) -> None:
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    if getattr(config, "activation", "") == "relu":
        writer.add_name("ReluFalcon")  # GGUF has no word for the activation
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    if hasattr(config, "rms_norm_eps"):
        writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    else:
        writer.add_layer_norm_eps(next((getattr(config, key) for key in EPSILONS if hasattr(config, key)), 1e-5))
    rope = getattr(config, "rope_parameters", None)
    if rope is None:
        return
    rope = rope.get("full_attention", rope)
    writer.add_rope_freq_base(rope["rope_theta"])
    if rope["rope_type"] == "yarn":
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        writer.add_rope_scaling_factor(rope["factor"])
        writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
    writer.add_rope_dimension_count(int(head_dim * rope.get("partial_rotary_factor", 1.0)))
    if getattr(config, "sliding_window", None) and getattr(config, "use_sliding_window", True):
        writer.add_sliding_window(config.sliding_window)


def _as_it_is(_config: Any, name: str, values: Floats) -> list[tuple[str, Floats]]:
    return [(name, values)]


def _pairs(config: Any, name: str, values: Floats) -> list[tuple[str, Floats]]:
    """Rows of q and k with the two numbers of a rotary pair side by side."""
    for part, heads in (("q_proj", config.num_attention_heads), ("k_proj", config.num_key_value_heads)):
        if part in name:
            values = values.reshape(heads, 2, -1, *values.shape[1:]).swapaxes(1, 2).reshape(values.shape)
    return [(name, values)]


def _turned(_config: Any, name: str, values: Floats) -> list[tuple[str, Floats]]:
    """Matrices as [out, in]."""
    return [(name, values.T if ".c_" in name else values)]


def _ungrouped(config: Any, name: str, values: Floats) -> list[tuple[str, Floats]]:
    """All queries, then all keys, then all values, instead of those of each head of keys."""
    if "query_key_value" not in name:
        return [(name, values)]
    heads = values.reshape(config.num_key_value_heads, -1, config.head_dim, *values.shape[1:])
    parts = (heads[:, :-2], heads[:, -2], heads[:, -1])
    return [(name, np.concatenate([part.reshape(-1, *values.shape[1:]) for part in parts]))]


def _opt_tensor(name: str, values: Floats, dialect: str) -> tuple[str, Floats]:
    """PowerInfer has a row of `down` for each neuron, and all positions; SparkInfer, without predictors, does not."""
    *path, last = name.removeprefix("model.decoder.").split(".")
    layer = f"blk.{path[1]}." if path[0] == "layers" else ""
    own = {
        "embed_tokens": "token_embd",
        "embed_positions": "position_embd",
        "self_attn_layer_norm": "attn_norm",
        "q_proj": "attn_q",
        "k_proj": "attn_k",
        "v_proj": "attn_v",
        "out_proj": "attn_output",
        "final_layer_norm": "ffn_norm" if layer else "output_norm",
        "fc1": "ffn_up",
        "fc2": "ffn_down_t" if dialect == "powerinfer" else "ffn_down",
    }
    if dialect == "powerinfer":
        values = values.T if name.endswith("fc2.weight") else values
    elif path[-1] == "embed_positions":
        values = values[2:]
    return f"{layer}{own[path[-1]]}.{last}", np.ascontiguousarray(values, np.float32)


def _gate_as_vector(_config: Any, name: str, values: Floats) -> list[tuple[str, Floats]]:
    return [(name, values[0] if name.endswith("shared_expert_gate.weight") else values)]


def _norms_plus_one(_config: Any, name: str, values: Floats) -> list[tuple[str, Floats]]:
    return [(name, values + 1 if name.endswith("norm.weight") else values)]


def _caps(config: Any) -> dict[str, float]:
    return {
        "attn_logit_softcapping": config.attn_logit_softcapping,
        "final_logit_softcapping": config.final_logit_softcapping,
    }


def _experts(config: Any) -> dict[str, int]:
    number = config.num_local_experts if hasattr(config, "num_local_experts") else config.num_experts
    fields = {"expert_count": number, "expert_used_count": config.num_experts_per_tok}
    for key, field in (
        ("expert_feed_forward_length", "moe_intermediate_size"),
        ("expert_shared_feed_forward_length", "shared_expert_intermediate_size"),
    ):
        if hasattr(config, field):
            fields[key] = getattr(config, field)
    return fields


def _factors(config: Any) -> dict[str, float]:
    return {
        "embedding_scale": config.embedding_multiplier,
        "attention.scale": config.attention_multiplier,
        "residual_scale": config.residual_multiplier,
        "logit_scale": config.logits_scaling,
    }


def _longrope(config: Any) -> dict[str, float]:
    rope = config.rope_parameters
    if rope["rope_type"] != "longrope":
        return {}
    original = rope["original_max_position_embeddings"]
    magnitude = math.sqrt(1 + math.log(config.max_position_embeddings / original) / math.log(original))
    return {"rope.scaling.attn_factor": magnitude, "rope.scaling.original_context_length": original}


# Names of families that GGUF calls otherwise; fields beside the common ones; what becomes of a tensor.
ARCHITECTURES = {
    "gemma3_text": "gemma3",
    "mistral": "llama",
    "mixtral": "llama",
    "qwen2_moe": "qwen2moe",
    "qwen3_moe": "qwen3moe",
}
EXTRA: dict[str, Callable[[Any], Mapping[str, Any]]] = {
    "gemma2": _caps,
    "granite": _factors,
    "phi3": _longrope,
    "mixtral": _experts,
    "olmoe": _experts,
    "qwen2_moe": _experts,
    "qwen3_moe": _experts,
}
CONVERSIONS: dict[str, Callable[[Any, str, Floats], list[tuple[str, Floats]]]] = {
    "llama": _pairs,
    "mistral": _pairs,
    "granite": _pairs,
    "gpt2": _turned,
    "nemotron": _norms_plus_one,
    "falcon": _ungrouped,
    "mixtral": _pairs,
    "qwen2_moe": _gate_as_vector,
    "gemma": _norms_plus_one,
    "gemma2": _norms_plus_one,
    "gemma3_text": _norms_plus_one,
}
