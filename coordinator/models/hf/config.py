"""The description of a model from the fields of config.json.

Covers the activations of `ACTIVATION_NAMES`, biases, tied embeddings, and RoPE: plain, linear or llama3.
"""

from dataclasses import replace

from warmfront.coordinator.models import rope
from warmfront.coordinator.models.fields import Fields
from warmfront.shared.errors import ModelError
from warmfront.shared.model.architecture import Architecture, Attention, FeedForward, Norm, Positions
from warmfront.shared.model.spec import ModelSpec

__all__ = ["llama", "mistral", "rotary"]

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
    """The description of a Mistral: a Llama of which every layer may have a window."""
    spec, window = llama(config, name), config.count("sliding_window", 0)
    attention = replace(spec.architecture.attention, windows=(window,) * spec.layers if window else ())
    return replace(spec, architecture=replace(spec.architecture, attention=attention))


def rotary(config: Fields, spec: ModelSpec) -> Positions:
    """RoPE on whole heads. transformers 5 writes `rope_parameters`, older ones `rope_theta` and `rope_scaling`."""
    settings = config.section("rope_parameters" if "rope_parameters" in config else "rope_scaling")
    kind = settings.text("rope_type", settings.text("type", "default"))
    base = settings.positive("rope_theta", config.positive("rope_theta", 10000.0))
    plain = rope.frequencies(spec.architecture.attention.head_dim, base)
    if any(fields.number("partial_rotary_factor", 1.0) != 1.0 for fields in (settings, config)):
        raise ModelError(f"{config.path}: RoPE on a part of the head is not supported")
    if kind == "linear":
        return rope.positions(config.path, plain, settings.positive("factor"))
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
    return rope.positions(config.path, plain)
