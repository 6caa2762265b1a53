"""The description of models whose feed-forward has no gate, from the fields of config.json: see `config.py`."""

from warmfront.coordinator.models.described import described
from warmfront.coordinator.models.fields import Fields
from warmfront.coordinator.models.hf.config import mistral
from warmfront.shared.errors import ModelError
from warmfront.shared.model.architecture import Positions
from warmfront.shared.model.spec import ModelSpec

__all__ = ["falcon", "gpt2", "nemotron", "opt", "starcoder2"]

# What other families call it.
_GPT2 = {
    "n_embd": "hidden_size",
    "n_head": "num_attention_heads",
    "n_layer": "num_hidden_layers",
    "n_inner": "intermediate_size",
    "n_positions": "max_position_embeddings",
}
_ATTENTION = ("q", "k", "v", "o")


def _plain(config: Fields, name: str, epsilon: float, biased: bool) -> ModelSpec:
    """A Llama, maybe with windows, with layer norms, without gates, with biases everywhere if it is `biased`."""
    return described(
        mistral(config, name),
        norm={"kind": "layer", "bias": True, "epsilon": epsilon},
        attention={"biases": _ATTENTION if biased else ()},
        feed_forward={"gated": False, "biases": ("up", "down") if biased else ()},
        tied_head=config.flag("tie_word_embeddings", True),
    )


def gpt2(config: Fields, name: str) -> ModelSpec:
    """Learned positions, biases."""
    for key in ("scale_attn_by_inverse_layer_idx", "add_cross_attention"):
        if config.flag(key, False):
            raise ModelError(f"{config.path.parent}: a GPT-2 with {key} is not supported; one without is")
    words = config.in_words(_GPT2)
    words = words.in_words({}, intermediate_size=4 * words.count("hidden_size"))
    return described(
        _plain(words, name, config.positive("layer_norm_epsilon", 1e-5), True),
        attention={} if config.flag("scale_attn_weights", True) else {"scale": 1.0},
        positions=Positions(learned_offset=0),
    )


def opt(config: Fields, name: str) -> ModelSpec:
    """Learned positions; norms before the blocks or behind them, biases and weights of norms if the file says so."""
    before = config.flag("do_layer_norm_before", True)
    norm = {
        "placement": "pre" if before else "sum",
        "bias": config.flag("layer_norm_elementwise_affine", True),
        "final": before and not config.flag("_remove_final_layer_norm", False),
    }
    spec = _plain(config.in_words({"ffn_dim": "intermediate_size"}), name, 1e-5, config.flag("enable_bias", True))
    return described(spec, norm=norm, positions=Positions(learned_offset=2))


def falcon(config: Fields, name: str) -> ModelSpec:
    """RoPE, attention and feed-forward side by side, behind one norm or one each."""
    if config.flag("alibi", False):
        raise ModelError(f"{config.path.parent}: a Falcon with alibi is not supported; one with RoPE is")
    words = config.in_words({"ffn_hidden_size": "intermediate_size"})
    words = words.in_words({}, intermediate_size=4 * words.count("hidden_size"))
    spec = _plain(words, name, config.positive("layer_norm_epsilon", 1e-5), config.flag("bias", False))
    kv_heads, new = spec.architecture.attention.heads, config.flag("new_decoder_architecture", False)
    if new:
        kv_heads = config.count("num_kv_heads", kv_heads)
    elif config.flag("multi_query", True):
        kv_heads = 1
    parallel = new or config.flag("parallel_attn", True)
    two_norms = new and config.count("num_ln_in_parallel_attn", 2) == 2
    return described(
        spec,
        norm={"shared": parallel and not two_norms},
        attention={"kv_heads": kv_heads},
        residual="parallel" if parallel else "serial",
    )


def starcoder2(config: Fields, name: str) -> ModelSpec:
    """RoPE, grouped heads, windows, biases if the file says so."""
    return _plain(config, name, config.positive("norm_epsilon", 1e-5), config.flag("use_bias", True))


def nemotron(config: Fields, name: str) -> ModelSpec:
    """RoPE on a part of the head, grouped heads, squared ReLU."""
    return described(
        _plain(config, name, config.positive("norm_eps", 1e-5), False),
        attention={"biases": _ATTENTION if config.flag("attention_bias", False) else ()},
        feed_forward={"biases": ("up", "down") if config.flag("mlp_bias", False) else ()},
        tied_head=config.flag("tie_word_embeddings", False),
    )
