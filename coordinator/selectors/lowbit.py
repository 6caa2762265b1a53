"""Low-bit copies of the gates, and the thresholds that make them a selector.

The copies lie in a file of their own beside the packed model, made when the selector is first used. The thresholds, one
for each neuron, are kept beside it, by the recall that they were calibrated for (`calibration.py`).
"""

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from warmfront.coordinator.packing.arrays import load_arrays, save_arrays
from warmfront.coordinator.packing.packed_file import Shapes, write_packed
from warmfront.shared.errors import ModelError, ResourceError
from warmfront.shared.files import locked, published
from warmfront.shared.kernels.lowbit import lowbit_bytes, pack_lowbit
from warmfront.shared.model.bundle import GROUP
from warmfront.shared.model.formats import unpack
from warmfront.shared.model.store import PackedModel

__all__ = ["Lowbit", "groups_of", "open_lowbit", "rows_of"]

Floats = npt.NDArray[np.float32]
Bytes = npt.NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class Lowbit:
    """A model's copies and thresholds, for one recall."""

    # The copies.
    file: PackedModel
    # Of a weight: 1, 2 or 4.
    bits: int
    # By mass: see `calibration.py`.
    recall: float
    # float32 [layers, neurons], NaN until calibrated.
    thresholds: Floats
    # That of the model, on which what a neuron weighs depends.
    activation: str

    @property
    def calibrated(self) -> bool:
        """Whether the thresholds are known."""
        return not np.isnan(self.thresholds).any()

    @property
    def _kept(self) -> Path:
        return self.file.path.with_suffix(f".{self.recall:g}-{self.activation}.npz")

    def load(self) -> None:
        """Take the thresholds of an earlier calibration, if there was one."""
        kept = load_arrays(self._kept).get("thresholds")
        self.thresholds[:] = kept if kept is not None and kept.shape == self.thresholds.shape else np.nan

    def save(self, say: Callable[[str], None]) -> None:
        """Keep the thresholds; `say` gets a line where the cache cannot be written."""
        try:
            save_arrays(self._kept, thresholds=self.thresholds)
        except OSError as error:
            say(f"cannot keep the thresholds in {self._kept}: {error.strerror}; they are calibrated again next time")


def open_lowbit(model: PackedModel, bits: int, recall: float, say: Callable[[str], None]) -> Lowbit:
    """The copies of `model`'s gates, in the order of its neurons, made now if the cache has none."""
    order = f"-{model.order}" if model.order else ""
    path = model.path.with_name(f"{model.path.stem}-lowbit{bits}{order}.safetensors")
    file = _opened(path)
    if file is None:
        try:
            with locked(path, say):
                if (file := _opened(path)) is None:
                    say(f"making {bits}-bit copies of the gates")
                    _write(path, model, bits)
                    file = PackedModel(path)
        except OSError as error:
            raise ResourceError(f"cannot write {bits}-bit copies to {path.parent}: {error.strerror}") from error
    thresholds = np.empty((model.spec.layers, model.layout.groups * GROUP), np.float32)
    lowbit = Lowbit(file, bits, recall, thresholds, model.spec.activation)
    lowbit.load()
    return lowbit


def _opened(path: Path) -> PackedModel | None:
    """None if it has to be made."""
    with contextlib.suppress(ModelError):
        return PackedModel(path)
    return None


def _write(path: Path, model: PackedModel, bits: int) -> None:
    layout, layers = model.layout, range(model.spec.layers)
    shape = (layout.groups * GROUP, lowbit_bytes(bits, layout.hidden))
    shapes: Shapes = {f"layers.{i}.lowbit": ("U8", shape) for i in layers}
    kinds = {"gate": int(layout.gate_kind), "down": int(layout.down_kind)}
    copies = (pack_lowbit(rows_of(model, groups_of(model, i), 0), bits) for i in layers)
    with published(path) as fd:
        write_packed(fd, model.spec, kinds, {}, shapes, copies)


def groups_of(model: PackedModel, layer: int) -> Bytes:
    """uint8 [groups, group_bytes] of a layer."""
    groups = np.empty((model.layout.groups, model.layout.group_bytes), np.uint8)
    model.read_groups(layer, 0, groups)
    return groups


def rows_of(model: PackedModel, groups: Bytes, offset: int) -> Floats:
    """Gate rows (offset 0; without a gate, the up rows) or up rows of all neurons."""
    layout = model.layout
    bundles = groups[:, : layout.tail_offset].reshape(-1, layout.bundle_bytes)
    return unpack(bundles[:, offset : offset + layout.gate_row_bytes], layout.gate_kind, layout.hidden)
