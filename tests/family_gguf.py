"""What llama.cpp's converter makes of the folders of tiny models (`family_models.py`), and what others' do."""

import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt
import transformers
from safetensors.numpy import load_file

Floats = npt.NDArray[np.float32]
# What families with layer norms call their epsilon.
EPSILONS = ("layer_norm_eps", "layer_norm_epsilon", "norm_epsilon", "norm_eps")


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
    for layer in range(_drafts(config)):
        name = f"blk.{config.num_hidden_layers + layer}.nextn.eh_proj.weight"
        writer.add_tensor(name, np.zeros((config.hidden_size, 2 * config.hidden_size), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _stacked(tensors: dict[str, Floats]) -> dict[str, Floats]:
    """The experts of a layer in one tensor for each matrix, under the names that the converter gives those."""
    stacks: dict[str, dict[int, Floats]] = {}
    for name, values in tensors.items():
        match = re.fullmatch(r"(model\.layers\.\d+\.)(mlp|block_sparse_moe)\.experts\.(\d+)\.(\w+)\.weight", name)
        if match is not None:
            where = f"{match[1]}{match[2]}"
            if match[4].startswith("w"):
                where = f"{match[1].removeprefix('model.')}feed_forward"
            stacks.setdefault(f"{where}.experts.{match[4]}.weight", {})[int(match[3])] = values
    apart = {name: values for name, values in tensors.items() if not re.search(r"\.experts\.\d+\.", name)}
    return apart | {name: np.stack([own[i] for i in range(len(own))]) for name, own in stacks.items()}


def _drafts(config: Any) -> int:
    """Layers behind the last that guess further tokens; transformers saves none."""
    return int(getattr(config, "num_nextn_predict_layers", 0))


def _write_fields(writer: gguf.GGUFWriter, config: Any) -> None:
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    if getattr(config, "activation", "") == "relu":
        writer.add_name("ReluFalcon")  # GGUF has no word for the activation
    writer.add_block_count(config.num_hidden_layers + _drafts(config))
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


def _dot_before_bias(_config: Any, name: str, values: Floats) -> list[tuple[str, Floats]]:
    return [(name.replace("correction_bias", "correction.bias"), values)]


def _apart(_config: Any, name: str, values: Floats) -> list[tuple[str, Floats]]:
    """A gpt-oss' stacks as [experts, out, in], gates and ups apart."""
    last = name.rpartition(".")[2]
    if last == "sinks":
        return [(f"{name}.weight", values)]
    if not last.endswith(("_proj", "_proj_bias")):
        return [(name, values)]
    values, to = (values, ".bias") if last.endswith("_bias") else (values.swapaxes(1, 2), ".weight")
    name = name.removesuffix("_bias")
    if not name.endswith("gate_up_proj"):
        return [(name + to, values)]
    return [(name.replace("gate_up", part) + to, values[:, i::2]) for i, part in enumerate(("gate", "up"))]


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


def _glm4_moe(config: Any) -> dict[str, Any]:
    return {
        "expert_count": config.n_routed_experts,
        "expert_used_count": config.num_experts_per_tok,
        "expert_feed_forward_length": config.moe_intermediate_size,
        "expert_shared_count": config.n_shared_experts,
        "leading_dense_block_count": config.first_k_dense_replace,
        "expert_gating_func": 2,
        "expert_group_count": config.n_group,
        "expert_group_used_count": config.topk_group,
        "expert_weights_scale": config.routed_scaling_factor,
        "expert_weights_norm": config.norm_topk_prob,
        "nextn_predict_layers": _drafts(config),
    }


def _smallthinker(config: Any) -> dict[str, int]:
    fields = {
        "expert_count": config.moe_num_primary_experts,
        "expert_used_count": config.moe_num_active_primary_experts,
        "expert_feed_forward_length": config.moe_ffn_hidden_size,
        "expert_gating_func": 1 if config.moe_primary_router_apply_softmax else 2,
    }
    return fields | ({"attention.sliding_window": config.sliding_window_size} if config.sliding_window_layout else {})


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
    "glm4_moe": "glm4moe",
    "gpt_oss": "gpt-oss",
    "qwen2_moe": "qwen2moe",
    "qwen3_moe": "qwen3moe",
}
EXTRA: dict[str, Callable[[Any], Mapping[str, Any]]] = {
    "gemma2": _caps,
    "granite": _factors,
    "gpt_oss": _experts,
    "phi3": _longrope,
    "mixtral": _experts,
    "olmoe": _experts,
    "qwen2_moe": _experts,
    "qwen3_moe": _experts,
    "glm4_moe": _glm4_moe,
    "smallthinker": _smallthinker,
}
CONVERSIONS: dict[str, Callable[[Any, str, Floats], list[tuple[str, Floats]]]] = {
    "llama": _pairs,
    "mistral": _pairs,
    "granite": _pairs,
    "gpt_oss": _apart,
    "gpt2": _turned,
    "nemotron": _norms_plus_one,
    "falcon": _ungrouped,
    "mixtral": _pairs,
    "glm4_moe": _dot_before_bias,
    "qwen2_moe": _gate_as_vector,
    "gemma": _norms_plus_one,
    "gemma2": _norms_plus_one,
    "gemma3_text": _norms_plus_one,
}
