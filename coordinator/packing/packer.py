"""Packing: from a published model to the packed file that every process reads (`shared/model/store.py`).

Done once for each content (`content.py`) and weight type. A second run waits for the first and uses its result. A file
that is damaged, or of another version of the format, is packed anew.

Tensors are made and written some 16 million weights at a time, so that packing needs some hundred MB however large the
model is; only what is rounded as a whole (`coordinator/quantising`) needs more. A run that was killed has left what it
had written: the next one checks that and goes on behind it (`packed_file.py`).
"""

import json
import math
import os
import re
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from warmfront.coordinator.models.hf.folder import folder_name
from warmfront.coordinator.models.open import open_source
from warmfront.coordinator.models.packed_tokenizer import pack_tokenizer
from warmfront.coordinator.models.source import Source, SourceTensor, padded, rows_at_once
from warmfront.coordinator.packing.content import content_of, state_of
from warmfront.coordinator.packing.packed_file import Shapes, tensor_bytes, write_packed
from warmfront.shared.errors import DamagedError, ModelError, ResourceError
from warmfront.shared.files import locked, make_folder, published
from warmfront.shared.model.branches import (
    branches_of,
    groups_of,
    has_experts,
    layout_of,
    parts_of,
    predictors_of,
    router_rows,
)
from warmfront.shared.model.bundle import GROUP
from warmfront.shared.model.formats import Kind, largest, largest_of_blocks, row_bytes
from warmfront.shared.model.store import PIECE_ROWS, PackedModel
from warmfront.shared.model.support import check_supported
from warmfront.shared.model.tensors import file_shapes
from warmfront.shared.paths import cache_root

__all__ = [
    "FITTED",
    "PackingPlan",
    "ensure_packed",
    "kind_for",
    "mended",
    "pack_source",
    "predictor_kind",
    "predictor_rows",
]

Progress = Callable[[int, int], None]
Bytes = npt.NDArray[np.uint8]
T = TypeVar("T")
# The `--dtype` whose 4 bits are fitted, not the nearest: `coordinator/quantising` says how.
FITTED = "q4f"
Refined = Callable[[Source], AbstractContextManager[Source]]


def ensure_packed(
    path: Path, dtype: str, say: Callable[[str], None], progress: Progress, refined: Refined | None = None
) -> Path:
    """The packed file of the model at `path`; it is made now if the cache has none, or a damaged one.

    `refined`: makes of the model's source the one that is packed as it is; without it weights are rounded to `dtype`.
    `say` gets lines for the user, `progress` (bytes done, bytes in all). Raises ModelError for a model that cannot be
    read or is not supported, ResourceError if the cache has no room.
    """
    folder, content = cache_root() / "models", content_of(path, say)
    name = re.sub(r"[^A-Za-z0-9._]+", "-", folder_name(path) if path.is_dir() else path.stem).strip("-.")[:60]
    target = folder / f"{name or 'model'}-{dtype}-{content}.safetensors"
    try:
        if (fault := _fault(target)) is not None:
            make_folder(folder)
            with locked(target, say):
                if _fault(target) is not None:
                    if fault:
                        say(fault)
                    _pack(path, dtype, target, say, progress, refined)
    except OSError as error:
        raise ResourceError(
            f"cannot write the packed model to {folder}: {error.strerror}; set XDG_CACHE_HOME to a folder with room"
        ) from error
    with suppress(OSError):  # the time of last use, for `warmfront cache`
        os.utime(target, ns=(time.time_ns(), target.stat().st_mtime_ns))
    return target


def mended(use: Callable[[], T], say: Callable[[str], None]) -> T:
    """The result of `use`, which is called again, and so packs anew, if it finds that a packed file is damaged."""
    try:
        return use()
    except DamagedError as error:
        say(_anew(error))
    return use()


def _fault(target: Path) -> str | None:
    """None for a packed file that can be opened, "" if there is none that can be used, else a line about its damage."""
    if not target.exists():
        return ""
    try:
        PackedModel(target).close()
    except DamagedError as error:
        return _anew(error)
    except ModelError:
        return ""
    return None


def _anew(error: DamagedError) -> str:
    return f"{str(error).partition(';')[0]}: packing it anew"


def _pack(
    path: Path, dtype: str, target: Path, say: Callable[[str], None], progress: Progress, refined: Refined | None
) -> None:
    before = state_of(path)
    source = open_source(path)
    for note in source.notes:
        say(note)
    with (
        nullcontext(source) if refined is None else refined(source) as made,
        published(target, continued=True) as fd,
    ):
        if os.fstat(fd).st_size > 0:
            say("checking what a run that was interrupted has packed, to go on with it")
        pack_source(fd, made, dtype if refined is None else "auto", progress)
        if state_of(path) != before:
            raise ModelError(f"{path} was changed while it was packed: start again")


def pack_source(fd: int, source: Source, dtype: str, progress: Progress) -> None:
    """Write the packed file of `source`, behind what is there of it. Raises as `ensure_packed`, and OSError."""
    plan = PackingPlan(source, dtype)
    write_packed(
        fd,
        source.spec,
        plan.all_kinds(),
        plan.text(),
        plan.shapes,
        map(plan.data, plan.shapes),
        progress,
        kept=plan.note_largest,
        plausible=json.dumps(source.activations if source.activations[0] == source.spec.activation else []),
    )


class PackingPlan:
    """Which tensors the packed file has, of which weight types, and how each is made from the source.

    Raises ModelError if the model is not supported.
    """

    def __init__(self, source: Source, dtype: str) -> None:
        self.source = source
        spec = source.spec
        check_supported(spec)
        layers, neurons = range(spec.layers), spec.architecture.feed_forward.matrices
        prefixes = [f"layers.{i}.{branch.prefix}" for i in layers for branch in parts_of(spec, i)]

        # All bundles have the same layout, so their rows have the widest type of any layer and branch.
        widest = {part: min(kind_for(source.tensor(prefix + part), dtype) for prefix in prefixes) for part in neurons}
        down, gate = widest.pop("down"), min(widest.values())
        self.layout = layout_of(spec, gate, down)
        self.kinds: dict[str, Kind] = {}
        self.shapes: Shapes = {}
        published = dict(file_shapes(spec))
        for name, (rows, *cols) in published.items():
            part = name.rpartition(".")[2]
            if part == "router":
                # What it chooses jumps where two experts score alike: no weight and no input of it is ever rounded.
                self.kinds[name] = Kind.F32
                self.shapes[name] = ("U8", (router_rows(spec), row_bytes(Kind.F32, *cols)))
            elif cols and part not in (*neurons, "shared_router"):
                # A row of positions is added to every token: it is not rounded, and costs next to nothing.
                self.kinds[name] = kind_for(source.tensor(name), "auto" if name == "positions" else dtype)
                self.shapes[name] = ("U8", (rows, row_bytes(self.kinds[name], *cols)))
        if spec.predictor is not None:
            for i in layers:
                prefix = f"layers.{i}.{parts_of(spec, i)[0].prefix}"
                rank = padded(source.tensor(f"{prefix}fc1").shape[0])
                for part, rows in (("fc1", rank * predictors_of(spec)), ("fc2", self.layout.groups * GROUP)):
                    name, tensor = f"layers.{i}.{part}", source.tensor(f"{prefix}{part}")
                    self.kinds[name] = predictor_kind(tensor, dtype)
                    self.shapes[name] = ("U8", (rows, row_bytes(self.kinds[name], padded(tensor.shape[1]))))
                    if part in spec.predictor.biases:
                        self.shapes[f"{name}.bias"] = ("F32", (rows,))
        # In bundles, and joined over the branches.
        elsewhere = (*(f".{part}.bias" for part in self.layout.biases), ".down.bias", ".router.bias")
        vectors = sorted(name for name, shape in published.items() if len(shape) == 1 and not name.endswith(elsewhere))
        self.shapes |= {name: ("F32", published[name]) for name in vectors}
        feed_forward = spec.architecture.feed_forward
        for i in layers:
            if feed_forward.experts is not None and feed_forward.experts.bias:
                self.shapes[f"layers.{i}.router.bias"] = ("F32", (router_rows(spec),))
            if "down" in feed_forward.biases:
                self.shapes[f"layers.{i}.down.bias"] = ("F32", (len(branches_of(spec)) * spec.hidden,))
        self._tokenizer = b"" if source.tokenizer is None else pack_tokenizer(source.tokenizer.json)
        if self._tokenizer:
            self.shapes["tokenizer"] = ("U8", (len(self._tokenizer),))
        for i in layers:
            self.shapes[f"layers.{i}.ffn"] = ("U8", (groups_of(spec, i), self.layout.group_bytes))
        # Behind the layers, from which it is found out.
        self.shapes["largest"] = ("F32", (spec.layers * len(neurons),))
        self._largest = np.zeros((spec.layers, len(neurons)), np.float32)

    def size(self, name: str) -> int:
        """Bytes of one tensor of the packed file."""
        return tensor_bytes(*self.shapes[name])

    def all_kinds(self) -> dict[str, int]:
        """The weight types of matrices and bundles, for the metadata."""
        kinds = {name: int(kind) for name, kind in self.kinds.items()}
        return kinds | {"gate": int(self.layout.gate_kind), "down": int(self.layout.down_kind)}

    def text(self) -> dict[str, Any]:
        """How prompts begin and answers end, for the metadata."""
        if self.source.tokenizer is None:
            return {}
        return {field: value for field, value in asdict(self.source.tokenizer).items() if field != "json"}

    def data(self, name: str) -> Iterator[npt.NDArray[Any]]:
        """The bytes of one tensor of the packed file, in parts that are made as they are asked for."""
        if name.endswith(".router"):
            yield self._router(name)
        elif name.endswith((".fc1", ".fc2")):
            yield self._predictors(name)
        elif name in self.kinds:
            yield from self._matrix(self.source.tensor(name), self.kinds[name])
        elif name == "tokenizer":
            yield np.frombuffer(self._tokenizer, np.uint8)
        elif name == "largest":
            yield self._largest
        elif name.endswith(".ffn"):
            for groups in self._bundles(name.removesuffix(".ffn")):
                self.note_largest(name, groups)
                yield groups
        elif name.endswith(".down.bias"):
            yield self._down_biases(name.removesuffix("down.bias"))
        else:
            values = self.source.tensor(name).float32()
            yield np.pad(values, (0, self.shapes[name][1][0] - len(values)))

    def _matrix(self, tensor: SourceTensor, kind: Kind) -> Iterator[Bytes]:
        rows, cols = tensor.shape
        at_once = rows_at_once(cols, math.lcm(tensor.step, PIECE_ROWS))
        for start in range(0, rows, at_once):
            yield tensor.packed(kind, start, start + at_once)

    def _predictors(self, name: str) -> Bytes:
        """The packed rows of a matrix of a layer's predictors, one predictor behind the other, each from a whole group.

        Raises ModelError for one of zeros.
        """
        (layer, _, part), spec = name.rpartition("."), self.source.spec
        names = (f"{layer}.{branch.prefix}{part}" for branch in parts_of(spec, int(layer.split(".")[1])))
        return np.concatenate(
            [
                predictor_rows(self.source.tensor(each), self.kinds[name], f"{spec.name}: the predictor's {each}")
                for each in names
            ]
        )

    def _router(self, name: str) -> Bytes:
        scores = [name, f"{name.removesuffix('router')}shared_router"]
        rows = [self.source.tensor(each).packed(Kind.F32) for each in scores if each in self.source.names()]
        return _with_rows(np.concatenate(rows), self.shapes[name][1][0])

    def _down_biases(self, layer: str) -> npt.NDArray[np.float32]:
        """The biases of down of all branches of a layer, one behind the other; of a layer without experts in a mixture
        that of the first one, which every token uses."""
        spec, number = self.source.spec, int(layer.split(".")[1])
        rows = np.zeros((len(branches_of(spec)), spec.hidden), np.float32)
        first = int(has_experts(spec, number) and branches_of(spec)[0].neurons == 0)
        for row, branch in enumerate(parts_of(spec, number), first):
            rows[row] = self.source.tensor(f"{layer}{branch.prefix}down.bias").float32()
        return rows.reshape(-1)

    def _bundles(self, layer: str) -> Iterator[Bytes]:
        """A layer's groups, uint8 [groups, group_bytes], some of one branch at a time."""
        for branch in parts_of(self.source.spec, int(layer.removeprefix("layers."))):
            yield from self._groups(f"{layer}.{branch.prefix}")

    def _groups(self, prefix: str) -> Iterator[Bytes]:
        """The same of the branch with that prefix."""
        layout, parts = self.layout, self.source.spec.architecture.feed_forward.matrices
        tensors = {part: self.source.tensor(prefix + part) for part in parts}
        biases = {part: self.source.tensor(f"{prefix}{part}.bias").float32() for part in layout.biases}
        tails = tensors["down"].column_scales().view(np.uint8) if layout.down_kind == Kind.Q4C else None
        neurons = tensors["down"].shape[0]
        at_once = rows_at_once(layout.hidden, math.lcm(GROUP, *(tensor.step for tensor in tensors.values())))
        for start in range(0, neurons, at_once):
            stop = min(start + at_once, neurons)
            first, last = start // GROUP, -(-stop // GROUP)
            out = np.zeros((last - first, layout.group_bytes), np.uint8)
            bundles = out[:, : layout.tail_offset].reshape(len(out), GROUP, layout.bundle_bytes)
            for part, tensor in tensors.items():
                at, kind = layout.place_of(part)
                rows = _with_rows(tensor.packed(kind, start, stop), len(out) * GROUP)
                bundles[:, :, at : at + rows.shape[1]] = rows.reshape(len(out), GROUP, -1)
            for part, values in biases.items():
                some = np.pad(values[start:stop], (0, len(out) * GROUP - (stop - start)))
                at = layout.bias_offset(part)
                bundles[:, :, at : at + 4] = some.view(np.uint8).reshape(len(out), GROUP, 4)
            if tails is not None:
                out[:, layout.tail_offset : layout.tail_offset + 4 * layout.hidden] = tails[first:last].reshape(
                    len(out), -1
                )
            yield out

    def note_largest(self, name: str, data: Bytes) -> None:
        """Take account of the largest magnitudes in a part of tensor `name` as it is in the file, if it has neurons."""
        if not name.endswith(".ffn"):
            return
        layout, most = self.layout, self._largest[int(name.split(".")[1])]
        groups = data.reshape(-1, layout.group_bytes)
        bundles = groups[:, : layout.tail_offset].reshape(-1, layout.bundle_bytes)
        for i, part in enumerate(self.source.spec.architecture.feed_forward.matrices):
            at, kind = layout.place_of(part)
            if kind == Kind.Q4C:
                tails = groups[:, layout.tail_offset : layout.tail_offset + 4 * layout.hidden]
                scales = np.ascontiguousarray(tails).view(np.float16).reshape(len(groups), 2, -1)
                most[i] = max(most[i], largest_of_blocks(scales[:, 0], scales[:, 1]))
                continue
            rows = np.ascontiguousarray(bundles[:, at : at + row_bytes(kind, layout.hidden)])
            most[i] = max(most[i], largest(rows, kind, layout.hidden))
            if at := layout.bias_offset(part):
                # As if it were the weight of one more feature, which is 1 (`kernels/exact_sums.py`).
                biases = np.ascontiguousarray(bundles[:, at : at + 4]).view(np.float32)
                most[i] = max(most[i], float(np.abs(biases).max()))


def predictor_kind(tensor: SourceTensor, dtype: str) -> Kind:
    """The weight type of a predictor's matrix: with four bits it would miss neurons that fire."""
    return Kind.Q8 if dtype in ("q4", FITTED) else kind_for(tensor, dtype)


def predictor_rows(tensor: SourceTensor, kind: Kind, label: str) -> Bytes:
    """The packed rows of a predictor's matrix, and zero rows up to a whole group.

    Raises ModelError, with `label`, for one of zeros, with which nothing would fire.
    """
    rows = tensor.packed(kind)
    if largest(rows, kind, padded(tensor.shape[1])) == 0:
        raise ModelError(f"{label} holds only zeros, it would choose no neuron; use the model without its predictors")
    return _with_rows(rows, padded(len(rows)))


def kind_for(tensor: SourceTensor, dtype: str) -> Kind:
    """The weight type of a matrix with `dtype`; one that has 4 bits already is not rounded again."""
    if dtype == "auto" or (dtype in ("q4", FITTED) and tensor.kind >= Kind.Q4):
        return tensor.kind
    return Kind.Q4S if dtype in ("q4", FITTED) else Kind[dtype.upper()]


def _with_rows(rows: Bytes, count: int) -> Bytes:
    """Packed rows, and zero rows up to `count`."""
    if len(rows) == count:
        return rows
    return np.concatenate((rows, np.zeros((count - len(rows), rows.shape[1]), np.uint8)))
