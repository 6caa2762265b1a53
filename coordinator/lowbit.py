"""Low-bit copies of the gates, and the thresholds that make them a selector.

The copies lie in a file of their own beside the packed model, made when the selector is first used. A threshold per
layer is calibrated on sample text for a wished recall by mass: the share of sum |h_i| * ||down_i|| over the firing
neurons that the selected ones make. What it comes to for each neuron is kept beside the copies, by recall.
"""

import io
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from warmfront.coordinator.packer import Shapes, locked, packed_header, published, tensor_bytes, write_tensors
from warmfront.shared.bundle import GROUP
from warmfront.shared.lowbit import lowbit_bytes, pack_lowbit, unpack_lowbit
from warmfront.shared.store import PackedModel
from warmfront.shared.weights import Kind, unpack

__all__ = ["Lowbit", "calibrate", "masses_and_scores", "open_lowbit"]

Floats = npt.NDArray[np.float32]
Bytes = npt.NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class Lowbit:
    """`thresholds`: float32 [layers, neurons], NaN until calibrated."""

    file: PackedModel
    bits: int
    recall: float
    thresholds: Floats

    @property
    def calibrated(self) -> bool:
        """Whether the thresholds are known."""
        return not np.isnan(self.thresholds).any()

    @property
    def _kept(self) -> Path:
        return self.file.path.with_suffix(f".{self.recall:g}.npy")

    def load(self) -> None:
        """Take the thresholds of an earlier calibration, if there was one."""
        try:
            self.thresholds[:] = np.load(self._kept)
        except (OSError, ValueError):
            self.thresholds[:] = np.nan

    def save(self) -> None:
        """Keep the thresholds."""
        data = io.BytesIO()
        np.save(data, self.thresholds)
        with locked(self._kept.parent, _quiet):
            self._kept.unlink(missing_ok=True)  # there may be a damaged one
            with published(self._kept) as fd:
                write_tensors(fd, data.getvalue(), (), 0)


def _quiet(_message: str) -> None:
    pass


def open_lowbit(model: PackedModel, bits: int, recall: float, say: Callable[[str], None]) -> Lowbit:
    """The copies of `model`'s gates, made now if the cache has none."""
    path = model.path.with_name(f"{model.path.stem}-lowbit{bits}.safetensors")
    if not path.exists():
        with locked(path.parent, say):
            if not path.exists():
                say(f"making {bits}-bit copies of the gates")
                _write(path, model, bits)
    lowbit = Lowbit(
        PackedModel(path), bits, recall, np.empty((model.spec.layers, model.layout.groups * GROUP), np.float32)
    )
    lowbit.load()
    return lowbit


def _write(path: Path, model: PackedModel, bits: int) -> None:
    layout, layers = model.layout, range(model.spec.layers)
    shape = (layout.groups * GROUP, lowbit_bytes(bits, layout.hidden))
    shapes: Shapes = {f"layers.{i}.lowbit": ("U8", shape) for i in layers}
    kinds = {"gate": int(layout.gate_kind), "down": int(layout.down_kind)}
    with published(path) as fd:
        header = packed_header(model.spec, kinds, {}, shapes)
        copies = (pack_lowbit(_rows(model, _groups(model, i), 0), bits) for i in layers)
        write_tensors(fd, header, copies, len(layers) * tensor_bytes("U8", shape))


def _groups(model: PackedModel, layer: int) -> Bytes:
    """uint8 [groups, group_bytes] of a layer."""
    groups = np.empty((model.layout.groups, model.layout.group_bytes), np.uint8)
    model.read_groups(layer, 0, groups)
    return groups


def _rows(model: PackedModel, groups: Bytes, offset: int) -> Floats:
    """Gate rows (offset 0) or up rows of all neurons."""
    layout = model.layout
    bundles = groups[:, : layout.tail_offset].reshape(-1, layout.bundle_bytes)
    return unpack(bundles[:, offset : offset + layout.gate_row_bytes], layout.gate_kind, layout.hidden)


def _down_norms(model: PackedModel, groups: Bytes) -> Floats:
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


def masses_and_scores(lowbit: Lowbit, model: PackedModel, layer: int, x: Floats) -> tuple[Floats, Floats, Floats]:
    """For `x` [tokens, hidden], [tokens, neurons] each: what every neuron weighs, |h_i| * ||down_i||; what its copy
    scores; and by how much the gate is above that score."""
    groups = _groups(model, layer)
    gates, ups = (x @ _rows(model, groups, offset).T for offset in (0, model.layout.up_offset))
    mass = np.maximum(gates, 0) * np.abs(ups) * _down_norms(model, groups)
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
    lowbit.save()
