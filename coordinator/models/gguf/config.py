"""The description of a model from the fields of a GGUF file.

GGUF has no fields for activation, biases and tied embeddings; they follow from the dialect and the tensors.
"""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from warmfront.coordinator.models import rope
from warmfront.coordinator.models.fields import Fields
from warmfront.coordinator.models.rope import Doubles
from warmfront.shared.errors import ModelError
from warmfront.shared.model.architecture import Architecture, Attention, FeedForward, Norm, Positions
from warmfront.shared.model.spec import ModelSpec, Predictor

__all__ = ["Factors", "Found", "llama", "rotary"]

# Divisors of the rotary frequencies, by the name of their tensor in the file.
Factors = Mapping[str, Doubles]


class Found(NamedTuple):
    """What is in a file beside its fields."""

    # Shape of each tensor by the name of `tensors.py`; it has "embed".
    shapes: Mapping[str, tuple[int, ...]]
    # Whether it is in PowerInfer's dialect, whose models all use ReLU.
    powerinfer: bool

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


def llama(fields: Fields, found: Found) -> ModelSpec:
    """The description of a Llama, without its positions."""
    family, name = fields.text("general.architecture"), fields.text("general.name", fields.path.stem)
    keys = fields.under(f"{family}.")
    hidden, heads = keys.count("embedding_length"), keys.count("attention.head_count")
    head_dim = keys.count("attention.key_length", hidden // heads)
    if keys.count("attention.value_length", head_dim) != head_dim:
        raise ModelError(
            f"{fields.path}: {family}.attention.value_length differs from the head size {head_dim}, "
            "which is not supported"
        )
    layers, window = keys.count("block_count"), keys.count("attention.sliding_window", 0, low=0)
    attention = Attention(
        heads=heads,
        kv_heads=keys.count("attention.head_count_kv", heads),
        head_dim=head_dim,
        qk_norm=found.qk_norm(head_dim),
        biases=found.biases(("q", "k", "v", "o")),
        windows=(window,) * layers if window else (),
    )
    return ModelSpec(
        family=family,
        name="".join(filter(str.isprintable, name)),
        layers=layers,
        hidden=hidden,
        ffn=keys.count("feed_forward_length"),
        vocab=found.shapes["embed"][0],
        context=keys.count("context_length"),
        architecture=Architecture(
            norm=Norm(epsilon=keys.positive("attention.layer_norm_rms_epsilon")),
            positions=Positions(),
            attention=attention,
            feed_forward=FeedForward(
                activation="relu" if found.powerinfer else "silu", biases=found.biases(("gate", "up", "down"))
            ),
            tied_head="head" not in found.shapes,
        ),
        predictor=Predictor(threshold=fields.number("powerinfer.sparse_threshold", 0.0)) if found.predictors else None,
    )


def rotary(fields: Fields, spec: ModelSpec, factors: Factors) -> Positions:
    """One table for all layers. Llama 3.1's scaling comes as a divisor of each frequency, LongRoPE's as two."""
    keys = fields.under(f"{spec.family}.")
    base = keys.positive("rope.freq_base", 10000.0)
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
        factor = keys.positive("rope.scaling.factor")
        if base <= 1:
            raise keys.wrong("rope.freq_base", "above 1, as YaRN wants it")
        scaled = rope.yarn(
            plain,
            base=base,
            factor=factor,
            fast=keys.positive("rope.scaling.yarn_beta_fast", 32.0),
            slow=keys.positive("rope.scaling.yarn_beta_slow", 1.0),
            original_context=original,
        )
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
