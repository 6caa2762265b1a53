"""The description of a model from the fields of config.json.

A function for each family that differs, made from that of the family that it is most like; and RoPE's settings.
"""

from collections.abc import Callable

from warmfront.coordinator.models import rope
from warmfront.coordinator.models.described import described, layer_windows
from warmfront.coordinator.models.fields import Fields
from warmfront.shared.errors import ModelError
from warmfront.shared.model.architecture import Architecture, Attention, FeedForward, Norm, Positions, Rotary
from warmfront.shared.model.spec import ModelSpec

__all__ = ["llama", "mistral", "qwen2", "qwen3", "rotary"]

ACTIVATION_NAMES = {
    "silu": "silu",
    "swish": "silu",
    "relu": "relu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
}


def llama(config: Fields, name: str) -> ModelSpec:
    """The description of a Llama, without its positions."""
    activation = config.text("hidden_act", "silu")
    if activation not in ACTIVATION_NAMES:
        known = ", ".join(ACTIVATION_NAMES)
        raise ModelError(f"{config.path.parent}: activation '{activation}' is not supported; {known} are")
    hidden, heads = config.count("hidden_size"), config.count("num_attention_heads")
    attention = Attention(
        heads=heads,
        kv_heads=config.count("num_key_value_heads", heads),
        head_dim=config.count("head_dim", hidden // heads),
        biases=("q", "k", "v", "o") if config.flag("attention_bias", False) else (),
    )
    feed_forward = FeedForward(
        activation=ACTIVATION_NAMES[activation],
        biases=("gate", "up", "down") if config.flag("mlp_bias", False) else (),
    )
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
    spec = _late_windows(config, llama(config, name))
    return described(spec, attention={"biases": ("q", "k", "v")})


def qwen3(config: Fields, name: str) -> ModelSpec:
    """A Llama with norms of q and k, of which the last layers may have a window."""
    return described(_late_windows(config, llama(config, name)), attention={"qk_norm": "head"})


def _all(_layer: int) -> bool:
    return True


def _late_windows(config: Fields, spec: ModelSpec) -> ModelSpec:
    if not config.flag("use_sliding_window", False):
        return spec
    first = config.count("max_window_layers", 0, low=0)
    local = _local_layers(config, spec, lambda layer: layer >= first)
    return described(spec, attention={"windows": layer_windows(spec, config.count("sliding_window", 0), local)})


def _local_layers(config: Fields, spec: ModelSpec, usual: Callable[[int], bool]) -> Callable[[int], bool]:
    """Which layers have a window: as the file says, or as is `usual`."""
    if "layer_types" not in config:
        return usual
    types = config.texts("layer_types")
    if len(types) != spec.layers or not set(types) <= {"sliding_attention", "full_attention"}:
        raise config.wrong("layer_types", f"sliding_attention or full_attention for each of {spec.layers} layers")
    return lambda layer: types[layer] == "sliding_attention"


def rotary(config: Fields, spec: ModelSpec) -> Positions:
    """One table for all layers. transformers 5 writes `rope_parameters`, older ones `rope_theta` and `rope_scaling`."""
    settings = config.section("rope_parameters" if "rope_parameters" in config else "rope_scaling")
    return Positions(rotary=(_table(config, settings, spec, config.positive("rope_theta", 10000.0)),))


def _table(config: Fields, settings: Fields, spec: ModelSpec, base: float) -> Rotary:
    """The rotary table that `settings` describe; `base` where they have none."""
    kind = settings.text("rope_type", settings.text("type", "default"))
    base = settings.positive("rope_theta", base)
    head_dim = spec.architecture.attention.head_dim
    part = settings.positive("partial_rotary_factor", config.positive("partial_rotary_factor", 1.0))
    dim = int(head_dim * part)
    if not 2 <= dim <= head_dim or dim % 2:
        raise ModelError(f"{config.path}: RoPE on {dim} of the {head_dim} numbers of a head is not supported")
    plain = rope.frequencies(dim, base)
    original = settings.positive(
        "original_max_position_embeddings", config.positive("original_max_position_embeddings", float(spec.context))
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
        factor = settings.positive("factor", spec.context / original)
        if base <= 1:
            raise settings.wrong("rope_theta", "above 1, as YaRN wants it")
        scaled = rope.yarn(
            plain,
            base=base,
            factor=factor,
            fast=settings.positive("beta_fast", 32.0),
            slow=settings.positive("beta_slow", 1.0),
            original_context=original,
            whole=settings.flag("truncate", True),
        )
        magnitude = rope.yarn_magnitude(factor)
        if "mscale" in settings and "mscale_all_dim" in settings:
            weights = (settings.positive("mscale"), settings.positive("mscale_all_dim"))
            magnitude = rope.yarn_magnitude(factor, weights[0]) / rope.yarn_magnitude(factor, weights[1])
        return rope.rotary(config.path, scaled, magnitude=settings.positive("attention_factor", magnitude))
    known = "default, linear, dynamic, llama3 and yarn"
    raise ModelError(f"{config.path}: RoPE type '{kind}' is not supported; {known} are")
