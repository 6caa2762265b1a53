"""The packed model: one safetensors file in the cache, ready to be read into place.

Tensors:
    embed, head, layers.{i}.{q,k,v,o}    U8 [rows, row_bytes]: packed rows (`weights.py`); head is absent when tied
    layers.{i}.ffn                       U8 [groups, group_bytes]: neuron bundles (`bundle.py`)
    layers.{i}.fc1                       U8 [r, row_bytes]: packed rows of the predictor, and
    layers.{i}.fc2                       U8 [32 * groups, row_bytes]: rows of r weights; r is a layer's own, with zeros
                                         up to a multiple of 32; absent in models without predictors (`model.py`)
    norm, layers.{i}.{attn_norm,ffn_norm}, ...bias    F32 [n]
    tokenizer                            U8 [n]: the text of a tokenizer.json (absent if the model had none)
    profile                              U16 [layers, segments, neurons]: how often each neuron fired, by segment of the
                                         text that it was counted on (absent until then: `coordinator/profile.py`)
Metadata (strings): format, spec (JSON of ModelSpec), kinds (JSON: name -> weight type of each U8 matrix; `gate` and
`down` for the bundles), text (JSON: chat template, end-of-text ids and the like), profile (JSON: what it was counted
on), order (which order the neurons are in; absent: the makers'). The rows of ffn, fc2 and profile are in that order.

The file is read with plain reads into memory that the reader placed, not mapped: so pages lie on the reader's NUMA
node and can be huge.
"""

import json
import os
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt

from warmfront.shared.bundle import BundleLayout
from warmfront.shared.errors import ModelError
from warmfront.shared.model import ModelSpec
from warmfront.shared.weights import Kind

__all__ = ["FORMAT", "Entry", "PackedModel", "run_of"]

FORMAT = "warmfront-4"


@dataclass(frozen=True, slots=True)
class Entry:
    """One tensor of the file: its element type, shape and extent in bytes and, for packed rows, its weight type."""

    element: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int
    kind: Kind | None


class PackedModel:
    """An open packed model; a context manager. Raises ModelError if `path` is not a complete one."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise ModelError(f"cannot open the packed model {path}: {error.strerror}") from error
        try:
            header, start = self._header()
            metadata = header.pop("__metadata__")
            if metadata["format"] != FORMAT:
                raise ValueError(f"format {metadata['format']}")
            kinds = json.loads(metadata["kinds"])
            self.spec = ModelSpec.from_json(metadata["spec"])
            self.text: dict[str, Any] = json.loads(metadata["text"])
            self.order: str = metadata.get("order", "")
            self.profile: dict[str, Any] = json.loads(metadata.get("profile", "{}"))
            self.layout = BundleLayout(
                hidden=self.spec.hidden,
                ffn=self.spec.ffn,
                gate_kind=Kind(kinds["gate"]),
                down_kind=Kind(kinds["down"]),
            )
            self.entries = {name: self._entry(name, fields, start, kinds) for name, fields in header.items()}
            end = max(entry.offset + entry.nbytes for entry in self.entries.values())
            if end != os.fstat(self._fd).st_size:
                raise ValueError("wrong size")
        except (AttributeError, KeyError, TypeError, ValueError, OSError) as error:
            self.close()
            raise ModelError(
                f"the packed model {path} is damaged ({error}); delete it, it will be made again"
            ) from None

    def _header(self) -> tuple[dict[str, Any], int]:
        length = int.from_bytes(os.pread(self._fd, 8, 0), "little")
        if not 0 < length < 1 << 27:
            raise ValueError("no safetensors header")
        return json.loads(os.pread(self._fd, length, 8)), 8 + length

    def _entry(self, name: str, fields: dict[str, Any], start: int, kinds: dict[str, int]) -> Entry:
        first, last = fields["data_offsets"]
        kind = Kind(kinds[name]) if name in kinds else None
        return Entry(fields["dtype"], tuple(fields["shape"]), start + first, last - first, kind)

    def read_into(self, name: str, out: npt.NDArray[np.uint8], start: int = 0) -> None:
        """Fill `out` (contiguous bytes) from byte `start` of tensor `name`."""
        entry = self.entries[name]
        view, offset = out.reshape(-1).data, entry.offset + start
        while view:
            count = os.preadv(self._fd, [view[: 1 << 30]], offset)
            if count == 0:
                raise ModelError(f"the packed model {self.path} is truncated; delete it, it will be made again")
            view, offset = view[count:], offset + count

    def bytes_of(self, name: str) -> npt.NDArray[np.uint8]:
        """All bytes of tensor `name`."""
        out = np.empty(self.entries[name].nbytes, np.uint8)
        self.read_into(name, out)
        return out

    def floats(self, name: str) -> npt.NDArray[np.float32]:
        """A float32 vector of the file (norms, biases)."""
        return self.bytes_of(name).view(np.float32)

    def read_groups(self, layer: int, first: int, out: npt.NDArray[np.uint8]) -> None:
        """Fill `out`, uint8 [n, group_bytes], with groups first .. first + n - 1 of `layer`."""
        assert out.shape[1] == self.layout.group_bytes
        self.read_into(f"layers.{layer}.ffn", out, first * self.layout.group_bytes)

    def close(self) -> None:
        """Close the file."""
        os.close(self._fd)

    def __enter__(self) -> "PackedModel":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


def run_of(places: npt.NDArray[np.int64]) -> int:
    """How many of `places` [n, (layer, group)], from the first on, lie one after the other in the file."""
    step = np.any(places - places[0] != np.stack((np.zeros(len(places)), np.arange(len(places))), axis=1), axis=1)
    return int(np.argmax(step)) if step.any() else len(places)
