"""A model described by data: sizes, norm, positions, attention, feed-forward.

The compiled pass (`coordinator/decode/forward.py`) and the workers read this description; a new family is a row of it
and a loader mapping, not a new pass. Biases and an untied head exist when the packed file has the tensor.
"""

import json
from dataclasses import asdict, dataclass
from typing import Any

__all__ = [
    "ACTIVATIONS",
    "PREDICTOR_ACTIVATIONS",
    "PREDICTOR_INPUTS",
    "SPARSE_ACTIVATIONS",
    "ModelSpec",
    "Predictor",
]

# Index = code in the kernels.
ACTIVATIONS = ("silu", "relu", "gelu", "gelu_tanh")
# Exactly zero for half of the line: a neuron whose gate does not pass need not be computed.
SPARSE_ACTIVATIONS = frozenset({"relu"})
PREDICTOR_INPUTS = ("residual", "normed")
PREDICTOR_ACTIVATIONS = ("relu", "none")


@dataclass(frozen=True, slots=True)
class Predictor:
    """How a layer's fc1 [r, hidden] and fc2 [ffn, r] tell which neurons fire, before gate and up are computed.

    Neuron n is predicted active iff (fc2 . activation(fc1 . x))[n] > threshold, a raw logit. `input` says what x is:
    the residual as it enters the feed-forward layer, or the same after the layer's norm.
    """

    input: str = "residual"
    activation: str = "relu"
    threshold: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSpec:
    """One decoder-only transformer; all counts per model or per layer as named."""

    architecture: str
    name: str
    layers: int
    hidden: int
    ffn: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    context: int
    norm_eps: float
    activation: str
    # Inverse frequency of each rotated pair, head_dim / 2 of them, scaling variants already applied.
    rope_frequencies: tuple[float, ...]
    # Factor on cos and sin (YaRN's attention factor); 1 elsewhere.
    rope_magnitude: float = 1.0
    # Present if the model has low-rank predictors, then in every layer.
    predictor: Predictor | None = None

    @property
    def sparse(self) -> bool:
        """Whether neurons with a closed gate contribute exactly nothing."""
        return self.activation in SPARSE_ACTIVATIONS

    def to_json(self) -> str:
        """A JSON object of all fields."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> "ModelSpec":
        """The inverse of `to_json`."""
        fields: dict[str, Any] = json.loads(text)
        fields["rope_frequencies"] = tuple(fields["rope_frequencies"])
        if fields["predictor"] is not None:
            fields["predictor"] = Predictor(**fields["predictor"])
        return cls(**fields)
