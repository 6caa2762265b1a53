"""A tensor where it lies in a model's file: read when asked for, not mapped.

So no descriptor is held, and a file that shrinks meanwhile is an error in one line, not a bus error.
"""

import math
from dataclasses import dataclass
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
    """`nbytes` of the file from `offset` on, whose last dimension is contiguous; `type` is the format's own.

    A row is one of the last dimension: a vector is one row. Reading raises ModelError if the bytes are gone.
    """

    path: Path
    name: str
    type: T
    shape: tuple[int, ...]
    offset: int
    nbytes: int

    @property
    def _rows(self) -> int:
        return math.prod(self.shape[:-1])

    def rows(self, start: int = 0, stop: int | None = None) -> Bytes:
        """Rows start..stop, or to the end: uint8 [rows, bytes of a row]."""
        width = self.nbytes // self._rows
        stop = self._rows if stop is None else min(stop, self._rows)
        return self._read(self.offset + start * width, stop - start, width, width)

    def columns(self, first: int, last: int) -> Bytes:
        """Bytes first..last of every row: uint8 [rows, last - first]."""
        return self._read(self.offset + first, self._rows, last - first, self.nbytes // self._rows)

    def _read(self, offset: int, count: int, width: int, step: int) -> Bytes:
        """`count` pieces of `width` bytes, each `step` after the one before."""
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
