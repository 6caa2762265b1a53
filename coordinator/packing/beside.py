"""Files beside a packed model that are made from it or measured with it, and made again where they are missing.

The name of each tells all that it depends on; the order of the model's neurons is a part of it.
"""

import contextlib
from collections.abc import Callable
from pathlib import Path

import numpy.typing as npt

from warmfront.coordinator.packing.arrays import save_arrays
from warmfront.shared.errors import ModelError, ResourceError
from warmfront.shared.files import locked
from warmfront.shared.model.store import PackedModel

__all__ = ["beside", "keep", "opened_or_made", "remove_others"]


def beside(model: PackedModel, what: str, suffix: str) -> Path:
    """The path of `what` of a model, in the present order of its neurons."""
    order = f"-{model.order}" if model.order else ""
    return model.path.with_name(f"{model.path.stem}-{what}{order}{suffix}")


def remove_others(path: Path, order: str) -> None:
    """Remove what is beside the packed model at `path` for other orders of its neurons than `order`."""
    for file in path.parent.iterdir():
        if file.name.startswith(f"{path.stem}-") and order not in file.name and file.is_file():
            file.unlink(missing_ok=True)


def opened_or_made(
    path: Path,
    what: str,
    make: Callable[[], None],
    say: Callable[[str], None],
    fits: Callable[[PackedModel], bool] = lambda _file: True,
) -> PackedModel:
    """The packed file at `path`, which `make` writes now if it is missing or damaged, or if it is not what `fits`.

    Raises ResourceError, which names `what`, where it cannot be written.
    """
    if (file := _opened(path, fits)) is None:
        try:
            with locked(path, say):
                # Another process may have made it meanwhile.
                if (file := _opened(path, fits)) is None:
                    make()
                    file = PackedModel(path)
        except OSError as error:
            raise ResourceError(f"cannot write {what} to {path.parent}: {error.strerror}") from error
    return file


def _opened(path: Path, fits: Callable[[PackedModel], bool]) -> PackedModel | None:
    with contextlib.suppress(ModelError):
        file = PackedModel(path)
        if fits(file):
            return file
        file.close()
    return None


def keep(path: Path, what: str, say: Callable[[str], None], **arrays: npt.ArrayLike) -> None:
    """Save `arrays`; where the cache cannot be written, `say` gets a line that `what` are measured again next time."""
    try:
        save_arrays(path, **arrays)
    except OSError as error:
        say(f"cannot keep {what} in {path}: {error.strerror}; they are measured again next time")
