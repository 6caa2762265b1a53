"""The description of mixtures of experts from the fields of config.json."""

from dataclasses import replace
from typing import Any

from warmfront.coordinator.models.described import chosen_layers, described, for_layers, layer_windows
from warmfront.coordinator.models.fields import Fields
from warmfront.coordinator.models.hf.config import llama, local_layers, mistral, qwen2, qwen3, rotary, windowed
from warmfront.shared.errors import ModelError
from warmfront.shared.model.architecture import Experts, Positions
from warmfront.shared.model.spec import ModelSpec

__all__ = ["glm4_moe", "gpt_oss", "mixtral", "olmoe", "qwen2_moe", "qwen3_moe", "smallthinker", "smallthinker_rotary"]

# What gpt-oss multiplies gates with within a sigmoid, which the kernels know as a constant.
_SWIGLU_ALPHA = 1.702

_SMALLTHINKER_WORDS = {
    "moe_ffn_hidden_size": "intermediate_size",
    "moe_num_primary_experts": "num_experts",
    "moe_num_active_primary_experts": "num_experts_per_tok",
}


def mixtral(config: Fields, name: str) -> ModelSpec:
    """A Mistral with experts."""
    return _with_experts(config, mistral(config, name), normalised=True)


def olmoe(config: Fields, name: str) -> ModelSpec:
    """A Llama with experts, and with norms of q and k as whole vectors."""
    if "clip_qkv" in config:
        raise ModelError(f"{config.path.parent}: an OLMoE with clip_qkv is not supported; one without is")
    spec = described(llama(config, name), attention={"qk_norm": "whole"})
    return _with_experts(config, spec, normalised=config.flag("norm_topk_prob", False))


def qwen2_moe(config: Fields, name: str) -> ModelSpec:
    """A Qwen 2 with experts, and one with a gate that all tokens use; windows in every other of the first layers."""
    spec = windowed(config, qwen2(config, name), lambda layer, end: layer % 2 == 0 and layer < end)
    if not config.flag("qkv_bias", True):
        spec = described(spec, attention={"biases": ()})
    shared = config.count("shared_expert_intermediate_size")
    return _qwen_experts(config, spec, shared=shared, shared_gate=True)


def qwen3_moe(config: Fields, name: str) -> ModelSpec:
    """A Qwen 3 with experts; windows are in all layers."""
    return _qwen_experts(config, windowed(config, qwen3(config, name), lambda _layer, _bound: True))


def _qwen_experts(config: Fields, spec: ModelSpec, **more: Any) -> ModelSpec:
    """Experts in every so manieth layer, but for some."""
    step, without = config.count("decoder_sparse_step", 1), {*config.whole_numbers("mlp_only_layers")}
    dense = chosen_layers(spec, lambda layer: layer in without or (layer + 1) % step != 0)
    return _with_experts(config, spec, dense, normalised=config.flag("norm_topk_prob", False), **more)


def _with_experts(config: Fields, spec: ModelSpec, dense: tuple[int, ...] = (), **more: Any) -> ModelSpec:
    """`dense`: the layers without experts, which are as wide as all would be without any."""
    number = config.count("num_experts" if "num_experts" in config else "num_local_experts")
    experts = Experts(
        number=number,
        active=config.count("num_experts_per_tok"),
        dense_layers=dense,
        dense=spec.ffn if dense else 0,
        **more,
    )
    ffn = config.count("moe_intermediate_size", spec.ffn)
    return described(replace(spec, ffn=ffn), feed_forward={"experts": experts})


def smallthinker(config: Fields, name: str) -> ModelSpec:
    """A Llama with experts that are chosen by the layer's input; some layers may have a window, some no positions."""
    config = config.in_words(_SMALLTHINKER_WORDS, tie_word_embeddings=True)
    spec = llama(config, name)
    local = _layout(config, spec, "sliding_window_layout")
    windows = layer_windows(spec, config.count("sliding_window_size", 4096) * any(local), lambda i: local[i] != 0)
    return _with_experts(
        config,
        described(spec, attention={"windows": windows}),
        scoring="softmax" if config.flag("moe_primary_router_apply_softmax", False) else "sigmoid",
        normalised=True,
        early=config.flag("moe_enable_early_router", True),
    )


def _layout(config: Fields, spec: ModelSpec, key: str) -> list[int]:
    """A number for each layer; nothing if the file has none."""
    return config.numbers(key, spec.layers) if key in config else []


def glm4_moe(config: Fields, name: str) -> ModelSpec:
    """A Llama with RoPE on a part of the head and, behind its first layers, experts that biases help to choose."""
    config = config.in_words({"n_routed_experts": "num_experts"})
    spec = llama(config, name)
    attention = {
        "biases": ("q", "k", "v") if config.flag("attention_bias", False) else (),
        "qk_norm": "head" if config.flag("use_qk_norm", False) else None,
    }
    first = config.count("first_k_dense_replace", 1, low=0)
    return _with_experts(
        config,
        described(spec, attention=attention),
        chosen_layers(spec, lambda layer: layer < first),
        scoring="sigmoid",
        corrected=True,
        groups=config.count("n_group", 1),
        active_groups=config.count("topk_group", 1),
        normalised=config.flag("norm_topk_prob", True),
        scale=config.positive("routed_scaling_factor", 1.0),
        shared=config.count("n_shared_experts", 1, low=0) * config.count("moe_intermediate_size"),
    )


def smallthinker_rotary(config: Fields, spec: ModelSpec) -> Positions:
    """The same, for some of the layers."""
    return for_layers(rotary(config, spec), [used != 0 for used in _layout(config, spec, "rope_layout")])


def gpt_oss(config: Fields, name: str) -> ModelSpec:
    """A Llama with experts, biases everywhere, sinks, and windows in every other layer."""
    if config.positive("swiglu_alpha", _SWIGLU_ALPHA) != _SWIGLU_ALPHA:
        raise ModelError(f"{config.path.parent}: a swiglu_alpha other than {_SWIGLU_ALPHA} is not supported")
    spec = _with_experts(config, llama(config, name), normalised=True, bias=True)
    local = local_layers(config, spec, lambda layer: layer % 2 == 0)
    attention = {
        "biases": ("q", "k", "v", "o") if config.flag("attention_bias", True) else (),
        "windows": layer_windows(spec, config.count("sliding_window", 128, low=0), local),
        "sinks": True,
    }
    return described(spec, attention=attention, feed_forward={"biases": ("gate", "up", "down")})
