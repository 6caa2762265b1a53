"""The description of a model from the fields of config.json.

A function for each family that differs, made from that of the family that it is most like; and RoPE's settings.
"""

from collections.abc import Callable

import numpy as np

from warmfront.coordinator.models import rope
from warmfront.coordinator.models.activations import in_config
from warmfront.coordinator.models.described import described, layer_windows
from warmfront.coordinator.models.fields import Fields
from warmfront.shared.errors import ModelError
from warmfront.shared.model.architecture import Architecture, Attention, FeedForward, Norm, Positions, Rotary
from warmfront.shared.model.spec import ModelSpec

__all__ = [
    "gemma",
    "gemma2",
    "gemma3",
    "gemma3_rotary",
    "granite",
    "llama",
    "local_layers",
    "minicpm",
    "mistral",
    "olmo2",
    "quarter_rotary",
    "qwen2",
    "qwen3",
    "rotary",
    "stablelm",
    "windowed",
]

_YARN = rope.YarnKeys("rope_theta", "factor", "beta_fast", "beta_slow")


def llama(config: Fields, name: str) -> ModelSpec:
    """The description of a Llama, without its positions."""
    hidden, heads = config.count("hidden_size"), config.count("num_attention_heads")
    attention = Attention(
        heads=heads,
        kv_heads=config.count("num_key_value_heads", heads),
        head_dim=config.count("head_dim", hidden // heads),
        biases=("q", "k", "v", "o") if config.flag("attention_bias", False) else (),
    )
    feed_forward = FeedForward(
        activation="silu",
        biases=("gate", "up", "down") if config.flag("mlp_bias", False) else (),
    ).activated(in_config(config)[0])
    return ModelSpec(
        family=config.text("model_type"),
        name=name,
        layers=config.count("num_hidden_layers"),
        hidden=hidden,
        ffn=config.count("intermediate_size"),
        vocab=config.count("vocab_size"),
        context=config.count("max_position_embeddings", 2048),
        architecture=Architecture(
            norm=Norm(epsilon=config.positive("rms_norm_eps", 1e-6)),
            positions=Positions(),
            attention=attention,
            feed_forward=feed_forward,
            tied_head=config.flag("tie_word_embeddings", False),
        ),
    )


def mistral(config: Fields, name: str) -> ModelSpec:
    """A Llama of which every layer may have a window."""
    spec = llama(config, name)
    return described(spec, attention={"windows": layer_windows(spec, config.count("sliding_window", 0), _all)})


def qwen2(config: Fields, name: str) -> ModelSpec:
    """A Llama with biases of q, k and v, of which the last layers may have a window."""
    spec = windowed(config, llama(config, name), _late)
    return described(spec, attention={"biases": ("q", "k", "v")})


def qwen3(config: Fields, name: str) -> ModelSpec:
    """A Llama with norms of q and k, of which the last layers may have a window."""
    return described(windowed(config, llama(config, name), _late), attention={"qk_norm": "head"})


def olmo2(config: Fields, name: str) -> ModelSpec:
    """A Llama whose blocks are normed at their output, with norms of q and k as whole vectors."""
    return described(llama(config, name), norm={"placement": "post"}, attention={"qk_norm": "whole"})


def granite(config: Fields, name: str) -> ModelSpec:
    """A Llama with factors on embeddings, scores, what blocks add, and logits."""
    return described(
        llama(config, name),
        attention={"scale": config.positive("attention_multiplier", 1.0)},
        embedding_scale=config.positive("embedding_multiplier", 1.0),
        residual_scale=config.positive("residual_multiplier", 1.0),
        logit_scale=1 / config.positive("logits_scaling", 1.0),
    )


def minicpm(config: Fields, name: str) -> ModelSpec:
    """A Llama with factors as Granite's, which follow from the depth and the width of a smaller model."""
    spec = llama(config, name)
    return described(
        spec,
        embedding_scale=config.positive("scale_emb", 1.0),
        residual_scale=config.positive("scale_depth", 1.0) / spec.layers**0.5,
        logit_scale=config.count("dim_model_base", spec.hidden) / spec.hidden,
        tied_head=config.flag("tie_word_embeddings", True),
    )


def stablelm(config: Fields, name: str) -> ModelSpec:
    """A Llama with layer norms, biases of q, k and v if the file says so, and RoPE on a part of the head."""
    if config.flag("qk_layernorm", False) or config.flag("use_parallel_residual", False):
        raise ModelError(
            f"{config.path.parent}: a StableLM with qk_layernorm or use_parallel_residual is not supported; "
            "one without is"
        )
    biases = ("q", "k", "v") if config.flag("use_qkv_bias", False) else ()
    norm = {"kind": "layer", "bias": True, "epsilon": config.positive("layer_norm_eps", 1e-5)}
    return described(llama(config, name), norm=norm, attention={"biases": biases})


def gemma(config: Fields, name: str) -> ModelSpec:
    """A Llama with scaled embeddings."""
    spec = llama(config, name)
    return described(
        spec,
        attention={"head_dim": config.count("head_dim", 256)},
        embedding_scale=spec.hidden**0.5,
        tied_head=config.flag("tie_word_embeddings", True),
    )


def gemma2(config: Fields, name: str) -> ModelSpec:
    """A Gemma with norms at both ends of a block, soft caps, and windows in every other layer."""
    return _gemma_after(config, name, pattern=2, caps=(50.0, 30.0))


def gemma3(config: Fields, name: str) -> ModelSpec:
    """A Gemma 2 with norms of q and k instead of caps, and windows in five layers of six."""
    if "text_config" in config:
        raise ModelError(
            f"{config.path.parent} is a Gemma 3 with a vision part, which is not supported; "
            "its language model is, as a folder of type gemma3_text or as a GGUF file"
        )
    return described(_gemma_after(config, name, pattern=6, caps=(None, None)), attention={"qk_norm": "head"})


def _gemma_after(config: Fields, name: str, pattern: int, caps: tuple[float | None, float | None]) -> ModelSpec:
    if config.flag("use_bidirectional_attention", False):
        raise ModelError(f"{config.path.parent} attends to what comes later too, which is not supported")
    spec = gemma(config, name)
    keys = ("attn_logit_softcapping", "final_logit_softcapping")
    # Null is no cap, whatever is usual.
    score_cap, logit_cap = (
        config.positive(key) if key in config else None if key in [*config] else cap
        for key, cap in zip(keys, caps, strict=True)
    )
    window = config.count("sliding_window", 0)
    attention = {
        "scale": config.positive("query_pre_attn_scalar", 256.0) ** -0.5,
        "soft_cap": score_cap,
        "windows": layer_windows(spec, window, _gemma_local(config, spec, pattern)),
    }
    return described(spec, norm={"placement": "sandwich"}, attention=attention, logit_cap=logit_cap)


def _gemma_local(config: Fields, spec: ModelSpec, pattern: int) -> Callable[[int], bool]:
    """All but every `pattern`th layer have a window."""
    pattern = config.count("sliding_window_pattern", pattern)
    return local_layers(config, spec, lambda layer: (layer + 1) % pattern != 0)


def gemma3_rotary(config: Fields, spec: ModelSpec) -> Positions:
    """A table for the layers without a window, and one for those with it."""
    settings = config.section("rope_parameters")
    whole = settings.section("full_attention") if "full_attention" in settings else config.section("rope_scaling")
    tables = (
        _table(config, whole, spec, config.positive("rope_theta", 1e6)),
        _table(config, settings.section("sliding_attention"), spec, config.positive("rope_local_base_freq", 1e4)),
    )
    local = _gemma_local(config, spec, 6)
    return Positions(rotary=tables, rotary_of_layer=tuple(int(local(layer)) for layer in range(spec.layers)))


def _all(_layer: int) -> bool:
    return True


def _late(layer: int, first: int) -> bool:
    return layer >= first


def windowed(config: Fields, spec: ModelSpec, usual: Callable[[int, int], bool]) -> ModelSpec:
    """A Qwen with its windows, if it uses any: in the layers that the file names, or in those for which `usual` says so
    of the layer and `max_window_layers`."""
    if not config.flag("use_sliding_window", False):
        return spec
    bound = config.count("max_window_layers", 28, low=0)
    local = local_layers(config, spec, lambda layer: usual(layer, bound))
    return described(spec, attention={"windows": layer_windows(spec, config.count("sliding_window", 4096), local)})


def local_layers(config: Fields, spec: ModelSpec, usual: Callable[[int], bool]) -> Callable[[int], bool]:
    """Which layers have a window: as the file says, or as is `usual`."""
    if "layer_types" not in config:
        return usual
    types = config.texts("layer_types")
    if len(types) != spec.layers or not set(types) <= {"sliding_attention", "full_attention"}:
        raise config.wrong("layer_types", f"sliding_attention or full_attention for each of {spec.layers} layers")
    return lambda layer: types[layer] == "sliding_attention"


def rotary(config: Fields, spec: ModelSpec) -> Positions:
    """One table for all layers. transformers 5 writes `rope_parameters`, older ones `rope_theta` and `rope_scaling`."""
    return Positions(rotary=(_table(config, _rope_settings(config), spec, config.positive("rope_theta", 10000.0)),))


def quarter_rotary(config: Fields, spec: ModelSpec) -> Positions:
    """The same, on a quarter of each head unless the file says otherwise."""
    return Positions(
        rotary=(_table(config, _rope_settings(config), spec, config.positive("rope_theta", 10000.0), part=0.25),)
    )


def _rope_settings(config: Fields) -> Fields:
    return config.section("rope_parameters" if "rope_parameters" in config else "rope_scaling")


def _table(config: Fields, settings: Fields, spec: ModelSpec, base: float, part: float = 1.0) -> Rotary:
    """The rotary table that `settings` describe; `base`, and `part` of a head, where they have none."""
    kind = settings.text("rope_type", settings.text("type", "default"))
    base = settings.positive("rope_theta", base)
    head_dim = spec.architecture.attention.head_dim
    part = settings.positive("partial_rotary_factor", config.positive("partial_rotary_factor", part))
    dim = int(head_dim * part)
    if not 2 <= dim <= head_dim or dim % 2:
        raise ModelError(f"{config.path}: RoPE on {dim} of the {head_dim} numbers of a head is not supported")
    plain = rope.frequencies(dim, base)
    original = config.count("original_max_position_embeddings", spec.context)
    original = settings.count("original_max_position_embeddings", original, low=2)
    if "long_factor" in settings:
        short, long = (np.array(settings.numbers(f"{size}_factor", dim // 2), np.float64) for size in ("short", "long"))
        magnitude = rope.long_magnitude(settings.positive("factor", spec.context / original), original)
        return rope.rotary(
            config.path,
            plain,
            short,
            settings.positive("attention_factor", magnitude),
            long_divisor=long,
            original_context=original,
        )
    if kind in ("default", "dynamic"):
        return rope.rotary(config.path, plain)
    if kind == "linear":
        return rope.rotary(config.path, plain, settings.positive("factor"))
    if kind == "llama3":
        low, high = settings.positive("low_freq_factor"), settings.positive("high_freq_factor")
        if low >= high:
            raise settings.wrong("low_freq_factor", f"below high_freq_factor, {high}")
        scaled = rope.llama3(plain, factor=settings.positive("factor"), low=low, high=high, original_context=original)
        return rope.rotary(config.path, scaled)
    if kind == "yarn":
        whole, longer = settings.flag("truncate", True), spec.context / original
        scaled, factor = rope.read_yarn(
            settings, _YARN, plain, base=base, original_context=original, factor=longer, whole=whole
        )
        magnitude = rope.yarn_magnitude(factor)
        if "mscale" in settings and "mscale_all_dim" in settings:
            weights = (settings.positive("mscale"), settings.positive("mscale_all_dim"))
            magnitude = rope.yarn_magnitude(factor, weights[0]) / rope.yarn_magnitude(factor, weights[1])
        return rope.rotary(config.path, scaled, magnitude=settings.positive("attention_factor", magnitude))
    known = "default, linear, dynamic, llama3, yarn and longrope"
    raise ModelError(f"{config.path}: RoPE type '{kind}' is not supported; {known} are")
