"""Arrays by name in a file of the cache (.npz), with a CRC-32 for each, which zip files have."""

import io
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from warmfront.shared.files import locked, make_folder, write_whole

__all__ = ["load_arrays", "save_arrays"]

Arrays = dict[str, npt.NDArray[Any]]


def save_arrays(path: Path, **arrays: npt.ArrayLike) -> None:
    """Keep `arrays`, strings among them, in place of what was kept before. Raises OSError, and then leaves that."""
    data = io.BytesIO()
    np.savez(data, **arrays)  # type: ignore[arg-type]
    make_folder(path.parent)
    with locked(path):
        write_whole(path, data.getvalue())


def load_arrays(path: Path) -> Arrays:
    """What was kept; nothing if there is no file, or a damaged one."""
    try:
        with np.load(io.BytesIO(path.read_bytes())) as kept:
            return dict(kept)
    except Exception:  # damaged zip files raise errors of many kinds
        return {}
