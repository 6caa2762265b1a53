"""Writing packed files (`shared/model/store.py`): header, tensors one after the other, checksums."""

import json
import os
import struct
import zlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from warmfront.shared.errors import ResourceError
from warmfront.shared.files import write_all
from warmfront.shared.model.spec import ModelSpec
from warmfront.shared.model.store import FORMAT, piece_bytes, sums_of
from warmfront.shared.paths import cache_root

__all__ = ["Shapes", "tensor_bytes", "write_packed"]

# Element type, as safetensors calls it, and shape of each tensor of a packed file, by name.
Shapes = dict[str, tuple[str, tuple[int, ...]]]


def tensor_bytes(element: str, shape: tuple[int, ...]) -> int:
    """Bytes of a tensor of the packed file."""
    return int(np.prod(shape)) * {"U64": 8, "F32": 4, "U32": 4, "U16": 2, "U8": 1}[element]


def write_packed(
    fd: int,
    spec: ModelSpec,
    kinds: Mapping[str, int],
    text: Mapping[str, Any],
    shapes: Shapes,
    tensors: Iterable[npt.NDArray[Any]],
    progress: Callable[[int, int], None] = lambda *_: None,
    **more: str,
) -> None:
    """Write a whole file with `tensors` in the order of `shapes`; `more` are further metadata.

    `progress` gets (bytes done, bytes in all). Raises OSError, and ResourceError before writing if there is no room.
    """
    pieces = {name: piece_bytes(name, *shape, tensor_bytes(*shape)) for name, shape in shapes.items()}
    count = sum(-(-tensor_bytes(*shapes[name]) // piece) for name, piece in pieces.items())
    metadata = {"format": FORMAT, "spec": spec.to_json(), "kinds": json.dumps(kinds), "text": json.dumps(text)}
    header, nbytes = _header(metadata | more, shapes | {"sums": ("U64", (count + 2,))})
    total = len(header) + nbytes
    _check_room(fd, spec.name, total)
    os.posix_fallocate(fd, 0, total)  # a full disk is noticed now, and the file lies in one piece
    write_all(fd, header, 0)
    done, sums = len(header), []
    for piece, tensor in zip(pieces.values(), tensors, strict=True):
        data = tensor.reshape(-1).view(np.uint8)
        sums.append(sums_of(data, piece))
        write_all(fd, data.data, done)
        done += data.nbytes
        progress(done, total)
    words = b"".join((*(chunk.tobytes() for chunk in sums), struct.pack("<Q", zlib.crc32(header[8:]))))
    write_all(fd, words + struct.pack("<Q", zlib.crc32(words)), done)
    progress(total, total)


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
    free = disk.f_bavail * disk.f_frsize
    if free < need:
        raise ResourceError(
            f"{name} needs {need / 1e9:.2f} GB in {cache_root()}, {free / 1e9:.2f} GB are free there: "
            "make room (`warmfront cache prune`) or set XDG_CACHE_HOME to a folder with room"
        )
