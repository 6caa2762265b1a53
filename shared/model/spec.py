"""A model described by data: its name, its sizes and its `Architecture`. It lies in the packed file as JSON."""

import json
import math
from dataclasses import asdict, dataclass, replace

from warmfront.shared.errors import UsageError
from warmfront.shared.model.architecture import Architecture
from warmfront.shared.model.checks import check_count
from warmfront.shared.model.formats import BLOCK
from warmfront.shared.model.records import decoded

__all__ = ["ModelSpec", "Predictor"]

_PREDICTOR_INPUTS = ("residual", "normed")
_PREDICTOR_ACTIVATIONS = ("relu", "none")


@dataclass(frozen=True, slots=True)
class Predictor:
    """How a layer's fc1 [r, hidden] and fc2 [ffn, r] tell which neurons fire, before gate and up are computed.

    Neuron n is predicted active iff (fc2 . activation(fc1 . x + bias) + bias)[n] > threshold.
    """

    # What x is: the "residual" as it enters the feed-forward layer, or the same after the layer's norm, "normed".
    input: str = "residual"
    # "relu" or "none".
    activation: str = "relu"
    # Compared with the raw logit.
    threshold: float = 0.0
    # Whether x is that of the layer before; the first layer's is its own.
    look_ahead: bool = False
    # Which of fc1 and fc2 have a bias.
    biases: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for what, value, known in (
            ("input", self.input, _PREDICTOR_INPUTS),
            ("activation", self.activation, _PREDICTOR_ACTIVATIONS),
        ):
            if value not in known:
                raise ValueError(f"predictor {what} '{value}' is not supported; {' and '.join(known)} are")
        if self.biases not in ((), ("fc1",), ("fc2",), ("fc1", "fc2")):
            raise ValueError(f"predictor biases are {self.biases}, not some of fc1, fc2")
        if not math.isfinite(self.threshold):
            raise ValueError(f"predictor threshold {self.threshold} is not a number; the file is damaged")


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSpec:
    """One decoder-only transformer. Constructing one that no model can have raises ValueError."""

    # The family's name in the model's own files: "llama".
    family: str
    name: str
    layers: int
    # Width of the residual.
    hidden: int
    # Neurons of a layer; with experts, of each expert.
    ffn: int
    # Rows of the embedding.
    vocab: int
    # Tokens that the model was trained for.
    context: int
    architecture: Architecture
    # Present if the model has low-rank predictors; it then has them in every layer.
    predictor: Predictor | None = None

    def __post_init__(self) -> None:
        for what in ("layers", "hidden", "ffn", "vocab", "context"):
            check_count(what, getattr(self, what))
        if self.hidden % BLOCK:
            raise ValueError(f"hidden size {self.hidden} is not a multiple of {BLOCK}; such models are not supported")
        experts = self.architecture.feed_forward.experts
        for layer in experts.dense_layers if experts is not None else ():
            check_count("layer without experts", layer, 0, self.layers - 1)
        per_layer = {
            "attention windows": self.architecture.attention.windows,
            "rotary tables": self.architecture.positions.rotary_of_layer,
        }
        for what, values in per_layer.items():
            if len(values) not in (0, self.layers):
                raise ValueError(f"{what} are given for {len(values)} layers of {self.layers}")

    @property
    def activation(self) -> str:
        """The activation of the feed-forward layers, as users write it."""
        return self.architecture.feed_forward.activation_name

    def activated(self, name: str) -> "ModelSpec":
        """The same model with another activation. Raises UsageError if it cannot have that."""
        try:
            feed_forward = self.architecture.feed_forward.activated(name)
        except ValueError as error:
            raise UsageError(f"--activation {name}, but {error}: leave it out for {self.name}") from error
        return replace(self, architecture=replace(self.architecture, feed_forward=feed_forward))

    @property
    def sparse(self) -> bool:
        """Whether the layers have neurons that contribute exactly nothing, and can be run so that they are left out."""
        return self.architecture.feed_forward.sparse

    @property
    def profiled(self) -> bool:
        """Whether it is counted which neurons fire, to order and to predict them by that: not yet within experts."""
        return self.sparse and self.architecture.feed_forward.experts is None

    @property
    def why_unprofiled(self) -> str:
        """What a model is that is not `profiled`, to follow its name."""
        if self.sparse:
            return "is a mixture of experts"
        return f"is not ReLU-like: it uses {self.activation}"

    def to_json(self) -> str:
        """A JSON object of all fields."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> "ModelSpec":
        """The inverse of `to_json`. Raises ValueError that names the field for anything that `to_json` cannot write."""
        return decoded(cls, json.loads(text), "")
