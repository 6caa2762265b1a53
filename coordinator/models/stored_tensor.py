"""A tensor in a model's file, read on demand.

It is not mapped: no descriptor stays open, and a file that is truncated meanwhile raises an error instead of SIGBUS.
"""

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Generic, TypeVar

import numpy as np
import numpy.typing as npt

from warmfront.shared.errors import ModelError

__all__ = ["StoredTensor"]

Bytes = npt.NDArray[np.uint8]
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class StoredTensor(Generic[T]):
    """A row-major tensor. Rows are those of the last dimension; a vector is one row.

    Reading raises ModelError if the file has become shorter or cannot be read.
    """

    path: Path
    name: str
    # Element or block type, as the file format calls it.
    type: T
    shape: tuple[int, ...]
    # Where in the file it starts, in bytes.
    offset: int
    nbytes: int

    @property
    def _rows(self) -> int:
        return math.prod(self.shape[:-1])

    def piece(self, first: int, count: int) -> "StoredTensor[T]":
        """Rows of a matrix, or numbers of a vector, as a tensor of their own."""
        width = self.nbytes // self.shape[0]
        shape = (count, *self.shape[1:])
        return replace(self, shape=shape, offset=self.offset + first * width, nbytes=count * width)

    def item(self, index: int) -> "StoredTensor[T]":
        """One matrix of a stack, as a tensor of its own."""
        return replace(self.piece(index, 1), shape=self.shape[1:])

    def rows(self, start: int = 0, stop: int | None = None) -> Bytes:
        """Rows start..stop (default: all): uint8 [rows, bytes of a row]."""
        width = self.nbytes // self._rows
        stop = self._rows if stop is None else min(stop, self._rows)
        return self._read(self.offset + start * width, stop - start, width, width)

    def columns(self, first: int, last: int) -> Bytes:
        """Bytes first..last of every row: uint8 [rows, last - first]."""
        return self._read(self.offset + first, self._rows, last - first, self.nbytes // self._rows)

    def _read(self, offset: int, count: int, width: int, step: int) -> Bytes:
        """`count` pieces of `width` bytes, `step` bytes apart."""
        if width == step:
            count, width = 1, count * width
        out = np.empty((count, width), np.uint8)
        try:
            with self.path.open("rb") as file:
                for i, piece in enumerate(out):
                    file.seek(offset + i * step)
                    if file.readinto(piece.data) < width:
                        raise ModelError(f"{self.path} ends within tensor {self.name}; fetch it again")
        except OSError as error:
            raise ModelError(f"cannot read {self.path}: {error.strerror}") from error
        return out if width < step else out.reshape(-1, step)
