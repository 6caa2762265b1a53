"""Writing packed files (`shared/model/store.py`): header, tensors one after the other, checksums.

A file that is being written can be told from a whole one by its last word, and gone on with:

    whole    crc32 of all checksums (low half), 0
    partial  tensors that are finished, crc32 of their checksums

A tensor's data are written before its checksums, and these before that word. After a power cut any of them may be
missing: what is gone on with has the right header, and its tensors those checksums.
"""

import json
import os
import struct
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from warmfront.shared.errors import ResourceError
from warmfront.shared.files import write_all
from warmfront.shared.model.spec import ModelSpec
from warmfront.shared.model.store import FORMAT, piece_bytes, sums_of
from warmfront.shared.paths import cache_root

__all__ = ["Shapes", "tensor_bytes", "write_packed"]

Bytes = npt.NDArray[np.uint8]
# Bytes that are checked at a time.
_AT_ONCE = 1 << 26
# Element type, as safetensors calls it, and shape of each tensor of a packed file, by name.
Shapes = dict[str, tuple[str, tuple[int, ...]]]


def tensor_bytes(element: str, shape: tuple[int, ...]) -> int:
    """Bytes of a tensor of the packed file."""
    return int(np.prod(shape)) * {"U64": 8, "F32": 4, "U32": 4, "U16": 2, "U8": 1}[element]


class _Part(NamedTuple):
    """Where a tensor is behind the header, and its checksums among all: bytes of a piece, the first one, how many."""

    name: str
    at: int
    nbytes: int
    piece: int
    first: int
    pieces: int


def write_packed(
    fd: int,
    spec: ModelSpec,
    kinds: Mapping[str, int],
    text: Mapping[str, Any],
    shapes: Shapes,
    tensors: Iterable[Iterable[npt.NDArray[Any]]],
    progress: Callable[[int, int], None] = lambda *_: None,
    kept: Callable[[str, Bytes], None] = lambda *_: None,
    **more: str,
) -> None:
    """Write a whole file with `tensors` in the order of `shapes`, each in parts of whole pieces (`piece_bytes`); `more`
    are further metadata.

    If the file holds the beginning of just that, it is gone on with, and `kept` gets each part of the tensors that are
    there. `progress` gets (bytes done, bytes in all). Raises OSError, and ResourceError before writing if there is no
    room.
    """
    parts = _parts(shapes)
    sums = np.zeros(parts[-1].first + parts[-1].pieces, np.uint64)
    metadata = {"format": FORMAT, "spec": spec.to_json(), "kinds": json.dumps(kinds), "text": json.dumps(text)}
    header, nbytes = _header(metadata | more, shapes | {"sums": ("U64", (len(sums) + 2,))})
    start, total = len(header), len(header) + nbytes
    sums_at = total - 8 * (len(sums) + 2)
    _check_room(fd, spec.name, total)
    finished = _finished(fd, header, total, parts, sums, kept)
    if not finished:
        os.ftruncate(fd, 0)
    os.posix_fallocate(fd, 0, total)  # a full disk is noticed now, and the file lies in one piece
    write_all(fd, header, 0)
    check = zlib.crc32(sums[: sum(part.pieces for part in parts[:finished])].tobytes())
    for number, (part, tensor) in enumerate(zip(parts, tensors, strict=True)):
        if number < finished:
            continue
        at, first = start + part.at, part.first
        for array in tensor:
            data = array.reshape(-1).view(np.uint8)
            some = sums_of(data, part.piece)
            sums[first : first + len(some)] = some
            write_all(fd, data.data, at)
            at, first = at + data.nbytes, first + len(some)
            progress(at, total)
        own = sums[part.first : first].tobytes()
        check = zlib.crc32(own, check)
        write_all(fd, own, sums_at + 8 * part.first)
        write_all(fd, struct.pack("<II", number + 1, check), total - 8)
    words = sums.tobytes() + struct.pack("<Q", zlib.crc32(header[8:]))
    write_all(fd, words + struct.pack("<Q", zlib.crc32(words)), sums_at)
    progress(total, total)


def _parts(shapes: Shapes) -> list[_Part]:
    parts, at, first = [], 0, 0
    for name, shape in shapes.items():
        nbytes = tensor_bytes(*shape)
        piece = piece_bytes(name, *shape, nbytes)
        parts.append(_Part(name, at, nbytes, piece, first, -(-nbytes // piece)))
        at, first = at + nbytes, first + parts[-1].pieces
    return parts


def _finished(
    fd: int,
    header: bytes,
    total: int,
    parts: Sequence[_Part],
    sums: npt.NDArray[np.uint64],
    kept: Callable[[str, Bytes], None],
) -> int:
    """How many tensors the file has already, the first ones; their checksums are put into `sums`."""
    if os.fstat(fd).st_size != total or os.pread(fd, len(header), 0) != header:
        return 0
    words = os.pread(fd, 8 * (len(sums) + 1), total - 8 * (len(sums) + 2))
    finished, check = map(int, struct.unpack("<II", os.pread(fd, 8, total - 8)))
    if (finished, check) == (zlib.crc32(words), 0):  # only its name is missing
        finished, check = len(parts), zlib.crc32(words[:-8])
    if not 0 < finished <= len(parts):
        return 0
    stored = words[: 8 * (parts[finished - 1].first + parts[finished - 1].pieces)]
    if zlib.crc32(stored) != check:
        return 0
    sums[: len(stored) // 8] = np.frombuffer(stored, np.uint64)
    for number, part in enumerate(parts[:finished]):
        at_once = max(_AT_ONCE // part.piece, 1) * part.piece
        for offset in range(0, part.nbytes, at_once):
            size = min(at_once, part.nbytes - offset)
            data = np.frombuffer(os.pread(fd, size, len(header) + part.at + offset), np.uint8)
            own, first = sums_of(data, part.piece), part.first + offset // part.piece
            if not np.array_equal(own, sums[first : first + len(own)]):
                return number
            kept(part.name, data)
    return finished


def _header(metadata: Mapping[str, str], shapes: Shapes) -> tuple[bytes, int]:
    """The safetensors header (length, then JSON padded to 8 bytes), and how many bytes of tensors follow."""
    fields: dict[str, Any] = {"__metadata__": metadata}
    offset = 0
    for name, (element, shape) in shapes.items():
        end = offset + tensor_bytes(element, shape)
        fields[name] = {"dtype": element, "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    body = json.dumps(fields).encode()
    body += b" " * (-len(body) % 8)
    return struct.pack("<Q", len(body)) + body, offset


def _check_room(fd: int, name: str, need: int) -> None:
    disk = os.fstatvfs(fd)
    free = disk.f_bavail * disk.f_frsize + os.fstat(fd).st_blocks * 512  # what is there of it has its room
    if free < need:
        raise ResourceError(
            f"{name} needs {need / 1e9:.2f} GB in {cache_root()}, {free / 1e9:.2f} GB are free there: "
            "make room (`warmfront cache prune`) or set XDG_CACHE_HOME to a folder with room"
        )
