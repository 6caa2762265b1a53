"""The structure of a model as one value: norms, positions, attention, residual, feed-forward.

The readers describe a model by an `Architecture`; it lies in the packed file's header, and the compiled pass, the torch
pass and the workers read it from there. What follows from its fields is a property here and is derived nowhere else.
It can describe more than is computed; `support.py` refuses the rest.

Every value is valid: constructing one that no model can have raises ValueError with a message of one line.
See also: `spec.py` for the sizes and the JSON.
"""

import math
import reprlib
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from warmfront.shared.model.checks import MAX_FLOAT, check_count, check_name, check_parts, check_positive
from warmfront.shared.model.formats import BLOCK

__all__ = [
    "ACTIVATIONS",
    "NORMS",
    "SCORINGS",
    "Architecture",
    "Attention",
    "Experts",
    "FeedForward",
    "Norm",
    "Positions",
    "Rotary",
]

# Index = code in the kernels. drelu: relu(gate) * relu(up); fatrelu: gates up to a threshold become zero; swiglu_oai:
# gate * sigmoid(1.702 * gate) * (up + 1), gates above a limit cut to it, ups on both sides (gpt-oss).
ACTIVATIONS = ("silu", "relu", "gelu", "gelu_tanh", "relu2", "drelu", "fatrelu", "swiglu_oai")
# Those with a number after a colon: see `FeedForward`.
_WITH_PARAMETER = ("fatrelu", "swiglu_oai")
# Index = code in the kernels: root mean square; mean and variance.
NORMS = ("rms", "layer")
# Index = code in the kernels.
SCORINGS = ("softmax", "sigmoid")
# Exactly zero for gates up to zero, or up to a threshold: a neuron whose gate is closed need not be computed.
_SPARSE_ACTIVATIONS = frozenset({"relu", "relu2", "drelu", "fatrelu"})
_QK_NORMS = ("head", "whole")
_PLACEMENTS = ("pre", "post", "sandwich", "sum")
_RESIDUALS = ("serial", "parallel")
_PROJECTIONS = ("q", "k", "v", "o")
# More than any model has: tables have an entry for each.
_MAX_EXPERTS = 1 << 14
# The kernels compute a head in vectors of 8 floats.
_HEAD_STEP = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Norm:
    """The norms of all blocks and, mostly, one before the head; each has a weight."""

    # One of NORMS.
    kind: str = "rms"
    # Added to the mean square, or to the variance.
    epsilon: float
    # Where a block is normed: its input ("pre"), its output ("post"), both ("sandwich"), or the residual that its
    # output has been added to ("sum").
    placement: str = "pre"
    bias: bool = False
    # Whether attention and feed-forward, of a parallel residual, have one norm together.
    shared: bool = False
    # Whether there is one before the head.
    final: bool = True

    def __post_init__(self) -> None:
        check_name("norm", self.kind, NORMS)
        check_name("placement of norms", self.placement, _PLACEMENTS)
        check_positive("norm epsilon", self.epsilon)


@dataclass(frozen=True, slots=True, kw_only=True)
class Rotary:
    """A table of rotary position embedding (RoPE): pair j of a head is rotated by position * frequencies[j] radians."""

    # Inverse frequency of each rotated pair, scaling (linear, llama3) already applied. The rest of a head stays.
    frequencies: tuple[float, ...]
    # Factor on cos and sin (YaRN's attention factor).
    magnitude: float = 1.0
    # Those for runs with a context longer than `original_context` (LongRoPE); empty: the same.
    long_frequencies: tuple[float, ...] = ()
    original_context: int = 0

    def __post_init__(self) -> None:
        for frequencies in (self.frequencies, self.long_frequencies or self.frequencies):
            if not frequencies or not all(math.isfinite(f) and f > 0 for f in frequencies):
                raise ValueError(f"rotary frequencies are {reprlib.repr(frequencies)}, not positive numbers")
            if len(frequencies) != len(self.frequencies):
                raise ValueError(
                    f"{len(self.frequencies)} rotary frequencies have {len(frequencies)} for long contexts"
                )
        check_count("original context", self.original_context, 0)
        check_positive("rotary magnitude", self.magnitude)

    @property
    def dim(self) -> int:
        """How many numbers of each head are rotated."""
        return 2 * len(self.frequencies)

    def cos_sin(self, context: int) -> npt.NDArray[np.float32]:
        """Cosines and sines for the positions 0..context, times the magnitude: float32 [2, context, dim / 2].

        Computed in float64: a float32 angle of 100000 radians is off by up to 0.004.
        """
        long = self.long_frequencies and context > self.original_context
        frequencies = self.long_frequencies if long else self.frequencies
        angles = np.outer(np.arange(context), np.array(frequencies, np.float64))
        return (np.stack((np.cos(angles), np.sin(angles))) * self.magnitude).astype(np.float32)


@dataclass(frozen=True, slots=True, kw_only=True)
class Positions:
    """How a model tells positions apart; without any table, by the causal mask alone."""

    # The different rotary tables.
    rotary: tuple[Rotary, ...] = ()
    # Which table each layer uses, -1 for none. Empty: all use the first.
    rotary_of_layer: tuple[int, ...] = ()
    # Rows before that of position 0 in a learned table (OPT: 2). None: no table is learned.
    learned_offset: int | None = None

    def __post_init__(self) -> None:
        for table in self.rotary_of_layer:
            check_count("rotary table of a layer", table, -1, len(self.rotary) - 1)
        if self.learned_offset is not None:
            check_count("offset of learned positions", self.learned_offset, 0)

    def table_of(self, layer: int) -> int:
        """Index of the rotary table of a layer, -1 for none."""
        return self.rotary_of_layer[layer] if self.rotary_of_layer else min(len(self.rotary), 1) - 1

    def tables(self, context: int) -> npt.NDArray[np.float32]:
        """`cos_sin` of all rotary tables: float32 [tables, 2, context, pairs], zeros behind those of a short one."""
        widest = max((table.dim for table in self.rotary), default=0) // 2
        out = np.zeros((len(self.rotary), 2, context, widest), np.float32)
        for own, table in zip(out, self.rotary, strict=True):
            own[:, :, : table.dim // 2] = table.cos_sin(context)
        return out


@dataclass(frozen=True, slots=True, kw_only=True)
class Attention:
    """The attention of every layer."""

    heads: int
    # Heads of keys and values; each serves heads / kv_heads of the queries' (GQA).
    kv_heads: int
    head_dim: int
    # Factor on q.k; None: 1 / sqrt(head_dim).
    scale: float | None = None
    # What of q and k is normed before it is rotated: each "head" for itself, or the "whole" vectors; None: nothing.
    qk_norm: str | None = None
    # Which of q, k, v and o have a bias.
    biases: tuple[str, ...] = ()
    # Scores become cap * tanh(score / cap); None: they stay.
    soft_cap: float | None = None
    # Of each layer: how many tokens a token attends to, itself included; 0: all before it. Empty: 0 for all layers.
    windows: tuple[int, ...] = ()
    # Whether each head has a learned score that takes part in the softmax but has no value.
    sinks: bool = False

    def __post_init__(self) -> None:
        check_count("number of heads", self.heads)
        check_count("number of key-value heads", self.kv_heads)
        check_count("head size", self.head_dim, 0)
        if self.q_rows % BLOCK:
            raise ValueError(
                f"heads x head size {self.q_rows} is not a multiple of {BLOCK}; such models are not supported"
            )
        if self.head_dim < _HEAD_STEP or self.head_dim % _HEAD_STEP:
            raise ValueError(
                f"head size {self.head_dim} is not a multiple of {_HEAD_STEP}; such models are not supported"
            )
        if self.heads % self.kv_heads:
            raise ValueError(f"{self.heads} heads do not share {self.kv_heads} key-value heads; the file is damaged")
        for what, value in (("attention scale", self.scale), ("attention soft cap", self.soft_cap)):
            if value is not None:
                check_positive(what, value)
        if self.qk_norm is not None:
            check_name("q/k norm", self.qk_norm, _QK_NORMS)
        check_parts("attention biases", self.biases, _PROJECTIONS)
        for window in self.windows:
            check_count("attention window", window, 0)

    @property
    def score_scale(self) -> float:
        """Factor on q.k."""
        return self.head_dim**-0.5 if self.scale is None else self.scale

    @property
    def q_rows(self) -> int:
        """Rows of W_q: numbers of all heads of a token's query."""
        return self.heads * self.head_dim

    @property
    def kv_rows(self) -> int:
        """Rows of W_k, and of W_v."""
        return self.kv_heads * self.head_dim


@dataclass(frozen=True, slots=True, kw_only=True)
class Experts:
    """Mixture of experts: every layer has `number` feed-forwards, of which a router picks some for each token.

    Each adds its output times a weight that the router gives it.
    """

    number: int
    # Experts that the router picks for a token: those with the highest scores, of equal ones the first.
    active: int
    # Whether the scores have a bias.
    bias: bool = False
    # What makes weights of scores, one of SCORINGS: a softmax over all experts, or each score's sigmoid.
    scoring: str = "softmax"
    # Whether the weights of the active experts are scaled to sum to one.
    normalised: bool = False
    # Factor on the weights.
    scale: float = 1.0
    # Neurons of the feed-forward that every token uses beside those, 0: there is none; and whether the router weighs it
    # too, by the sigmoid of a score of its own.
    shared: int = 0
    shared_gate: bool = False
    # Whether the router reads the layer's input, before its norm and attention, not what the experts read.
    early: bool = False
    # Whether the choice is by the weights, before they are scaled, plus a number of each expert's own.
    corrected: bool = False
    # The experts are in so many groups, one behind the other, of which those `active_groups` can be chosen from whose
    # best two experts together are best.
    groups: int = 1
    active_groups: int = 1
    # Layers that have one feed-forward of `dense` neurons instead, in ascending order.
    dense_layers: tuple[int, ...] = ()
    dense: int = 0

    def __post_init__(self) -> None:
        check_count("number of experts", self.number, 1, _MAX_EXPERTS)
        check_count("number of active experts", self.active, 1, self.number)
        check_name("scoring of experts", self.scoring, SCORINGS)
        check_positive("factor on the experts' weights", self.scale)
        check_count("neurons of the shared expert", self.shared, 0)
        if self.shared_gate and not self.shared:
            raise ValueError("there is a gate for a shared expert, but no shared expert")
        check_count("groups of experts", self.groups, 1, self.number)
        check_count("active groups of experts", self.active_groups, 1, self.groups)
        if self.number % self.groups or self.active > self.number // self.groups * self.active_groups:
            raise ValueError(
                f"{self.active} of {self.number} experts cannot be chosen from {self.active_groups} of {self.groups} "
                "groups of them"
            )
        check_count("neurons of layers without experts", self.dense, 1 if self.dense_layers else 0)
        if list(self.dense_layers) != sorted({*self.dense_layers}):
            raise ValueError(f"layers without experts are {reprlib.repr(self.dense_layers)}, not in ascending order")


@dataclass(frozen=True, slots=True, kw_only=True)
class FeedForward:
    """The feed-forward of every layer.

    Gated: down . (activation(gate . x) * (up . x)), with dReLU relu(up . x), with swiglu_oai (up . x) + 1. Else:
    down . activation(up . x). Each product may have a bias.
    """

    gated: bool = True
    # Of the gate, or of up if there is no gate; one of ACTIVATIONS.
    activation: str
    # Of fatrelu: gates up to this are closed. Of swiglu_oai: gates above it, and ups beyond it on both sides, are cut.
    # None for all others.
    parameter: float | None = None
    # Which of gate, up and down have a bias.
    biases: tuple[str, ...] = ()
    experts: Experts | None = None

    def __post_init__(self) -> None:
        check_name("activation", self.activation, ACTIVATIONS)
        if self.activation in ("drelu", "swiglu_oai") and not self.gated:
            raise ValueError(f"the activation {self.activation} needs a gate, which this model does not have")
        if (self.activation in _WITH_PARAMETER) != (self.parameter is not None):
            known = " and ".join(_WITH_PARAMETER)
            raise ValueError(f"activation {self.activation} with parameter {self.parameter}: {known} alone have one")
        if self.limit is not None:
            check_positive("activation limit", self.limit)
        if self.parameter is not None and not -MAX_FLOAT <= self.parameter <= MAX_FLOAT:
            raise ValueError(f"activation parameter is {self.parameter}, not a finite number")
        check_parts("feed-forward biases", self.biases, self.matrices)

    @property
    def matrices(self) -> tuple[str, ...]:
        """The matrices of a layer, in the order of a neuron's bundle."""
        return ("gate", "up", "down") if self.gated else ("up", "down")

    @property
    def neuron_biases(self) -> tuple[str, ...]:
        """Which of gate and up have a bias: a number of each neuron, where that of down has one of each output."""
        return tuple(part for part in self.biases if part != "down")

    @property
    def activation_code(self) -> int:
        """The activation as the kernels number it."""
        return ACTIVATIONS.index(self.activation)

    @property
    def activation_name(self) -> str:
        """The activation as users write it: "relu", "fatrelu:0.01"."""
        return self.activation if self.parameter is None else f"{self.activation}:{self.parameter!r}"

    def activated(self, name: str) -> "FeedForward":
        """The same with the activation of that name (`activation_name`); raises ValueError if it cannot have that."""
        activation, _, number = name.partition(":")
        return replace(self, activation=activation, parameter=float(number) if number else None)

    @property
    def sparse(self) -> bool:
        """Whether neurons with a closed gate (a closed up, if there is no gate) contribute exactly nothing."""
        return self.activation in _SPARSE_ACTIVATIONS

    @property
    def closed(self) -> float:
        """Gates up to this float32 are closed; of an activation that is never zero by itself, the lowest."""
        if self.activation == "fatrelu":
            return float(np.float32(self.parameter))
        return 0.0 if self.sparse else -MAX_FLOAT

    @property
    def limit(self) -> float | None:
        """The float32 that gates and ups are cut to; None: they are not."""
        return float(np.float32(self.parameter)) if self.activation == "swiglu_oai" else None

    @property
    def most(self) -> float | None:
        """What no down row is multiplied with more than, whatever the input is; None: there is no such bound."""
        # x * sigmoid(1.702 * x) is above -0.164.
        return None if self.limit is None else max(self.limit, 0.164) * (self.limit + 1)

    @property
    def degree(self) -> int:
        """The power of its input that bounds the output: one for each matrix before down, twice the one that is
        squared; none where the activation is bounded."""
        return 0 if self.most is not None else len(self.matrices) - 1 + (self.activation == "relu2")


@dataclass(frozen=True, slots=True, kw_only=True)
class Architecture:
    """The structure of a decoder-only transformer; the sizes are in `ModelSpec`."""

    norm: Norm
    positions: Positions
    attention: Attention
    feed_forward: FeedForward
    # "serial": the feed-forward's input has the attention's output added; "parallel": both read the layer's input.
    residual: str = "serial"
    # Factors on the embedding of a token, on what each block adds to the residual, and on the logits.
    embedding_scale: float = 1.0
    residual_scale: float = 1.0
    logit_scale: float = 1.0
    # Logits become cap * tanh(logit / cap); None: they stay.
    logit_cap: float | None = None
    # Whether the embedding is the head too.
    tied_head: bool = False

    def __post_init__(self) -> None:
        check_name("residual", self.residual, _RESIDUALS)
        if self.norm.shared and (self.residual == "serial" or self.norm.placement in ("post", "sum")):
            raise ValueError(
                f"attention and feed-forward cannot share a norm with a {self.residual} residual and norms "
                f"'{self.norm.placement}'"
            )
        check_positive("embedding scale", self.embedding_scale)
        check_positive("residual scale", self.residual_scale)
        check_positive("logit scale", self.logit_scale)
        if self.logit_cap is not None:
            check_positive("logit soft cap", self.logit_cap)
        for table in self.positions.rotary:
            check_count("rotary dimension", table.dim, 2, self.attention.head_dim)
