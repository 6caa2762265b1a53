"""Inputs of matrices in a file without a name, as float16: it is gone when it is closed, however the process ends."""

import tempfile
from pathlib import Path

import numpy as np
import numpy.typing as npt

__all__ = ["Samples"]

Floats = npt.NDArray[np.float32]
# Whose inputs are the same.
_ALIKE = {"q": "attention", "k": "attention", "v": "attention", "gate": "feed-forward", "up": "feed-forward"}


class Samples:
    """Inputs by the place where they were sampled."""

    def __init__(self, folder: Path) -> None:
        # The file is closed with the object.
        self._file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115
        self._places: dict[str, tuple[int, tuple[int, int]]] = {}

    def add(self, place: str, inputs: Floats) -> None:
        """Keep inputs [tokens, cols]."""
        # What float16 cannot hold is cut: these are weights of errors, not numbers to compute with.
        half = np.clip(inputs, -65504, 65504).astype(np.float16)
        self._places[place] = self._file.seek(0, 2), half.shape
        self._file.write(half.tobytes())

    def place_of(self, name: str) -> str | None:
        """Where the inputs of the matrix `name` were sampled; None: nowhere."""
        layer, _, part = name.rpartition(".")
        place = f"{layer}.{_ALIKE.get(part, part)}"
        return place if place in self._places else None

    def at(self, place: str) -> Floats:
        """What was sampled there: float32 [tokens, cols]."""
        at, shape = self._places[place]
        self._file.seek(at)
        data = self._file.read(2 * shape[0] * shape[1])
        return np.frombuffer(data, np.float16).reshape(shape).astype(np.float32)

    def close(self) -> None:
        """Let go of the file."""
        self._file.close()
