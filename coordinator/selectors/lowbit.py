"""Low-bit copies of gates, or of gates and ups, and the thresholds that make them a selector.

    gates that close    a neuron is computed if the product of its gate's copy is above its threshold
    others              if |activation(gate) * up|, both by their copies, is above its threshold: no gate alone tells
                        what such a neuron weighs (without a gate, |activation(up)|)

The copies lie in a file of their own beside the packed model, made when the selector is first used: of each group of 32
neurons the gates, then the ups. The thresholds, one for each neuron, are kept beside it, by the recall that they were
calibrated for (`calibration.py`).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from warmfront.coordinator.packing.arrays import load_arrays
from warmfront.coordinator.packing.beside import beside, keep, opened_or_made
from warmfront.coordinator.packing.packed_file import Shapes, write_packed
from warmfront.shared.files import published
from warmfront.shared.kernels.lowbit import lowbit_bytes, pack_lowbit
from warmfront.shared.model.architecture import FeedForward
from warmfront.shared.model.bundle import GROUP
from warmfront.shared.model.formats import unpack
from warmfront.shared.model.store import PackedModel

__all__ = ["Lowbit", "groups_of", "open_lowbit", "parts_of", "rows_of"]

Floats = npt.NDArray[np.float32]
Bytes = npt.NDArray[np.uint8]


@dataclass(slots=True)
class Lowbit:
    """A model's copies and thresholds, for one recall, and what they cost."""

    # The copies.
    file: PackedModel
    # Of a weight: 1, 2 or 4.
    bits: int
    # By mass: see `calibration.py`.
    recall: float
    # float32 [layers, 1 + n, neurons], NaN until calibrated: the thresholds; where neurons are weighed, also what is
    # added to the products of the copies of each part: see `parts_of`.
    thresholds: Floats
    # That of the model, on which what a neuron weighs depends.
    activation: str
    # Nats of KL divergence a token, from what the model says with all neurons, on a text of its own; NaN: not measured.
    loss: float = math.nan

    @property
    def calibrated(self) -> bool:
        """Whether the thresholds are known."""
        return not np.isnan(self.thresholds).any()

    def select_all(self) -> None:
        """Let every neuron be computed, until thresholds are set."""
        self.thresholds[:, 0], self.thresholds[:, 1:] = -np.inf, 0

    @property
    def _kept(self) -> Path:
        return self.file.path.with_suffix(f".{self.recall:g}-{self.activation}.npz")

    def load(self) -> None:
        """Take the thresholds of an earlier calibration, and the loss, if there was one."""
        kept = load_arrays(self._kept)
        thresholds, loss = kept.get("thresholds"), kept.get("loss")
        if thresholds is None or loss is None or thresholds.shape != self.thresholds.shape or loss.shape != ():
            self.thresholds[:] = np.nan
        else:
            self.thresholds[:], self.loss = thresholds, float(loss)

    def save(self, say: Callable[[str], None]) -> None:
        """Keep both; `say` gets a line where the cache cannot be written."""
        keep(self._kept, "the thresholds", say, thresholds=self.thresholds, loss=self.loss)


def parts_of(feed_forward: FeedForward) -> tuple[str, ...]:
    """The matrices that are copied: those before down, or gates alone (ups, if there are none) where they close."""
    return feed_forward.matrices[:1] if feed_forward.sparse else feed_forward.matrices[:-1]


def open_lowbit(model: PackedModel, bits: int, recall: float, say: Callable[[str], None]) -> Lowbit:
    """The copies of `model`, in the order of its neurons, made now if the cache has none, and what was calibrated.

    Raises ResourceError where they cannot be written.
    """
    feed_forward, layout = model.spec.architecture.feed_forward, model.layout
    parts = parts_of(feed_forward)
    path = beside(model, f"lowbit{bits}{'-up' * (len(parts) > 1)}", ".safetensors")
    shape = (layout.groups * len(parts) * GROUP, lowbit_bytes(bits, layout.hidden))

    def make() -> None:
        say(f"making {bits}-bit copies of the {' and '.join(f'{part}s' for part in parts)}")
        _write(path, model, bits, parts, shape)

    def fits(file: PackedModel) -> bool:
        return all(entry.shape == shape for entry in file.entries.values())

    file = opened_or_made(path, f"{bits}-bit copies", make, say, fits)
    numbers = 1 if feed_forward.sparse else 1 + len(parts)
    thresholds = np.empty((model.spec.layers, numbers, layout.groups * GROUP), np.float32)
    lowbit = Lowbit(file, bits, recall, thresholds, model.spec.activation)
    lowbit.load()
    return lowbit


def _write(path: Path, model: PackedModel, bits: int, parts: tuple[str, ...], shape: tuple[int, int]) -> None:
    layout, layers = model.layout, range(model.spec.layers)
    shapes: Shapes = {f"layers.{i}.lowbit": ("U8", shape) for i in layers}
    kinds = {"gate": int(layout.gate_kind), "down": int(layout.down_kind)}
    with published(path) as fd:
        write_packed(fd, model.spec, kinds, {}, shapes, ([_copied(model, i, bits, parts)] for i in layers))


def _copied(model: PackedModel, layer: int, bits: int, parts: tuple[str, ...]) -> Bytes:
    """uint8 [groups, parts, 32, bytes of a copy] of a layer."""
    groups = groups_of(model, layer)
    rows = (rows_of(model, groups, model.layout.place_of(part)[0]) for part in parts)
    return np.stack([pack_lowbit(some, bits).reshape(len(groups), GROUP, -1) for some in rows], axis=1)


def groups_of(model: PackedModel, layer: int, first: int = 0, end: int | None = None) -> Bytes:
    """uint8 [groups, group_bytes] of a layer: those from `first` to before `end`, by default all."""
    count = (model.layout.groups if end is None else end) - first
    groups = np.empty((count, model.layout.group_bytes), np.uint8)
    model.read_groups(layer, first, groups)
    return groups


def rows_of(model: PackedModel, groups: Bytes, offset: int) -> Floats:
    """Gate rows (offset 0; without a gate, the up rows) or up rows of all neurons: float32 [neurons, hidden]."""
    layout = model.layout
    bundles = groups[:, : layout.tail_offset].reshape(-1, layout.bundle_bytes)
    return unpack(bundles[:, offset : offset + layout.gate_row_bytes], layout.gate_kind, layout.hidden)
