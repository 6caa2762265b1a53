"""The description of a model from the fields of a GGUF file.

GGUF has no fields for activation, biases and tied embeddings; they follow from the dialect and the tensors.
"""

from collections.abc import Mapping
from typing import NamedTuple

from warmfront.coordinator.models import rope
from warmfront.coordinator.models.fields import Fields
from warmfront.coordinator.models.rope import Doubles
from warmfront.shared.errors import ModelError
from warmfront.shared.model.architecture import Architecture, Attention, FeedForward, Norm, Positions
from warmfront.shared.model.spec import ModelSpec, Predictor

__all__ = ["Found", "llama", "rotary"]


class Found(NamedTuple):
    """What is in a file beside its fields."""

    # Shape of each tensor by the name of `tensors.py`; it has "embed".
    shapes: Mapping[str, tuple[int, ...]]
    # Whether it is in PowerInfer's dialect, whose models all use ReLU.
    powerinfer: bool

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
    for key in ("attention.value_length", "rope.dimension_count"):
        if keys.count(key, head_dim) != head_dim:
            raise ModelError(
                f"{fields.path}: {family}.{key} differs from the head size {head_dim}, which is not supported"
            )
    layers, window = keys.count("block_count"), keys.count("attention.sliding_window", 0, low=0)
    attention = Attention(
        heads=heads,
        kv_heads=keys.count("attention.head_count_kv", heads),
        head_dim=head_dim,
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


def rotary(fields: Fields, spec: ModelSpec, factors: Doubles | float) -> Positions:
    """RoPE on whole heads. Llama 3.1's scaling comes as `factors`, a divisor of each frequency."""
    keys = fields.under(f"{spec.family}.")
    scaling = keys.text("rope.scaling.type", "")
    divisor = keys.positive("rope.scale_linear", 1.0)
    if scaling == "linear":
        divisor = keys.positive("rope.scaling.factor", divisor)
    elif scaling not in ("", "none"):
        raise ModelError(f"{fields.path}: RoPE scaling '{scaling}' is not supported; linear and llama3 are")
    plain = rope.frequencies(spec.architecture.attention.head_dim, keys.positive("rope.freq_base", 10000.0))
    return rope.positions(fields.path, plain, divisor * factors)
