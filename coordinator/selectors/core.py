"""The core of a text (CoreInfer): the neurons that its tokens have used most, which those to come will use too.

Every token of a prompt, or of an answer that is read again, scores the neurons of a layer by how large their factors h
are, whatever their sign. The scores are added up over the tokens; the core are the neurons with the highest sums.

    norm        (|h| * length of the down row) squared, in sum 1 over the neurons of the layer: no token counts for more
                than another (after GRIFFIN)
    positive    1 for each neuron of the token's own core, the largest two fifths of the factors that are not 0, else 0
                (CoreInfer, which ranks by h with its sign: wrong where negative factors are as large)
"""

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from warmfront.coordinator.packing.arrays import load_arrays
from warmfront.coordinator.packing.beside import beside, keep
from warmfront.coordinator.selectors.calibration import down_norms
from warmfront.coordinator.selectors.lowbit import groups_of
from warmfront.shared.model.bundle import GROUP
from warmfront.shared.model.store import PackedModel

__all__ = ["bits_of", "kept_norms", "largest", "overlap"]

Floats = npt.NDArray[np.float32]
Reals = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]


def kept_norms(model: PackedModel, say: Callable[[str], None]) -> Floats:
    """The lengths of all down rows, float32 [layers, neurons]: computed once, then kept beside the packed model."""
    path = beside(model, "down", ".npz")
    shape = model.spec.layers, model.layout.groups * GROUP
    kept = load_arrays(path).get("norms")
    if kept is not None and kept.shape == shape and kept.dtype == np.float32:
        return kept
    say("measuring the down rows (first use only)")
    norms = np.array([down_norms(model, groups_of(model, layer)) for layer in range(model.spec.layers)], np.float32)
    keep(path, "the lengths of the down rows", say, norms=norms)
    return norms


def largest(scores: Reals, share: float, neurons: int) -> Bools:
    """The core, bool like `scores` [layers, all]: in each layer that share of its `neurons`, those with the highest
    scores; of equal ones the first. What is behind them is padding."""
    count = min(neurons, max(1, round(share * neurons)))
    order = np.argsort(-scores[:, :neurons], axis=1, kind="stable")
    core = np.zeros(scores.shape, bool)
    np.put_along_axis(core, order[:, :count], True, axis=1)
    return core


def overlap(first: Bools, second: Bools) -> float:
    """How alike two cores of the same size are beyond chance: 1 if they are the same, 0 for random ones, as a mean over
    the layers."""
    share = first.mean()
    same = (first & second).sum() / max(1, first.sum())
    return float((same - share) / (1 - share)) if share < 1 else 1.0


def bits_of(core: Bools) -> npt.NDArray[np.uint32]:
    """The words of a core [layers, neurons] on the board: uint32 [layers, groups], bit i = neuron i."""
    packed = np.packbits(core.reshape(len(core), -1, GROUP), axis=2, bitorder="little")
    return np.ascontiguousarray(packed).view("<u4")[:, :, 0]
