"""Calibration of the selector `lowbit`: a threshold for each neuron, from sample text, for a wished recall.

Recall is by mass: the share of sum |h_i| * ||down_i|| over all neurons that the selected ones make, in each layer.
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from warmfront.coordinator.selectors.lowbit import Lowbit, groups_of, parts_of, rows_of
from warmfront.shared.kernels.activation import activate_times, activation_of
from warmfront.shared.kernels.lowbit import unpack_lowbit
from warmfront.shared.machine.memory import address
from warmfront.shared.model.architecture import FeedForward
from warmfront.shared.model.bundle import GROUP
from warmfront.shared.model.formats import Kind, unpack
from warmfront.shared.model.store import PackedModel

__all__ = [
    "calibrate",
    "down_norms",
    "factors",
    "masses",
    "masses_and_scores",
    "matrix_products",
    "neuron_biases",
]

Floats = npt.NDArray[np.float32]
Bytes = npt.NDArray[np.uint8]


def down_norms(model: PackedModel, groups: Bytes) -> Floats:
    """float32 [neurons]: the length of each neuron's down row, of `groups`, uint8 [neurons / 32, group_bytes]."""
    layout = model.layout
    bundles = groups[:, : layout.tail_offset].reshape(-1, layout.bundle_bytes)
    rows = bundles[:, layout.down_offset : layout.down_offset + layout.down_row_bytes]
    if layout.down_kind != Kind.Q4C:
        return np.asarray(np.linalg.norm(unpack(rows, layout.down_kind, layout.hidden), axis=1), np.float32)
    nibbles = rows.reshape(len(groups), GROUP, -1, 16)
    q = np.concatenate((nibbles & 15, nibbles >> 4), axis=3).reshape(len(groups), GROUP, layout.hidden)
    tail = groups[:, layout.tail_offset : layout.tail_offset + 4 * layout.hidden]
    scale, minimum = np.split(np.ascontiguousarray(tail).view(np.float16).astype(np.float32), 2, axis=1)
    return np.asarray(np.linalg.norm(q * scale[:, None] + minimum[:, None], axis=2).reshape(-1), np.float32)


def neuron_biases(model: PackedModel, groups: Bytes, offset: int) -> Floats:
    """float32 [groups * 32]: the bias at `offset` of each neuron's bundle; offset 0: none."""
    bundles = groups[:, : model.layout.tail_offset].reshape(-1, model.layout.bundle_bytes)
    if offset == 0:
        return np.zeros(len(bundles), np.float32)
    return np.ascontiguousarray(bundles[:, offset : offset + 4]).view(np.float32)[:, 0]


def matrix_products(model: PackedModel, groups: Bytes, x: Floats) -> list[Floats]:
    """What `x` [tokens, hidden] gives of each matrix before down, biases added: [tokens, neurons] each."""
    parts, layout = model.spec.architecture.feed_forward.matrices[:-1], model.layout
    return [
        x @ rows_of(model, groups, layout.place_of(part)[0]).T + neuron_biases(model, groups, layout.bias_offset(part))
        for part in parts
    ]


def _copied_products(lowbit: Lowbit, model: PackedModel, layer: int, x: Floats) -> list[Floats]:
    """The same of the low-bit copies, without biases."""
    parts = parts_of(model.spec.architecture.feed_forward)
    packed = lowbit.file.bytes_of(f"layers.{layer}.lowbit").reshape(model.layout.groups, len(parts), GROUP, -1)
    neurons = len(packed) * GROUP
    return [
        x @ unpack_lowbit(packed[:, part].reshape(neurons, -1), lowbit.bits, x.shape[1]).T for part in range(len(parts))
    ]


def factors(feed_forward: FeedForward, products: Sequence[Floats]) -> Floats:
    """What down rows are multiplied with, activation(gate) * up, or activation(up) without a gate, by the kernel that
    the compiled pass has too."""
    gates = products[0].copy()
    ups = np.ascontiguousarray(products[1]) if len(products) > 1 else np.ones_like(gates)
    activate_times(activation_of(feed_forward), address(gates), address(ups), gates.size)
    return gates


def _magnitudes(feed_forward: FeedForward, products: Sequence[Floats]) -> Floats:
    signed = factors(feed_forward, products)
    return np.abs(signed, out=signed)


def _scores(feed_forward: FeedForward, products: Sequence[Floats], offsets: Sequence[Floats]) -> Floats:
    """What neurons score by the products of their copies: the gate itself where gates close."""
    shifted = [product + offset for product, offset in zip(products, offsets, strict=True)]
    return shifted[0] if feed_forward.sparse else _magnitudes(feed_forward, shifted)


def masses(model: PackedModel, layer: int, x: Floats, first: int = 0, end: int | None = None) -> Floats:
    """What every neuron weighs for `x` [tokens, hidden], |h_i| * ||down_i||: float32 [tokens, neurons].

    Of the groups from `first` to before `end`, by default all.
    """
    groups = groups_of(model, layer, first, end)
    products = matrix_products(model, groups, x)
    return _magnitudes(model.spec.architecture.feed_forward, products) * down_norms(model, groups)


def masses_and_scores(lowbit: Lowbit, model: PackedModel, layer: int, x: Floats) -> tuple[Floats, Floats]:
    """The same masses, and what every neuron scores, to be compared with `lowbit.thresholds[layer, 0]`."""
    feed_forward = model.spec.architecture.feed_forward
    offsets = np.zeros((1, 1), np.float32) if feed_forward.sparse else lowbit.thresholds[layer, 1:]
    scores = _scores(feed_forward, _copied_products(lowbit, model, layer, x), list(offsets))
    return masses(model, layer, x), scores


def calibrate(lowbit: Lowbit, model: PackedModel, inputs: Floats) -> None:
    """Set the thresholds from `inputs`, float32 [layers, tokens, hidden]: what the feed-forward layers got.

    A copy's product is off by a constant wherever the input has channels of a constant size, which language models
    have; so each gets its mean error back, and all scores of a layer have one threshold.
    """
    feed_forward = model.spec.architecture.feed_forward
    for layer, x in enumerate(inputs):
        groups = groups_of(model, layer)
        products, copied = matrix_products(model, groups, x), _copied_products(lowbit, model, layer, x)
        offsets = [(product - copy).mean(0) for product, copy in zip(products, copied, strict=False)]
        scores = _scores(feed_forward, copied, offsets).ravel()
        mass = (_magnitudes(feed_forward, products) * down_norms(model, groups)).ravel()
        order = np.argsort(-scores)
        gathered = np.cumsum(mass[order], dtype=np.float64)
        last = int(np.searchsorted(gathered, lowbit.recall * gathered[-1]))
        lowest = np.nextafter(scores[order[min(last, len(order) - 1)]], np.float32(-np.inf))
        if feed_forward.sparse:
            lowbit.thresholds[layer, 0] = lowest - offsets[0]
        else:
            lowbit.thresholds[layer, 0], lowbit.thresholds[layer, 1:] = lowest, offsets
