"""The description of models whose feed-forward has no gate, from the fields of a GGUF file: see `config.py`."""

from dataclasses import replace

from warmfront.coordinator.models.described import described
from warmfront.coordinator.models.fields import Fields
from warmfront.coordinator.models.gguf.config import Found, llama
from warmfront.shared.model.architecture import Positions
from warmfront.shared.model.spec import ModelSpec

__all__ = ["falcon", "gpt2", "opt", "plain"]


def plain(fields: Fields, found: Found) -> ModelSpec:
    """A Llama with layer norms, without gates."""
    return described(llama(fields, found, "layer"), feed_forward={"gated": False})


def gpt2(fields: Fields, found: Found) -> ModelSpec:
    """Learned positions."""
    return described(plain(fields, found), positions=Positions(learned_offset=0))


def opt(fields: Fields, found: Found) -> ModelSpec:
    """Learned positions, in PowerInfer's files behind two rows of no use, which their context counts too."""
    spec = plain(fields.in_words({}, **{"opt.attention.layer_norm_epsilon": 1e-5}), found)
    offset = 2 if found.dialect == "powerinfer" else 0
    return described(replace(spec, context=spec.context - offset), positions=Positions(learned_offset=offset))


def falcon(fields: Fields, found: Found) -> ModelSpec:
    """RoPE, attention and feed-forward side by side, behind one norm or one each."""
    shared = "layers.0.ffn_norm" not in found.shapes
    return described(plain(fields, found), norm={"shared": shared}, residual="parallel")
