"""The description of a model from the fields of a GGUF file.

GGUF has no fields for activation, biases and tied embeddings; they follow from the dialect and the tensors.
"""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from warmfront.coordinator.models import rope
from warmfront.coordinator.models.activations import in_gguf
from warmfront.coordinator.models.described import described, layer_windows
from warmfront.coordinator.models.fields import Fields
from warmfront.coordinator.models.rope import Doubles
from warmfront.shared.errors import ModelError
from warmfront.shared.model.architecture import Architecture, Attention, FeedForward, Norm, Positions
from warmfront.shared.model.spec import ModelSpec, Predictor

__all__ = [
    "Factors",
    "Found",
    "gemma",
    "gemma2",
    "gemma3",
    "gemma3_rotary",
    "granite",
    "llama",
    "minicpm",
    "olmo2",
    "rotary",
    "stablelm",
]

_EPSILONS = {"rms": "attention.layer_norm_rms_epsilon", "layer": "attention.layer_norm_epsilon"}
# Of so many layers of a Gemma 3 all but the last have a window.
_GEMMA3_PATTERN = 6
_YARN = rope.YarnKeys(
    "rope.freq_base", "rope.scaling.factor", "rope.scaling.yarn_beta_fast", "rope.scaling.yarn_beta_slow"
)
# Divisors of the rotary frequencies, by the name of their tensor in the file.
Factors = Mapping[str, Doubles]


class Found(NamedTuple):
    """What is in a file beside its fields."""

    # Shape of each tensor by the name of `tensors.py`; it has "embed".
    shapes: Mapping[str, tuple[int, ...]]
    # "powerinfer" and "sparkinfer" are those of sparse models; "" is llama.cpp's.
    dialect: str

    def qk_norm(self, head_dim: int) -> str | None:
        """What of q and k is normed: see `Attention`."""
        shape = self.shapes.get("layers.0.q_norm")
        return None if shape is None else "head" if shape == (head_dim,) else "whole"

    @property
    def predictors(self) -> bool:
        """Whether any layer has a predictor; every layer must have one then."""
        return any(name.endswith((".fc1", ".fc2")) for name in self.shapes)

    def biases(self, parts: tuple[str, ...]) -> tuple[str, ...]:
        """Those of `parts` that have a bias in any layer; every layer must have it then."""
        biased = {name.split(".")[2] for name in self.shapes if name.startswith("layers.") and name.endswith(".bias")}
        return tuple(part for part in parts if part in biased)


def llama(fields: Fields, found: Found, norm: str = "rms") -> ModelSpec:
    """The description of a Llama, without its positions; `norm`: the kind of its norms."""
    family, name = fields.text("general.architecture"), fields.text("general.name", fields.path.stem)
    keys = fields.under(f"{family}.")
    hidden, heads = keys.count("embedding_length"), keys.count("attention.head_count")
    head_dim = keys.count("attention.key_length", hidden // heads)
    if keys.count("attention.value_length", head_dim) != head_dim:
        raise ModelError(
            f"{fields.path}: {family}.attention.value_length differs from the head size {head_dim}, "
            "which is not supported"
        )
    window = keys.count("attention.sliding_window", 0, low=0)
    attention = Attention(
        heads=heads,
        kv_heads=keys.count("attention.head_count_kv", heads),
        head_dim=head_dim,
        qk_norm=found.qk_norm(head_dim),
        biases=found.biases(("q", "k", "v", "o")),
    )
    spec = ModelSpec(
        family=family,
        name="".join(filter(str.isprintable, name)),
        layers=keys.count("block_count") - keys.count("nextn_predict_layers", 0, low=0),
        hidden=hidden,
        ffn=keys.count("feed_forward_length"),
        vocab=found.shapes["embed"][0],
        context=keys.count("context_length"),
        architecture=Architecture(
            norm=Norm(kind=norm, epsilon=keys.positive(_EPSILONS[norm]), bias="norm.bias" in found.shapes),
            positions=Positions(),
            attention=attention,
            feed_forward=FeedForward(activation="silu", biases=found.biases(("gate", "up", "down"))).activated(
                in_gguf(fields, found.dialect)[0]
            ),
            tied_head="head" not in found.shapes,
        ),
        predictor=_predictor(fields, found) if found.predictors else None,
    )
    return described(spec, attention={"windows": layer_windows(spec, window, lambda _layer: True)})


def olmo2(fields: Fields, found: Found) -> ModelSpec:
    """A Llama whose blocks are normed at their output."""
    return described(llama(fields, found), norm={"placement": "post"})


def granite(fields: Fields, found: Found) -> ModelSpec:
    """A Llama with factors on embeddings, scores, what blocks add, and logits."""
    spec = llama(fields, found)
    keys = fields.under(f"{spec.family}.")
    return described(
        spec,
        attention={"scale": keys.positive("attention.scale", spec.architecture.attention.score_scale)},
        embedding_scale=keys.positive("embedding_scale", 1.0),
        residual_scale=keys.positive("residual_scale", 1.0),
        logit_scale=1 / keys.positive("logit_scale", 1.0),
    )


def minicpm(fields: Fields, found: Found) -> ModelSpec:
    """A Llama with factors as Granite's; older files leave them out, which are then those of MiniCPM 2B."""
    spec = llama(fields, found)
    keys = fields.under(f"{spec.family}.")
    return described(
        spec,
        embedding_scale=keys.positive("embedding_scale", 12.0),
        residual_scale=keys.positive("residual_scale", 1.4 / spec.layers**0.5),
        logit_scale=1 / keys.positive("logit_scale", spec.hidden / 256),
    )


def stablelm(fields: Fields, found: Found) -> ModelSpec:
    """A Llama with layer norms."""
    if "layers.0.ffn_norm" not in found.shapes:
        raise ModelError(f"{fields.path}: a StableLM with a parallel residual is not supported; one without is")
    return llama(fields, found, "layer")


def gemma(fields: Fields, found: Found) -> ModelSpec:
    """A Llama with scaled embeddings."""
    spec = llama(fields, found)
    return described(spec, embedding_scale=spec.hidden**0.5)


def gemma2(fields: Fields, found: Found) -> ModelSpec:
    """A Gemma with norms at both ends of a block, soft caps, and windows in every other layer."""
    spec = _gemma_after(fields, found, pattern=2, largest=46)
    keys = fields.under(f"{spec.family}.")
    cap = keys.positive("attn_logit_softcapping", 50.0)
    return described(spec, attention={"soft_cap": cap}, logit_cap=keys.positive("final_logit_softcapping", 30.0))


def gemma3(fields: Fields, found: Found) -> ModelSpec:
    """A Gemma 2 with norms of q and k instead of caps, and windows in five layers of six."""
    return _gemma_after(fields, found, pattern=_GEMMA3_PATTERN, largest=62)


def _gemma_after(fields: Fields, found: Found, *, pattern: int, largest: int) -> ModelSpec:
    """`largest`: layers of the 27B model, whose scores are scaled as if its heads made up its width.

    As llama.cpp knows it: the files have no field for that.
    """
    spec = gemma(fields, found)
    attention = spec.architecture.attention
    width = spec.hidden / attention.heads if spec.layers == largest else attention.head_dim
    window = fields.count(f"{spec.family}.attention.sliding_window", 4096, low=0)
    windows = layer_windows(spec, window, lambda layer: (layer + 1) % pattern != 0)
    return described(spec, norm={"placement": "sandwich"}, attention={"scale": width**-0.5, "windows": windows})


def gemma3_rotary(fields: Fields, spec: ModelSpec, factors: Factors) -> Positions:
    """A table for the layers without a window, and one, never scaled, for those with it."""
    (whole,) = rotary(fields, spec, factors, 1e6).rotary
    base = fields.positive(f"{spec.family}.rope.freq_base_swa", 1e4)
    local = rope.rotary(fields.path, rope.frequencies(_rotary_dim(fields, spec), base))
    layers = tuple(int((layer + 1) % _GEMMA3_PATTERN != 0) for layer in range(spec.layers))
    return Positions(rotary=(whole, local), rotary_of_layer=layers)


def _predictor(fields: Fields, found: Found) -> Predictor:
    if found.dialect == "sparkinfer":
        # Active where sigmoid(logit) > 0.5; of the layer behind, except for the first one's own.
        return Predictor(input="normed", look_ahead=True, biases=found.biases(("fc1", "fc2")))
    return Predictor(threshold=fields.number("powerinfer.sparse_threshold", 0.0))


def rotary(fields: Fields, spec: ModelSpec, factors: Factors, base: float = 1e4, *, whole: bool = True) -> Positions:
    """One table for all layers. Llama 3.1's scaling comes as a divisor of each frequency, LongRoPE's as two; `whole`:
    see `rope.read_yarn`."""
    keys = fields.under(f"{spec.family}.")
    base = keys.positive("rope.freq_base", base)
    plain = rope.frequencies(_rotary_dim(fields, spec), base)
    for name, values in factors.items():
        if len(values) != len(plain):
            raise ModelError(f"{fields.path}: {name}.weight has shape {values.shape}, not one of {len(plain)} pairs")
    scaling, divisor = keys.text("rope.scaling.type", "none"), factors.get("rope_freqs", np.ones(1))
    magnitude = keys.positive("rope.scaling.attn_factor", 1.0)
    original = keys.count("rope.scaling.original_context_length", spec.context)
    if {"rope_factors_short", "rope_factors_long"} <= factors.keys():
        short, long = factors["rope_factors_short"], factors["rope_factors_long"]
        table = rope.rotary(fields.path, plain, short, magnitude, long_divisor=long, original_context=original)
    elif scaling in ("", "none"):
        table = rope.rotary(fields.path, plain, keys.positive("rope.scale_linear", 1.0) * divisor)
    elif scaling == "linear":
        factor = keys.positive("rope.scaling.factor", keys.positive("rope.scale_linear", 1.0))
        table = rope.rotary(fields.path, plain, factor * divisor)
    elif scaling == "yarn":
        scaled, factor = rope.read_yarn(keys, _YARN, plain, base=base, original_context=original, whole=whole)
        table = rope.rotary(fields.path, scaled, divisor, rope.yarn_magnitude(factor) * magnitude)
    else:
        raise ModelError(
            f"{fields.path}: RoPE scaling '{scaling}' is not supported; linear, llama3, yarn and longrope are"
        )
    return Positions(rotary=(table,))


def _rotary_dim(fields: Fields, spec: ModelSpec) -> int:
    """How many numbers of a head are rotated."""
    head_dim = spec.architecture.attention.head_dim
    dim = fields.count(f"{spec.family}.rope.dimension_count", head_dim)
    if dim > head_dim or dim % 2:
        raise ModelError(f"{fields.path}: RoPE on {dim} of the {head_dim} numbers of a head is not supported")
    return dim
