"""What an evaluation has computed so far, so that one that was interrupted or killed goes on where it was.

A folder beside the packed model, of the texts, the settings and the version of the compiled code; in it a file for each
piece of text and run, written whole, and one for each piece's reference. It is removed when the evaluation is done. A
model has at most one: an evaluation of other texts removes what another has left.
"""

import contextlib
import hashlib
import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from warmfront.coordinator.measure.forced_decode import Measured, Reference
from warmfront.coordinator.packing.arrays import load_arrays, save_arrays
from warmfront.shared.errors import ResourceError
from warmfront.shared.files import is_locked, locked
from warmfront.shared.kernels.version import digest

__all__ = ["Kept", "Pieces", "kept_for"]

Pieces = Sequence[Sequence[int]]


def _short(facts: Any) -> str:
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:20]


@contextlib.contextmanager
def kept_for(packed: Path, pieces: Pieces, settings: Mapping[str, Any]) -> Iterator["Kept"]:
    """What there is for these `pieces` of token ids with these `settings`; removed if the block ends without an error.

    Raises ResourceError if the cache cannot be written, or if another process evaluates the same.
    """
    folder = packed.with_name(f"{packed.stem}-{_short([[*map(list, pieces)], dict(settings), digest()])}.eval")
    if is_locked(folder):
        raise ResourceError("another warmfront evaluates this model on these texts: wait until it is done")
    with contextlib.ExitStack() as stack:
        with _writing(folder):
            stack.enter_context(locked(folder))
            for other in folder.parent.glob(f"{packed.stem}-*.eval"):
                if other != folder and not is_locked(other):
                    shutil.rmtree(other, ignore_errors=True)
            folder.mkdir(mode=0o700, exist_ok=True)
        yield Kept(folder)
        shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def _writing(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ResourceError(f"cannot keep what is evaluated in {folder}: {error.strerror}") from error


class Kept:
    """Files by run and piece; what is damaged counts as missing."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def measured(self, run: Mapping[str, Any], piece: int) -> Measured | None:
        """What `run`, by its settings, has measured on a piece."""
        arrays: dict[str, Any] = load_arrays(self._file(run, piece))
        with contextlib.suppress(TypeError, KeyError):
            return Measured(**arrays | {"seconds": float(arrays["seconds"]), "looked_at": int(arrays["looked_at"])})
        return None

    def keep(self, run: Mapping[str, Any], piece: int, measured: Measured) -> None:
        """Write what `run` has measured on a piece; raises ResourceError if there is no space."""
        with _writing(self._folder):
            save_arrays(self._file(run, piece), **measured._asdict())

    def reference(self, piece: int) -> Reference | None:
        """The dense model's distributions on a piece."""
        with contextlib.suppress(TypeError):
            return Reference(**load_arrays(self._file(None, piece)))
        return None

    def keep_reference(self, piece: int, reference: Reference) -> None:
        """Write the dense model's distributions on a piece; raises ResourceError if there is no space."""
        with _writing(self._folder):
            save_arrays(self._file(None, piece), **reference._asdict())

    def _file(self, run: Mapping[str, Any] | None, piece: int) -> Path:
        name = "reference" if run is None else _short(dict(run))
        return self._folder / f"{name}-{piece:05}.npz"
