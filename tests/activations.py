"""The activations of a feed-forward layer: their names, descriptions, and an independent float64 reference."""

import numpy as np
import numpy.typing as npt
from scipy.special import erf

from warmfront.shared.model.architecture import ACTIVATIONS, FeedForward

__all__ = ["NAMES", "SPARSE", "described", "factors", "firing"]

Doubles = npt.NDArray[np.float64]

# As users write them; the threshold is one that many random gates are below, the limit one that many are beyond.
THRESHOLD, LIMIT = 0.3, 0.9
NAMES = tuple({"fatrelu": f"fatrelu:{THRESHOLD}", "swiglu_oai": f"swiglu_oai:{LIMIT}"}.get(n, n) for n in ACTIVATIONS)
SPARSE = tuple(name for name in NAMES if "relu" in name)


def described(name: str) -> FeedForward:
    """The feed-forward with the activation of that name."""
    return FeedForward(activation="silu").activated(name)


def firing(name: str, gates: Doubles, ups: Doubles) -> npt.NDArray[np.bool_]:
    """Which neurons contribute anything at all."""
    if name not in SPARSE:
        return np.ones(gates.shape, bool)
    return np.asarray((gates > (THRESHOLD if ":" in name else 0)) & ((ups > 0) | (name != "drelu")))


def factors(name: str, gates: Doubles, ups: Doubles) -> Doubles:
    """What the down rows are multiplied with."""
    gates, ups = np.asarray(gates, np.float64), np.asarray(ups, np.float64)
    if name in SPARSE:
        return np.where(firing(name, gates, ups), gates * ups * (gates if name == "relu2" else 1), 0)
    with np.errstate(over="ignore"):
        if name.startswith("swiglu_oai"):
            gates, ups = np.minimum(gates, LIMIT), np.clip(ups, -LIMIT, LIMIT)
            return np.asarray(gates / (1 + np.exp(-1.702 * gates)) * (ups + 1))
        share = {
            "silu": lambda: 1 / (1 + np.exp(-gates)),
            "gelu": lambda: (1 + erf(gates / np.sqrt(2))) / 2,
            "gelu_tanh": lambda: (1 + np.tanh(np.sqrt(2 / np.pi) * (gates + 0.044715 * gates**3))) / 2,
        }[name]()
    return np.asarray(gates * share * ups)
