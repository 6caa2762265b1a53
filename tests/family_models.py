"""Tiny random models of every family, made by transformers; as GGUF files: `family_gguf.py`."""

from pathlib import Path
from typing import Any

import torch
import transformers

from tests.smallthinker import register

register()

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
    # Layers without experts, wider than two experts: every other one but the last, or the first.
    "qwen2 moe dense": (
        "qwen2_moe",
        {
            "num_hidden_layers": 4,
            "moe_intermediate_size": 40,
            "shared_expert_intermediate_size": 72,
            "intermediate_size": 136,
            "num_experts": 5,
            "num_experts_per_tok": 2,
            "decoder_sparse_step": 2,
        },
    ),
    "glm4 moe": (
        "glm4_moe",
        {
            "head_dim": 32,
            "num_hidden_layers": 4,
            "first_k_dense_replace": 2,
            "moe_intermediate_size": 40,
            "n_routed_experts": 12,
            "num_experts_per_tok": 3,
            "n_shared_experts": 1,
            "n_group": 4,
            "topk_group": 2,
            "routed_scaling_factor": 1.5,
            "attention_bias": True,
            "use_qk_norm": True,
        },
    ),
    "smallthinker": (
        "smallthinker",
        {
            "head_dim": 32,
            "num_hidden_layers": 5,
            "rope_layout": [0, 1, 1, 1, 0],
            "sliding_window_layout": [0, 1, 1, 1, 0],
            "sliding_window_size": 24,
            "moe_num_primary_experts": 6,
            "moe_num_active_primary_experts": 2,
            "moe_ffn_hidden_size": 40,
        },
    ),
    "smallthinker softmax": (
        "smallthinker",
        {
            "head_dim": 16,
            "moe_num_primary_experts": 18,
            "moe_num_active_primary_experts": 3,
            "moe_ffn_hidden_size": 32,
            "moe_primary_router_apply_softmax": True,
        },
    ),
    # Windows in the first and the last layer; RoPE's bounds are no whole pairs.
    "gpt oss": (
        "gpt_oss",
        {
            "head_dim": 32,
            "num_local_experts": 5,
            "num_experts_per_tok": 3,
            "sliding_window": 24,
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 1000.0,
                "factor": 8.0,
                "original_max_position_embeddings": 64,
                "truncate": False,
            },
        },
    ),
    "qwen3 biases": ("qwen3", {"head_dim": 8, "attention_bias": True, "num_key_value_heads": 1}),
}


def write_model(folder: Path, name: str, seed: int = 0, **options: Any) -> Path:
    """Write the folder of a model of `MODELS`, with other fields of its configuration if `options` say so."""
    family, fields = MODELS[name]
    config = transformers.AutoConfig.for_model(family, **(SIZES | fields | options))
    # Attention's sinks begin at random numbers, whose mean is kept below: without a seed each run had another model.
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = transformers.AutoModelForCausalLM.from_config(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        buffers = (buffer for name, buffer in model.named_buffers() if name.endswith("correction_bias"))
        for parameter in (*model.parameters(), *buffers):
            # About what it is, so that norms stay around their one, or zero; large enough to move the logits.
            start = parameter.mean() if parameter.dim() == 1 else 0
            parameter.copy_(start + 0.15 * torch.randn(parameter.shape, generator=generator))
    model.save_pretrained(folder)
    return folder
