"""Packing: from a model as its makers publish it to the packed file that every process reads (`store.py`).

Done once per model, content and weight type. The file is written without a name (O_TMPFILE) and linked into the
cache when complete, so that a killed run leaves nothing; a lock on the folder makes a second run wait for the first
and use its result.
"""

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from warmfront.coordinator.source import Source, SourceTensor, model_files, open_source, padded
from warmfront.shared.bundle import GROUP, BundleLayout
from warmfront.shared.errors import ModelError, ResourceError
from warmfront.shared.model import ModelSpec
from warmfront.shared.paths import cache_root
from warmfront.shared.store import FORMAT
from warmfront.shared.weights import Kind, row_bytes

__all__ = [
    "PackingPlan",
    "Shapes",
    "ensure_packed",
    "locked",
    "packed_header",
    "published",
    "tensor_bytes",
    "write_tensors",
]

MATRICES = ("q", "k", "v", "o")
Progress = Callable[[int, int], None]
Bytes = npt.NDArray[np.uint8]
# Of the packed file's tensors, by name: element type as safetensors calls it, and shape.
Shapes = dict[str, tuple[str, tuple[int, ...]]]


def ensure_packed(path: Path, dtype: str, say: Callable[[str], None], progress: Progress) -> Path:
    """The packed form of the model at `path`, made now if the cache has none.

    `say` gets a line for each thing worth knowing, `progress` (bytes done, bytes in all). Raises ModelError for a
    file that cannot be read, ResourceError when the cache has no room.
    """
    folder = cache_root() / "models"
    target = folder / f"{path.stem[:60]}-{dtype}-{_fingerprint(path, dtype)}.safetensors"
    if target.exists():
        return target
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with locked(folder, say):
            if not target.exists():
                source = open_source(path)
                for note in source.notes:
                    say(note)
                with published(target) as fd:
                    _write(fd, source, dtype, progress)
    except OSError as error:
        raise ResourceError(
            f"cannot write the packed model to {folder}: {error.strerror}; set XDG_CACHE_HOME to a folder with room"
        ) from error
    return target


def _fingerprint(path: Path, dtype: str) -> str:
    """A digest of what identifies the content without reading all of it: names, sizes, times and samples."""
    digest = hashlib.sha256(f"{FORMAT} {dtype}".encode())
    try:
        for file in model_files(path):
            with file.open("rb") as stream:
                status = os.fstat(stream.fileno())
                digest.update(f"{file.name} {status.st_size} {status.st_mtime_ns}".encode())
                for part in range(32):
                    stream.seek(status.st_size * part // 32)
                    digest.update(stream.read(4096))
    except OSError as error:
        raise ModelError(f"cannot read {error.filename}: {error.strerror}") from error
    return digest.hexdigest()[:20]


@contextlib.contextmanager
def locked(folder: Path, say: Callable[[str], None]) -> Iterator[None]:
    """Only one process at a time packs into `folder`."""
    fd = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say("waiting for another warmfront that is packing a model")
            fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)


@contextlib.contextmanager
def published(target: Path) -> Iterator[int]:
    """A file descriptor whose file appears as `target` when the block ends well, and never else.

    It takes the place of a `target` that is there; who has that open keeps it. Call it within `locked`.
    """
    partial = target.with_suffix(".partial")
    try:
        fd = os.open(target.parent, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o644)
        named = False
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.EISDIR, errno.EINVAL):
            raise
        fd = os.open(partial, os.O_CREAT | os.O_TRUNC | os.O_RDWR | os.O_CLOEXEC, 0o644)
        named = True
    try:
        yield fd
        if not named:
            try:
                _link(fd, target)
            except FileExistsError:  # only a rename replaces a file, and that needs a name to begin with
                partial.unlink(missing_ok=True)
                _link(fd, partial)
                named = True
        if named:
            partial.rename(target)
    except BaseException:
        if named:
            partial.unlink(missing_ok=True)
        raise
    finally:
        os.close(fd)


def _link(fd: int, name: Path) -> None:
    """Name a nameless file. src_dir_fd only makes Python call linkat(), which follows the link to it."""
    os.link(f"/proc/self/fd/{fd}", name, src_dir_fd=fd, follow_symlinks=True)


def _write(fd: int, source: Source, dtype: str, progress: Progress) -> None:
    plan = PackingPlan(source, dtype)
    write_tensors(fd, plan.header(), map(plan.data, plan.shapes), plan.nbytes, progress)


def write_tensors(
    fd: int, header: bytes, tensors: Iterable[npt.NDArray[Any]], nbytes: int, progress: Progress = lambda *_: None
) -> None:
    """Write a whole file: the header, then the tensors, `nbytes` in all, one after the other."""
    total = len(header) + nbytes
    os.posix_fallocate(fd, 0, total)
    _write_all(fd, header, 0)
    done = len(header)
    for data in tensors:
        _write_all(fd, data.reshape(-1).view(np.uint8).data, done)
        done += data.nbytes
        progress(done, total)


def _write_all(fd: int, data: bytes | memoryview, offset: int) -> None:
    view = memoryview(data)
    while view:
        count = os.pwrite(fd, view[: 1 << 30], offset)
        view, offset = view[count:], offset + count


def tensor_bytes(element: str, shape: tuple[int, ...]) -> int:
    """Bytes of a tensor of the packed file."""
    return int(np.prod(shape)) * {"F32": 4, "U16": 2, "U8": 1}[element]


def packed_header(
    spec: ModelSpec, kinds: Mapping[str, int], text: Mapping[str, Any], shapes: Shapes, **more: str
) -> bytes:
    """The safetensors header: length, then JSON padded to 8 bytes. `more` goes into the metadata too."""
    metadata = {"format": FORMAT, "spec": spec.to_json(), "kinds": json.dumps(kinds), "text": json.dumps(text)}
    fields: dict[str, Any] = {"__metadata__": metadata | more}
    offset = 0
    for name, (element, shape) in shapes.items():
        end = offset + tensor_bytes(element, shape)
        fields[name] = {"dtype": element, "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    body = json.dumps(fields).encode()
    body += b" " * (-len(body) % 8)
    return struct.pack("<Q", len(body)) + body


class PackingPlan:
    """Which tensors the packed file has, in which weight types, and how each is made from the source."""

    def __init__(self, source: Source, dtype: str) -> None:
        self.source = source
        self.names = set(source.names())
        self._check()
        spec = source.spec
        layers = range(spec.layers)

        # The widest that any layer has: all bundles are alike.
        gate = min(_kind(source.tensor(f"layers.{i}.{part}"), dtype) for i in layers for part in ("gate", "up"))
        down = min(_kind(source.tensor(f"layers.{i}.down"), dtype) for i in layers)
        self.layout = BundleLayout(hidden=spec.hidden, ffn=spec.ffn, gate_kind=gate, down_kind=down)
        self.kinds: dict[str, Kind] = {}
        self.shapes: Shapes = {}
        matrices = ["embed", *(["head"] if "head" in self.names else [])]
        matrices += [f"layers.{i}.{part}" for i in layers for part in MATRICES]
        for name in matrices:
            tensor = source.tensor(name)
            self.kinds[name] = _kind(tensor, dtype)
            self.shapes[name] = ("U8", (tensor.shape[0], row_bytes(self.kinds[name], tensor.shape[1])))
        if spec.predictor is not None:
            for i in layers:
                rank = padded(source.tensor(f"layers.{i}.fc1").shape[0])
                for part, rows in (("fc1", rank), ("fc2", self.layout.groups * GROUP)):
                    name, tensor = f"layers.{i}.{part}", source.tensor(f"layers.{i}.{part}")
                    # Four bits would miss neurons that fire.
                    self.kinds[name] = Kind.Q8 if dtype == "q4" else _kind(tensor, dtype)
                    self.shapes[name] = ("U8", (rows, row_bytes(self.kinds[name], padded(tensor.shape[1]))))
        for name in sorted(self.names):
            if name.endswith(("norm", ".bias")):
                self.shapes[name] = ("F32", tuple(source.tensor(name).shape))
        if source.tokenizer is not None:
            self.shapes["tokenizer"] = ("U8", (len(source.tokenizer.json.encode()),))
        for i in layers:
            self.shapes[f"layers.{i}.ffn"] = ("U8", (self.layout.groups, self.layout.group_bytes))

    def _check(self) -> None:
        biased = [n for n in self.names if n.endswith((".gate.bias", ".up.bias", ".down.bias"))]
        if biased:
            raise ModelError(f"{self.source.spec.name}: feed-forward biases ({biased[0]}) are not supported yet")

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(self.size(name) for name in self.shapes)

    def size(self, name: str) -> int:
        """Bytes of one tensor of the packed file."""
        return tensor_bytes(*self.shapes[name])

    def header(self) -> bytes:
        """The head of the packed file."""
        kinds = {name: int(kind) for name, kind in self.kinds.items()}
        kinds |= {"gate": int(self.layout.gate_kind), "down": int(self.layout.down_kind)}
        tokenizer = self.source.tokenizer
        text: dict[str, Any] = {}
        if tokenizer is not None:
            text = {field: value for field, value in asdict(tokenizer).items() if field != "json"}
        return packed_header(self.source.spec, kinds, text, self.shapes)

    def data(self, name: str) -> npt.NDArray[Any]:
        """The bytes of one tensor of the packed file."""
        if name in self.kinds:
            return _with_rows(self.source.tensor(name).packed(self.kinds[name]), self.shapes[name][1][0])
        if name == "tokenizer":
            assert self.source.tokenizer is not None
            return np.frombuffer(self.source.tokenizer.json.encode(), np.uint8)
        if name.endswith(".ffn"):
            return self._bundles(name.removesuffix(".ffn"))
        return np.ascontiguousarray(self.source.tensor(name).float32())

    def _bundles(self, layer: str) -> Bytes:
        layout = self.layout
        out = np.zeros((layout.groups, layout.group_bytes), np.uint8)
        bundles = out[:, : layout.tail_offset].reshape(layout.groups, GROUP, layout.bundle_bytes)
        parts = (
            ("gate", 0, layout.gate_kind),
            ("up", layout.up_offset, layout.gate_kind),
            ("down", layout.down_offset, layout.down_kind),
        )
        for part, start, kind in parts:
            rows = self.source.tensor(f"{layer}.{part}").packed(kind)
            whole = _with_rows(rows, layout.groups * GROUP)
            bundles[:, :, start : start + rows.shape[1]] = whole.reshape(layout.groups, GROUP, -1)
        if layout.down_kind == Kind.Q4C:
            scales = self.source.tensor(f"{layer}.down").column_scales()
            out[:, layout.tail_offset : layout.tail_offset + 4 * layout.hidden] = scales.view(np.uint8).reshape(
                layout.groups, -1
            )
        return out


def _kind(tensor: SourceTensor, dtype: str) -> Kind:
    """The weight type that `dtype` gives a matrix; what has 4 bits already is not rounded anew."""
    if dtype == "auto" or (dtype == "q4" and tensor.kind >= Kind.Q4):
        return tensor.kind
    return Kind.Q4S if dtype == "q4" else Kind[dtype.upper()]


def _with_rows(rows: Bytes, count: int) -> Bytes:
    """Packed rows and as many rows of zero weights as make `count`."""
    if len(rows) == count:
        return rows
    return np.concatenate((rows, np.zeros((count - len(rows), rows.shape[1]), np.uint8)))
