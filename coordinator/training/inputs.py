"""The inputs of the feed-forward layers on text, kept on the disk while predictors are made from them.

    FOLDER/inputs        float16 [layers, tokens, hidden], as large as it will get from the start
    FOLDER/facts.json    {"key": what was asked for, "done": tokens that are there}
    FOLDER/layer-N.npz   the predictor of a layer that is done (`made`)

A killed run leaves whole tokens and layers, and the next one for the same key goes on behind them.
"""

import contextlib
import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from warmfront.coordinator.packing.arrays import Arrays, load_arrays, save_arrays
from warmfront.shared.errors import ResourceError
from warmfront.shared.files import make_folder, write_all, write_whole

__all__ = ["Inputs", "token_bytes"]

Floats = npt.NDArray[np.float32]
Halves = npt.NDArray[np.float16]
_LARGEST = np.finfo(np.float16).max
# The smallest predictors to be written beside them.
_SPARE = 64 << 20


def token_bytes(layers: int, hidden: int) -> int:
    """Bytes of a token's inputs."""
    return layers * hidden * 2


class Inputs:
    """The record of one run; `shape`: layers, tokens, hidden. Raises ResourceError where the disk has no room."""

    def __init__(self, folder: Path, shape: tuple[int, int, int], key: str) -> None:
        self.folder, self.shape, self._key = folder, shape, key
        self._file, self._facts = folder / "inputs", folder / "facts.json"
        kept = self._kept()
        # Tokens that are there.
        self.done = kept or 0
        if kept is None:
            self._begin()

    def _kept(self) -> int | None:
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            facts = json.loads(self._facts.read_bytes())
            sound = facts["key"] == self._key and self._file.stat().st_size == self._nbytes
            if sound and type(facts["done"]) is int and 0 <= facts["done"] <= self.shape[1]:
                return int(facts["done"])
        return None

    @property
    def _nbytes(self) -> int:
        layers, tokens, hidden = self.shape
        return tokens * token_bytes(layers, hidden)

    def _begin(self) -> None:
        self.remove()
        try:
            make_folder(self.folder)
            if shutil.disk_usage(self.folder).free < self._nbytes + _SPARE:
                raise ResourceError(
                    f"the inputs of {self.shape[1]:,} tokens take {self._nbytes / 1e9:.1f} GB in {self.folder}, which "
                    "are not free: pass --tokens or --disk for fewer"
                )
            with self._file.open("xb") as file:
                os.posix_fallocate(file.fileno(), 0, self._nbytes)
            self._note()
        except OSError as error:
            raise ResourceError(f"cannot keep inputs in {self.folder}: {error.strerror}") from error

    def add(self, inputs: Floats) -> None:
        """Append the inputs of further tokens, [layers, n, hidden]."""
        layers, tokens, hidden = self.shape
        halves = np.clip(inputs, -_LARGEST, _LARGEST).astype(np.float16)
        try:
            with self._file.open("r+b") as file:
                for layer in range(layers):
                    write_all(
                        file.fileno(), memoryview(halves[layer]).cast("B"), (layer * tokens + self.done) * hidden * 2
                    )
                os.fdatasync(file.fileno())  # before they are said to be there
            self.done += inputs.shape[1]
            self._note()
        except OSError as error:
            raise ResourceError(f"cannot keep inputs in {self._file}: {error.strerror}") from error

    def _note(self) -> None:
        write_whole(self._facts, json.dumps({"key": self._key, "done": self.done}).encode())

    def of(self, layer: int) -> Halves:
        """Those of a layer, [tokens, hidden]."""
        _, tokens, hidden = self.shape
        try:
            read = np.fromfile(self._file, np.float16, tokens * hidden, offset=layer * tokens * hidden * 2)
        except OSError as error:
            raise ResourceError(f"cannot read {self._file}: {error.strerror}") from error
        return read.reshape(tokens, hidden)

    def keep(self, layer: int, key: str, made: Arrays) -> None:
        """Keep what was made for a layer, by what was asked for."""
        try:
            save_arrays(self._made(layer), key=np.array(key), **made)
        except OSError as error:
            raise ResourceError(f"cannot keep layer {layer} in {self.folder}: {error.strerror}") from error

    def made(self, layer: int, key: str, names: Sequence[str]) -> Arrays | None:
        """What was made for a layer when the same was asked for; None if it is still to be made."""
        kept = load_arrays(self._made(layer))
        return kept if str(kept.pop("key", "")) == key and set(kept) == set(names) else None

    def _made(self, layer: int) -> Path:
        return self.folder / f"layer-{layer}.npz"

    def remove(self) -> None:
        """Remove all of it."""
        with contextlib.suppress(FileNotFoundError):
            shutil.rmtree(self.folder)
