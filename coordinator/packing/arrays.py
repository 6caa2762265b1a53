"""Named arrays in a file of the cache (.npz). Zip files have a CRC-32 of each member, so damage is noticed."""

import io
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from warmfront.shared.files import locked, make_folder, write_whole

__all__ = ["Arrays", "load_arrays", "save_arrays"]

Arrays = dict[str, npt.NDArray[Any]]


def save_arrays(path: Path, **arrays: npt.ArrayLike) -> None:
    """Write `arrays`, which may be strings too, in place of the file's earlier ones. On OSError, those are kept."""
    data = io.BytesIO()
    np.savez(data, **arrays)  # type: ignore[arg-type]
    make_folder(path.parent)
    with locked(path):
        write_whole(path, data.getvalue())


def load_arrays(path: Path) -> Arrays:
    """The arrays of the file; none if it is missing or damaged."""
    try:
        with np.load(io.BytesIO(path.read_bytes())) as kept:
            return dict(kept)
    except Exception:  # damaged zip files raise errors of many kinds
        return {}
