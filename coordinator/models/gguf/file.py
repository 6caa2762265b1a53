"""The GGUF container: the fields of a file, decoded, and where its tensors lie.

    file    = "GGUF" or PowerInfer's "PWRI" | u32 version | u64 tensors | u64 fields | fields | tensors | zeros | data
    field   = text key | u32 type | value
    tensor  = text name | u32 dimensions | u64 of each, the contiguous one first | u32 type | u64 offset in the data
    text    = u64 length | UTF-8
    array   = u32 type | u64 length | values

Data and offsets are multiples of `general.alignment`. A file is hostile until checked: no number in it is used for an
allocation or a loop before it is known to fit the file, and what precedes the data has a limited length. Big-endian
files and arrays of arrays are refused.
"""

import math
import os
import struct
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Type

from warmfront.coordinator.models.stored_tensor import StoredTensor
from warmfront.shared.errors import ModelError

__all__ = ["OTHER_FILE", "GgufFile", "is_gguf"]

POWERINFER = b"PWRI"
MAGICS = (b"GGUF", POWERINFER)
VERSIONS = (2, 3)
# Type codes of struct and numpy by GGUF's number; and GGUF's numbers of the two types without a fixed size.
SCALARS = dict(zip((0, 1, 2, 3, 4, 5, 6, 7, 10, 11, 12), "BbHhIif?Qqd", strict=True))
TEXT, ARRAY = 8, 9
LENGTH = struct.Struct("<Q")
# Bytes before the data; the largest vocabularies take 20 MB.
MAX_HEAD_BYTES = 1 << 26
MAX_DIMENSIONS = 4
# What to do about weights of a type that cannot be read.
OTHER_FILE = "choose a file that is quantised in another way, such as Q4_K_M"


def is_gguf(path: Path) -> bool:
    """Whether the file begins like a GGUF file, whatever its name; raises ModelError if it cannot be read."""
    try:
        with path.open("rb") as file:
            return file.read(4) in MAGICS
    except OSError as error:
        raise ModelError(f"cannot read {path}: {error.strerror}") from error


class GgufFile:
    """A file's `fields` and `tensors` by name; arrays of numbers are numpy arrays.

    Raises ModelError if it cannot be read or is not whole.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.fields: dict[str, Any] = {}
        self.tensors: dict[str, StoredTensor[Type]] = {}
        try:
            with path.open("rb") as self._file:
                self._at, self._size = 0, os.fstat(self._file.fileno()).st_size
                self._read()
        except OSError as error:
            raise ModelError(f"cannot read {path}: {error.strerror}") from error
        except ValueError as error:
            raise ModelError(f"{path} is not a whole GGUF file ({error}); fetch it again") from error

    def _read(self) -> None:
        magic, version = self._take(4), self._unpack("I")[0]
        if magic not in MAGICS:
            raise ValueError("it does not begin with GGUF")
        if version not in VERSIONS:
            raise ValueError("it is big-endian" if version & 0xFFFF == 0 else f"it is of version {version}")
        self.powerinfer = magic == POWERINFER
        tensors, fields = self._unpack("QQ")
        for _ in range(fields):
            key = self._text()
            if key in self.fields:
                raise ValueError(f"field {key} is there twice")
            self.fields[key] = self._value(self._unpack("I")[0], key)
        self._place([self._entry() for _ in range(tensors)])

    def _take(self, count: int) -> bytes:
        """The next `count` bytes."""
        if count > min(self._size, MAX_HEAD_BYTES) - self._at:
            raise ValueError(f"{count} bytes at {self._at} are beyond the {self._size} of the file, or of a sane head")
        self._at += count
        return self._file.read(count)

    def _unpack(self, code: str) -> tuple[Any, ...]:
        return struct.unpack(f"<{code}", self._take(struct.calcsize(f"<{code}")))

    def _text(self) -> str:
        (length,) = LENGTH.unpack(self._take(LENGTH.size))
        return self._take(length).decode()

    def _value(self, kind: int, key: str) -> Any:
        if kind in SCALARS:
            return self._unpack(SCALARS[kind])[0]
        if kind == TEXT:
            return self._text()
        if kind != ARRAY:
            raise ValueError(f"field {key} has the unknown type {kind}")
        kind, length = self._unpack("IQ")
        if kind in SCALARS:
            dtype = np.dtype(f"<{SCALARS[kind]}")
            return np.frombuffer(self._take(length * dtype.itemsize), dtype)
        if kind != TEXT:
            raise ValueError(f"field {key} is an array of the type {kind}")
        return [self._text() for _ in range(length)]

    def _entry(self) -> tuple[str, Type, tuple[int, ...], int]:
        """Name, type, shape and offset of the next tensor of the table."""
        name = self._text()
        (count,) = self._unpack("I")
        if not 1 <= count <= MAX_DIMENSIONS:
            raise ValueError(f"tensor {name} has {count} dimensions")
        *sizes, kind, offset = self._unpack(f"{count}QIQ")
        if kind not in gguf.GGML_QUANT_SIZES:
            what = f"weights of the unknown type {kind}, as forks of llama.cpp have"
            raise ModelError(f"{self.path}: tensor {name} has {what}; {OTHER_FILE}")
        return name, Type(kind), tuple(reversed(sizes)), offset

    def _place(self, table: list[tuple[str, Type, tuple[int, ...], int]]) -> None:
        """Fill `tensors`, after checking that each is aligned, within the file, and overlaps no other."""
        alignment = self.fields.get("general.alignment", 32)
        if not isinstance(alignment, int) or alignment < 1 or alignment & (alignment - 1):
            raise ValueError(f"general.alignment is {alignment!r:.40}, not a power of two")
        start = end = -(-self._at // alignment) * alignment
        for name, kind, shape, offset in sorted(table, key=lambda entry: entry[3]):
            block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
            if 0 in shape or shape[-1] % block:
                raise ValueError(f"tensor {name} of type {kind.name} has shape {shape}")
            if name in self.tensors:
                raise ValueError(f"tensor {name} is there twice")
            at, nbytes = start + offset, math.prod(shape) // block * block_bytes
            if offset % alignment or at < end:
                raise ValueError(f"tensor {name} lies at {at}, not at a multiple of {alignment} or on another tensor")
            if at + nbytes > self._size:
                raise ValueError(f"tensor {name} ends at {at + nbytes}, the file at {self._size}")
            self.tensors[name] = StoredTensor(self.path, name, kind, shape, at, nbytes)
            end = at + nbytes
