"""Calibration of the selector `lowbit`: a threshold for each neuron, from sample text, for a wished recall.

Recall is by mass: the share of sum |h_i| * ||down_i|| over the firing neurons that the selected ones make.
"""

import numpy as np
import numpy.typing as npt

from warmfront.coordinator.selectors.lowbit import Lowbit, groups_of, rows_of
from warmfront.shared.kernels.lowbit import unpack_lowbit
from warmfront.shared.model.architecture import FeedForward
from warmfront.shared.model.bundle import GROUP
from warmfront.shared.model.formats import Kind, unpack
from warmfront.shared.model.store import PackedModel

__all__ = ["calibrate", "down_norms", "masses_and_scores"]

Floats = npt.NDArray[np.float32]
Bytes = npt.NDArray[np.uint8]


def down_norms(model: PackedModel, groups: Bytes) -> Floats:
    """float32 [groups * 32]: the length of each neuron's down row."""
    layout = model.layout
    bundles = groups[:, : layout.tail_offset].reshape(-1, layout.bundle_bytes)
    rows = bundles[:, layout.down_offset : layout.down_offset + layout.down_row_bytes]
    if layout.down_kind != Kind.Q4C:
        return np.asarray(np.linalg.norm(unpack(rows, layout.down_kind, layout.hidden), axis=1), np.float32)
    nibbles = rows.reshape(layout.groups, GROUP, -1, 16)
    q = np.concatenate((nibbles & 15, nibbles >> 4), axis=3).reshape(layout.groups, GROUP, layout.hidden)
    tail = groups[:, layout.tail_offset : layout.tail_offset + 4 * layout.hidden]
    scale, minimum = np.split(np.ascontiguousarray(tail).view(np.float16).astype(np.float32), 2, axis=1)
    return np.asarray(np.linalg.norm(q * scale[:, None] + minimum[:, None], axis=2).reshape(-1), np.float32)


def _biases(model: PackedModel, groups: Bytes, offset: int) -> Floats:
    """float32 [groups * 32]: the bias at `offset` of each neuron's bundle; offset 0: none."""
    bundles = groups[:, : model.layout.tail_offset].reshape(-1, model.layout.bundle_bytes)
    if offset == 0:
        return np.zeros(len(bundles), np.float32)
    return np.ascontiguousarray(bundles[:, offset : offset + 4]).view(np.float32)[:, 0]


def _magnitudes(feed_forward: FeedForward, gates: Floats, ups: Floats) -> Floats:
    """|h| of neurons with these gates and ups, in a model whose activation is sparse."""
    fires = gates > feed_forward.closed
    if feed_forward.activation == "drelu":
        fires &= ups > 0
    opened = np.where(fires, gates, np.float32(0))
    return np.asarray(np.abs(opened * ups) * (opened if feed_forward.activation == "relu2" else 1), np.float32)


def masses_and_scores(lowbit: Lowbit, model: PackedModel, layer: int, x: Floats) -> tuple[Floats, Floats, Floats]:
    """For `x` [tokens, hidden], [tokens, neurons] each: what every neuron weighs, |h_i| * ||down_i||; what its copy
    scores; and by how much the gate is above that score."""
    groups = groups_of(model, layer)
    layout = model.layout
    gates = x @ rows_of(model, groups, 0).T + _biases(model, groups, layout.gate_bias_offset)
    ups = np.ones_like(gates)
    if layout.gated:
        ups = x @ rows_of(model, groups, layout.up_offset).T + _biases(model, groups, layout.up_bias_offset)
    mass = _magnitudes(model.spec.architecture.feed_forward, gates, ups) * down_norms(model, groups)
    packed = lowbit.file.bytes_of(f"layers.{layer}.lowbit").reshape(len(groups) * GROUP, -1)
    scores = x @ unpack_lowbit(packed, lowbit.bits, x.shape[1]).T
    return mass, scores, gates - scores


def calibrate(lowbit: Lowbit, model: PackedModel, inputs: Floats) -> None:
    """Set the thresholds from `inputs`, float32 [layers, tokens, hidden]: what the feed-forward layers got.

    A neuron's score is off by a constant wherever the input has channels of a constant size, which language models
    have; so each gets its mean error back, and all of a layer one threshold above that.
    """
    for layer, x in enumerate(inputs):
        mass, scores, errors = masses_and_scores(lowbit, model, layer, x)
        offsets = errors.mean(0)
        scores = (scores + offsets).ravel()
        order = np.argsort(-scores)
        gathered = np.cumsum(mass.ravel()[order], dtype=np.float64)
        last = int(np.searchsorted(gathered, lowbit.recall * gathered[-1]))
        lowest = np.nextafter(scores[order[min(last, len(order) - 1)]], np.float32(-np.inf))
        lowbit.thresholds[layer] = lowest - offsets
