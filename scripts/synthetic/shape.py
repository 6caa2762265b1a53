"""Sizes of the synthetic model, its vocabulary, and how often its neurons fire."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

__all__ = ["FIRST_WORD", "NORM_EPS", "PREDICTOR", "ROPE_BASE", "SPECIAL", "Shape", "firing_rates", "tokens"]

SPECIAL = ("<unk>", "<s>", "</s>")
FIRST_WORD = len(SPECIAL) + 256
NORM_EPS, ROPE_BASE = 1e-5, 10000.0
PREDICTOR = ("fc1", "fc2")
PREDICTOR_BLOCK = 64  # PowerInfer's CUDA kernels assume a multiple of it
BLOCK = 32  # weights in a block of GGUF's quantised types

# This part of the neurons makes this share of the firing; the most active one fires this often.
HOT, HOT_SHARE, PEAK = 0.21, 0.8, 0.95


@dataclass(frozen=True)
class Shape:
    """Sizes of the model: channels, layers, neurons of a layer or of an expert, heads, tokens, rank of the gate
    matrices, topics; experts of a layer (0: there are none), how many of them a token uses, and their activation; the
    logit of the next word on the cycle, others having about 0."""

    hidden: int
    layers: int
    ffn: int
    heads: int
    kv_heads: int
    vocab: int
    rank: int
    topics: int
    context: int
    experts: int = 0
    used: int = 0
    expert_activation: str = "silu"
    logit: float = 20.0

    @property
    def head_dim(self) -> int:
        return self.hidden // self.heads

    @property
    def predictor(self) -> int:
        """Rows of fc1: P, -P, e0, then zeros up to a multiple of PREDICTOR_BLOCK."""
        return -(-(2 * self.rank + 1) // PREDICTOR_BLOCK) * PREDICTOR_BLOCK

    def check(self) -> str | None:
        """The first thing that is wrong with the sizes, naming the option; None if they make a model."""
        for name in ("hidden", "layers", "ffn", "heads", "kv_heads", "rank", "topics", "context"):
            if getattr(self, name) < 1:
                return f"--{name.replace('_', '-')} must be at least 1"
        for name in ("hidden", "ffn"):
            if getattr(self, name) % BLOCK:
                return f"--{name} must be a multiple of {BLOCK}"
        if self.hidden % self.heads or self.head_dim % 2:
            return "--hidden must be an even multiple of --heads"
        if self.heads % self.kv_heads:
            return "--heads must be a multiple of --kv-heads"
        if self.rank > self.hidden // 2:
            return "--rank must be at most half of --hidden"
        if self.experts < 0 or self.used < 0 or (self.used and not self.experts):
            return "--experts and --used must not be negative, and --used needs --experts"
        if self.expert_activation != "silu" and not self.experts:
            return "--expert-activation needs --experts"
        if self.experts and not 1 <= self.used <= self.experts:
            return "--used must be from 1 to --experts"
        if not 0 < self.logit <= 100:
            return "--logit must be above 0, up to 100"
        if self.vocab < FIRST_WORD + 2 * self.topics:
            return f"--vocab must be at least {FIRST_WORD + 2 * self.topics}: special tokens, bytes, 2 words a topic"
        return None

    def tensors(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Name and shape of every tensor, in the order in which `Maker` makes them."""
        yield from (("embed", (self.vocab, self.hidden)), ("head", (self.vocab, self.hidden)))
        kv = self.kv_heads * self.head_dim
        parts = {
            "attn_norm": (self.hidden,),
            "q": (self.hidden, self.hidden),
            "k": (kv, self.hidden),
            "v": (kv, self.hidden),
            "o": (self.hidden, self.hidden),
            "ffn_norm": (self.hidden,),
        }
        matrices = {"gate": (self.ffn, self.hidden), "up": (self.ffn, self.hidden), "down": (self.hidden, self.ffn)}
        if self.experts:
            parts["router"] = (self.experts, self.hidden)
            # By matrix, as GGUF stacks them.
            for part, shape in matrices.items():
                parts |= {f"experts.{number}.{part}": shape for number in range(self.experts)}
        else:
            parts |= matrices | {"fc1": (self.predictor, self.hidden), "fc2": (self.ffn, self.predictor)}
        for layer in range(self.layers):
            yield from ((f"layers.{layer}.{part}", shape) for part, shape in parts.items())
        yield "norm", (self.hidden,)


def tokens(vocab: int) -> list[str]:
    """The vocabulary as text: special tokens, bytes, words."""
    return [*SPECIAL, *(f"<0x{i:02X}>" for i in range(256)), *(f"w{i}" for i in range(FIRST_WORD, vocab))]


def firing_rates(count: int, active: float, hot: float = HOT, share: float = HOT_SHARE) -> npt.NDArray[np.float64]:
    """How often each of `count` neurons fires, or each expert is used, highest first, with mean `active`.

    The rates are PEAK / (1 + u / knee) ** slope for ranks u in 0..1. The knee sets the mean; the slope is
    chosen so that the first `hot` of them make `share` of the sum, or as much of it as the mean allows.
    """
    u = (np.arange(count) + 0.5) / count

    def rates(slope: float) -> npt.NDArray[np.float64]:
        low, high = -12.0, 12.0
        for _ in range(60):
            knee = (low + high) / 2
            if float((PEAK * (1 + u / math.exp(knee)) ** -slope).mean()) < active:
                low = knee
            else:
                high = knee
        return np.asarray(PEAK * (1 + u / math.exp(low)) ** -slope)

    low, high = 0.3, 40.0
    for _ in range(50):
        slope = (low + high) / 2
        found = rates(slope)
        if float(found[u < hot].sum()) < share * float(found.sum()):
            low = slope
        else:
            high = slope
    return rates(low)
