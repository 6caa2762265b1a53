"""The packed model: one safetensors file in the cache, ready to be read into place.

Tensors:
    embed, head, positions,              U8 [rows, row_bytes]: packed rows (`formats.py`); head is absent when tied,
    layers.{i}.{q,k,v,o}                 positions unless they are learned
    layers.{i}.router                    U8 [rows, row_bytes]: float32 rows of the experts' router, then that of a
                                         shared expert's gate, then zeros up to a multiple of 16; absent without experts
    layers.{i}.ffn                       U8 [groups, group_bytes]: neuron bundles (`bundle.py`), by `branches.py`; of a
                                         layer without experts in a mixture fewer groups
    layers.{i}.fc1                       U8 [r, row_bytes]: packed rows of the predictor, of several experts r each, and
    layers.{i}.fc2                       U8 [32 * groups, row_bytes]: rows of r weights; r is a layer's own, with zeros
                                         up to a multiple of 32; absent in models without predictors (`spec.py`)
    layers.{i}.{fc1,fc2}.bias            F32 [r], [32 * groups], where predictors have them
    norm, layers.{i}.{attn_norm,ffn_norm,...}, ...bias    F32 [n]
    largest                              F32 [layers * matrices]: no weight of gate (if there is one), up and down of a
                                         layer is larger in magnitude, nor a bias of gate and up
    tokenizer                            U8 [n]: `coordinator/models/packed_tokenizer.py` (absent if the model had none)
    profile                              U16 [layers, segments, neurons]: how often each neuron fired, by segment of the
                                         text that was counted (absent until then; `profile/counts.py`)
    places                               U32 [layers, neurons]: the published index of the neuron at each place (absent
                                         until then)
    sums                                 U64 [n + 2], the last tensor: a checksum of each piece of the others in order
                                         (`sums_of`); CRC-32 of the header; CRC-32 of this tensor up to here
Metadata (strings):
    format     `FORMAT`
    spec       JSON of `ModelSpec`
    kinds      JSON: weight type of each U8 matrix by name; `gate` and `down` for the bundles
    text       JSON: chat template, end-of-text ids and the like
    profile    JSON: on what the profile was counted
    plausible  JSON: the activations that are plausible by the model's files, the one of the spec first
    order      identifies the order of the neurons, in which the rows of ffn, fc2, its bias and profile lie; absent: as
               published

What is checked, and when: header, sizes and norms whenever the file is opened; every other piece whenever it is read,
before anything is computed with it. A piece is a group of bundles, eight packed rows, or any other tensor as a whole.
The checksums find what a power cut or a bad disk does to a file: zeroed or foreign pages, a flipped bit, a lost end.
They are fast, not cryptographic: whoever can write to the cache can also forge them. So the spec is validated too.

The file is read with plain reads into memory that the reader has placed, not mapped: so its pages lie on the reader's
NUMA node and can be huge.
"""

import contextlib
import json
import os
import zlib
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import chain
from math import prod
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt

from warmfront.shared.errors import DamagedError, ModelError
from warmfront.shared.model.branches import (
    branches_of,
    groups_of,
    has_experts,
    layout_of,
    predictors_of,
    router_rows,
    used_neurons,
)
from warmfront.shared.model.bundle import GROUP
from warmfront.shared.model.formats import Kind, row_bytes
from warmfront.shared.model.spec import ModelSpec
from warmfront.shared.model.support import check_supported
from warmfront.shared.model.tensors import layer_shapes, top_shapes
from warmfront.shared.selector import Selector, Source

__all__ = ["FORMAT", "PIECE_ROWS", "Entry", "PackedModel", "piece_bytes", "run_of", "sums_of"]

# A file of another format counts as damaged, so it is packed anew.
FORMAT = "warmfront-11"
# Bytes of an element of the tensors whose shape follows from the spec.
_ITEM_BYTES = {"U8": 1, "F32": 4}
# How the names of predictors' tensors end, and the tensors that are read once.
_PREDICTING = (".fc1", ".fc2", ".fc1.bias", ".fc2.bias")
# Rows of a matrix that have one checksum together.
PIECE_ROWS = 8
_READ_ONCE = ("tokenizer", "profile", "places", "largest")


@dataclass(frozen=True, slots=True)
class Entry:
    """One tensor of the file."""

    # Element type as safetensors calls it.
    element: str
    shape: tuple[int, ...]
    # Where in the file it starts, in bytes.
    offset: int
    nbytes: int
    # Weight type of packed rows.
    kind: Kind | None
    # Bytes that have one checksum together; the last piece may be shorter.
    piece: int
    # Index of the checksum of its first piece.
    first: int


def piece_bytes(name: str, element: str, shape: tuple[int, ...], nbytes: int) -> int:
    """Bytes of a piece of a tensor; each piece has a checksum of its own."""
    if element != "U8" or len(shape) != 2:
        return max(nbytes, 1)
    return nbytes // shape[0] * (1 if name.endswith(".ffn") else PIECE_ROWS)


def sums_of(data: npt.NDArray[np.uint8], piece: int) -> npt.NDArray[np.uint64]:
    """The checksum of every `piece` bytes of `data`, the last of them may be fewer: uint64 [pieces].

    It is the sum of the 64-bit words modulo 2^64: as fast as memory, where CRC-32 would double the time of loading.
    """
    whole = len(data) // piece if piece % 8 == 0 else 0
    rest = data[whole * piece :]
    words = data[: whole * piece].view(np.uint64).reshape(whole, piece // 8).sum(1)
    if not len(rest):
        return np.asarray(words)
    end = np.zeros(-(-len(rest) // 8) * 8, np.uint8)
    end[: len(rest)] = rest
    return np.append(words, end.view(np.uint64).sum())


class PackedModel:
    """An open packed model; a context manager.

    Raises DamagedError if the file is gone or not what was written, ModelError if it cannot be opened or its model
    is not supported. Reading a damaged piece raises DamagedError and removes the file, so that it is made again.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        # The file of a predictor that did not come with the model.
        self.predictor: PackedModel | None = None
        try:
            self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:  # another process found it damaged, or was told to remove it
            raise DamagedError(f"the packed model {path} is gone; it will be made again") from None
        except OSError as error:
            raise ModelError(f"cannot open the packed model {path}: {error.strerror}") from error
        try:
            header, body, start = self._header()
            metadata = header.pop("__metadata__")
            if metadata["format"] != FORMAT:
                raise ValueError(f"format {metadata['format']}")
            kinds = json.loads(metadata["kinds"])
            self.spec = ModelSpec.from_json(metadata["spec"])
            self.text: dict[str, Any] = json.loads(metadata["text"])
            self.order: str = metadata.get("order", "")
            self.plausible = [str(name) for name in json.loads(metadata.get("plausible", "[]"))]
            self.profile: dict[str, Any] = json.loads(metadata.get("profile", "{}"))
            self.layout = layout_of(self.spec, Kind(kinds["gate"]), Kind(kinds["down"]))
            self.entries: dict[str, Entry] = {}
            first = 0
            for name, fields in header.items():
                self.entries[name] = entry = self._entry(name, fields, start, kinds, first)
                first += -(-entry.nbytes // entry.piece)
            if max(entry.offset + entry.nbytes for entry in self.entries.values()) != os.fstat(self._fd).st_size:
                raise ValueError("wrong size")
            self._sums = self._read_sums(self.entries.pop("sums"), first - 1, body)
            for name, entry in self.entries.items():
                if entry.element == "F32":
                    self.bytes_of(name)
            check_supported(self.spec)
            self._check_shapes()
        except (ArithmeticError, AttributeError, KeyError, RecursionError, TypeError, ValueError, OSError) as error:
            self.close()
            raise DamagedError(
                f"the packed model {path} is damaged ({error}); delete it, it will be made again"
            ) from None
        except ModelError:
            self.close()
            raise

    def activate(self, name: str) -> None:
        """Compute with that activation instead of the file's, before anything else; UsageError if it cannot be."""
        self.spec = self.spec.activated(name)

    def attach(self, predictor: "PackedModel") -> None:
        """Predict by the tensors of another file, which is closed with this one, instead of by its own."""
        self.spec = replace(self.spec, predictor=predictor.spec.predictor)
        own = {name: entry for name, entry in self.entries.items() if not name.endswith(_PREDICTING)}
        self.entries = own | predictor.entries
        self.predictor = predictor

    def _header(self) -> tuple[dict[str, Any], bytes, int]:
        length = int.from_bytes(os.pread(self._fd, 8, 0), "little")
        if not 0 < length < 1 << 27:
            raise ValueError("no safetensors header")
        body = os.pread(self._fd, length, 8)
        return json.loads(body), body, 8 + length

    def _entry(self, name: str, fields: dict[str, Any], start: int, kinds: dict[str, int], sums: int) -> Entry:
        first, last = fields["data_offsets"]
        kind = Kind(kinds[name]) if name in kinds else None
        shape = tuple(fields["shape"])
        piece = piece_bytes(name, fields["dtype"], shape, last - first)
        return Entry(fields["dtype"], shape, start + first, last - first, kind, piece, sums)

    def _check_shapes(self) -> None:
        """Raise ValueError unless the tensors are as large as the spec says: compiled code relies on it."""
        matrices = len(self.spec.architecture.feed_forward.matrices)
        top, parts = top_shapes(self.spec) | {"largest": (self.spec.layers * matrices,)}, layer_shapes(self.spec)
        for name, entry in self.entries.items():
            *layer, part = name.split(".", 2) if name.startswith("layers.") else [name]
            shape: tuple[int, ...] | None = (parts if layer else top).get(part)
            if layer and part == "router":
                shape = router_rows(self.spec), self._row_bytes(name, self.spec.hidden)
            elif layer and part in ("router.bias", "down.bias"):
                shape = (self._biases(part),)
            elif layer and part in ("ffn", "fc1", "fc2", "fc1.bias", "fc2.bias"):
                shape = self._neuron_shape(".".join(layer), part)
            elif shape is not None and len(shape) == 2:
                shape = shape[0], self._row_bytes(name, shape[1])
            if shape is not None and (shape != entry.shape or prod(shape) * _ITEM_BYTES[entry.element] != entry.nbytes):
                raise ValueError(f"tensor {name} has shape {entry.shape} and {entry.nbytes} bytes, not shape {shape}")
        last = f"layers.{self.spec.layers - 1}.ffn"
        routers = (f"layers.{layer}.router" for layer in range(self.spec.layers) if has_experts(self.spec, layer))
        # A file of copies of the gates has none of them.
        for name in chain((last,), routers) if "embed" in self.entries else ():
            if name not in self.entries:
                raise ValueError(f"tensor {name} is missing")
        if last in self.entries and "largest" not in self.entries:
            raise ValueError("tensor largest is missing")

    def _biases(self, part: str) -> int:
        """How many numbers the biases of the router, or of the down matrices of all branches, are."""
        return router_rows(self.spec) if part == "router.bias" else len(branches_of(self.spec)) * self.spec.hidden

    def _neuron_shape(self, layer: str, part: str) -> tuple[int, ...]:
        """What shape the bundles (ffn) or a predictor's matrix must have; the predictor's rank is that of fc1."""
        if part == "ffn":
            return groups_of(self.spec, int(layer.split(".")[1])), self.layout.group_bytes
        predictors = predictors_of(self.spec)
        rank = self.entries[f"{layer}.fc1"].shape[0] // predictors
        if part.endswith(".bias"):
            return (predictors * rank if part == "fc1.bias" else self.layout.groups * GROUP,)
        rows, cols = (predictors * rank, self.spec.hidden) if part == "fc1" else (self.layout.groups * GROUP, rank)
        return rows, self._row_bytes(f"{layer}.{part}", cols)

    def _row_bytes(self, name: str, cols: int) -> int:
        kind = self.entries[name].kind
        if kind is None:
            raise ValueError(f"tensor {name} has no weight type")
        return row_bytes(kind, cols)

    def _read_sums(self, entry: Entry, count: int, body: bytes) -> npt.NDArray[np.uint64]:
        data = os.pread(self._fd, entry.nbytes, entry.offset)
        sums = np.frombuffer(data, np.uint64)
        if len(sums) != count + 2 or zlib.crc32(data[:-8]) != sums[-1] or zlib.crc32(body) != sums[-2]:
            raise ValueError("header or sums")
        return sums[:-2]

    def resident(self, selector: Selector) -> list[str]:
        """Names of the tensors that the coordinator holds: all but bundles and predictors that are not used."""
        idle = (".ffn", *(() if Source.LOWRANK in selector.sources else _PREDICTING))
        return [name for name in self.entries if not name.endswith(idle) and name not in _READ_ONCE]

    def read_into(self, name: str, out: npt.NDArray[np.uint8], start: int = 0) -> None:
        """Fill `out` (contiguous bytes) from byte `start` of tensor `name`; whole pieces of it are checked."""
        if self.predictor is not None and name in self.predictor.entries:
            self.predictor.read_into(name, out, start)
            return
        entry, data = self.entries[name], out.reshape(-1)
        view, offset = data.data, entry.offset + start
        while view:
            count = os.preadv(self._fd, [view[: 1 << 30]], offset)
            if count == 0:
                raise DamagedError(f"the packed model {self.path} is truncated; delete it, it will be made again")
            view, offset = view[count:], offset + count
        first, end = -(-start // entry.piece), start + len(data)
        last = -(-end // entry.piece) if end == entry.nbytes else end // entry.piece
        if first < last:
            sums = sums_of(data[first * entry.piece - start : last * entry.piece - start], entry.piece)
            if not np.array_equal(sums, self._sums[entry.first + first : entry.first + last]):
                raise self.discarded(name)

    def discarded(self, name: str) -> DamagedError:
        """The error for a tensor that is not what was written; removes the file, unless it has been replaced."""
        with contextlib.suppress(OSError):
            if os.fstat(self._fd).st_nlink:
                self.path.unlink()
        return DamagedError(f"the packed model {self.path} is damaged ({name}); it has to be made again")

    def bytes_of(self, name: str) -> npt.NDArray[np.uint8]:
        """All bytes of tensor `name`."""
        out = np.empty(self.entries[name].nbytes, np.uint8)
        self.read_into(name, out)
        return out

    def floats(self, name: str) -> npt.NDArray[np.float32]:
        """A float32 vector of the file (norms, biases)."""
        return self.bytes_of(name).view(np.float32)

    @cached_property
    def reach(self) -> npt.NDArray[np.float64]:
        """Float64 [layers]: neurons that a token may use, times the largest magnitudes in gate, up and down, or in
        down and of a bounded activation (`exact_sums.inverse_unit`)."""
        largest = self.floats("largest").astype(np.float64).reshape(self.spec.layers, -1)
        feed_forward = self.spec.architecture.feed_forward
        if feed_forward.most is not None:
            return np.asarray(used_neurons(self.spec) * largest[:, -1] * feed_forward.most)
        squared = largest[:, 0] if feed_forward.activation == "relu2" else 1
        return np.asarray(used_neurons(self.spec) * largest.prod(1) * squared)

    def places(self) -> npt.NDArray[np.int64]:
        """The published index of the neuron at each place: int64 [layers, neurons]."""
        shape = (self.spec.layers, self.layout.groups * GROUP)
        if "places" not in self.entries:
            return np.broadcast_to(np.arange(shape[1]), shape)
        return self.bytes_of("places").view(np.uint32).reshape(shape).astype(np.int64)

    @cached_property
    def groups(self) -> list[int]:
        """The groups of each layer that have weights."""
        return [groups_of(self.spec, layer) for layer in range(self.spec.layers)]

    def read_groups(self, layer: int, first: int, out: npt.NDArray[np.uint8]) -> None:
        """Fill `out`, uint8 [n, group_bytes], with groups first .. first + n - 1 of `layer`.

        Of those that have no weights (`branches.groups_of`), it stays as it is: nothing uses them.
        """
        assert out.shape[1] == self.layout.group_bytes
        have = max(self.groups[layer] - first, 0)
        self.read_into(f"layers.{layer}.ffn", out[:have], first * self.layout.group_bytes)

    def placed_groups(self) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.uint64]]:
        """Where the groups of each layer start in the file, int64 [layers], and the checksum of each group, uint64
        [layers, groups]: for who reads them from `fileno` himself."""
        starts = np.zeros(self.spec.layers, np.int64)
        sums = np.zeros((self.spec.layers, self.layout.groups), np.uint64)
        for layer in range(self.spec.layers):
            entry = self.entries[f"layers.{layer}.ffn"]
            starts[layer] = entry.offset
            sums[layer, : self.groups[layer]] = self._sums[entry.first : entry.first + self.groups[layer]]
        return starts, sums

    def fileno(self) -> int:
        """The descriptor of the open file."""
        return self._fd

    def close(self) -> None:
        """Close the file."""
        if self.predictor is not None:
            self.predictor.close()
        os.close(self._fd)

    def __enter__(self) -> "PackedModel":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


def run_of(places: npt.NDArray[np.int64]) -> int:
    """How many of `places` [n, (layer, group)], from the first on, lie next to each other in the file."""
    step = np.any(places - places[0] != np.stack((np.zeros(len(places)), np.arange(len(places))), axis=1), axis=1)
    return int(np.argmax(step)) if step.any() else len(places)
