"""What is in the cache, and what of it may be removed.

    models/       packed models by name, weight type and content; beside each what was made from it (`beside.py`):
                  copies of its gates, their thresholds, predictors, kinds of text, what layers lose by a core; an
                  interrupted count, training or evaluation
    downloads/    models that were fetched by name
    kernels/      compiled code, a folder for each version
    profiles/     profiles of the user's own texts  } the user's work: removed only when it is named
    tuning.json   what `warmfront tune` found       }
    the rest      small: measurements of this machine (`fetching.json` and others), which content is at which path
                  (`content.py`)

Links are not followed: a link in the cache is removed itself, its target is not.
"""

import os
import re
import shutil
import stat
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

from warmfront.coordinator.packing.content import Known, content_of, known_sources
from warmfront.shared.config import DTYPES
from warmfront.shared.errors import ModelError, ResourceError, UsageError
from warmfront.shared.files import is_locked, sweep_locks
from warmfront.shared.paths import cache_root

__all__ = ["Item", "chosen", "everything", "listed", "refresh", "remove", "stale", "tidy"]

_PARTS = ("models", "downloads", "kernels", "profiles")
_PACKED = re.compile(rf"(?P<name>.+)-(?P<dtype>{'|'.join(DTYPES)})-(?P<id>[0-9a-f]{{20}})(?P<rest>[.-].*)", re.DOTALL)
_DAY_S = 86_400
# Kernels of other versions that were not used for so many days count as abandoned.
_KERNEL_DAYS = 30
_STALE = {
    "changed": "the model has changed since",
    "gone": "the model is gone",
    "unknown": "no model has this content any more",
    "left": "left by a run that was killed",
}


@dataclass(frozen=True, slots=True)
class Item:
    """One thing in the cache."""

    # Its folder in the cache, "" for the cache itself.
    part: str
    name: str
    # Its main file or folder, then those made from it.
    paths: tuple[Path, ...]
    nbytes: int
    # When it was last used, in seconds since 1970.
    used: float
    # Weight type; this and the fields below are for packed models.
    dtype: str = ""
    # The content's key.
    id: str = ""
    # Path of a model with that content, if one is known.
    source: str | None = None
    # "current" if that model is still there; else, and for left-over files, a key of `_STALE`.
    state: str = ""

    @property
    def label(self) -> str:
        """Its name in messages, printable whatever its file name is."""
        label = f"{self.name} ({self.dtype}, {self.id[:8]})" if self.id else f"{self.part}/{self.name}".lstrip("/")
        return "".join(letter if letter.isprintable() else "?" for letter in label)


def listed() -> list[Item]:
    """Everything in the cache, packed models first. Raises ResourceError if the cache cannot be read."""
    root, known = cache_root(), list(known_sources())
    try:
        models = _models(_entries(root / "models"), known)
        rest = [entry for entry in _entries(root) if entry.name not in (*_PARTS, "locks")]
        others = [_item(part, entry) for part in _PARTS[1:] for entry in _entries(root / part)]
        others += [_item("", entry) for entry in rest]
    except OSError as error:
        raise ResourceError(f"cannot read the cache {root}: {error.strerror}") from error
    sources = {item.source: item.used for item in sorted(models, key=lambda item: item.used)}
    # A download counts as used when a model packed from it is.
    return models + [
        replace(item, used=max(item.used, sources.get(str(item.paths[0].resolve()), 0))) for item in others
    ]


def _entries(folder: Path) -> list[Path]:
    """The contents of a folder; nothing if it is missing or a link."""
    return sorted(folder.iterdir()) if folder.is_dir() and (folder == cache_root() or not folder.is_symlink()) else []


def _size_and_use(path: Path) -> tuple[int, float]:
    """Bytes, and when any of it was last read or written; links count as nothing."""
    try:
        status = path.lstat()
        if stat.S_ISDIR(status.st_mode):
            inner = [_size_and_use(entry) for entry in path.iterdir()]
            return sum(size for size, _ in inner), max((used for _, used in inner), default=status.st_mtime)
    except OSError:  # removed meanwhile, or another user's
        return 0, 0.0
    size = status.st_size if stat.S_ISREG(status.st_mode) else 0
    return size, max(status.st_atime, status.st_mtime)


def _item(part: str, *paths: Path, name: str = "", state: str = "") -> Item:
    sizes, uses = zip(*map(_size_and_use, paths), strict=True)
    return Item(part, name or paths[0].name, paths, sum(sizes), max(uses), state=state)


def _models(files: Iterable[Path], known: Iterable[Known]) -> list[Item]:
    """Packed models, each with the files made from it; other files count as left over."""
    packed: dict[tuple[str, str, str], list[Path]] = {}
    left = []
    for file in files:
        match = _PACKED.fullmatch(file.name)
        if match is None:
            left.append(file)
        else:
            packed.setdefault((match["name"], match["dtype"], match["id"]), []).append(file)
    items = []
    for (name, dtype, content), paths in packed.items():
        main = [path for path in paths if path.name == f"{name}-{dtype}-{content}.safetensors"]
        if not main:
            left += paths
            continue
        source, state = _source_of(content, known)
        item = _item("models", *main, *(path for path in paths if path not in main), name=name, state=state)
        items.append(replace(item, dtype=dtype, id=content, source=source))
    return items + [_item("models", path, state="left") for path in left]


def _source_of(content: str, known: Iterable[Known]) -> tuple[str | None, str]:
    found: tuple[str | None, str] = (None, "unknown")
    for source in known:
        if source.content == content:
            if source.current:
                return str(source.path), "current"
            found = str(source.path), "changed" if os.path.exists(source.path) else "gone"
    return found


def chosen(names: Iterable[str], items: Iterable[Item]) -> list[Item]:
    """The items with these names, ids or parts. Raises UsageError for one that does not exist."""
    found = []
    for name in names:
        matches = [item for item in items if name and name in (item.name, item.id, item.id[:8], item.part)]
        if not matches:
            raise UsageError(f"nothing in the cache is called {name!r}: `warmfront cache ls` says what there is")
        found += [item for item in matches if item not in found]
    return found


def everything(items: Iterable[Item]) -> list[Item]:
    """All items but the user's work."""
    return [item for item in items if item.part != "profiles" and (item.part, item.name) != ("", "tuning.json")]


def stale(items: list[Item], days: float | None, size: int | None) -> Iterator[tuple[Item, str]]:
    """Items to remove, and why: useless ones, those not used for `days`, and what exceeds `size` bytes in all.

    The user's work and measurements are kept.
    """
    now = time.time()
    kernels = sorted((item for item in items if item.part == "kernels"), key=lambda item: item.used)
    reasons: dict[Path, str] = {item.paths[0]: _STALE[item.state] for item in items if item.state in _STALE}
    for item in kernels[:-1]:
        if item.used < now - _KERNEL_DAYS * _DAY_S:
            reasons[item.paths[0]] = f"not used for {_KERNEL_DAYS} days"
    for item in items:
        if item.name.startswith(".") and item.part == "downloads" and item.used < now - _DAY_S:
            reasons[item.paths[0]] = _STALE["left"]
        if days is not None and item.part in _PARTS[:3] and item.used < now - days * _DAY_S:
            reasons.setdefault(item.paths[0], f"not used for {days:g} days")
    kept = sum(item.nbytes for item in items if item.paths[0] not in reasons)
    for item in sorted(items, key=lambda item: item.used):
        if size is not None and kept > size and item.part in _PARTS[:3] and item.paths[0] not in reasons:
            reasons[item.paths[0]] = "beyond the size to keep, and least recently used"
            kept -= item.nbytes
    return ((item, reasons[item.paths[0]]) for item in items if item.paths[0] in reasons)


def refresh(say: Callable[[str], None]) -> None:
    """Look again at models whose files have changed: their content may be the same."""
    for known in known_sources():
        if not known.current and os.path.exists(known.path):
            with suppress(ModelError):
                content_of(known.path, say)


def tidy() -> None:
    """Forget models that no longer exist, and remove the locks of processes that have ended."""
    for known in known_sources():
        if not os.path.exists(known.path):
            with suppress(OSError):
                known.file.unlink()
    sweep_locks()


def remove(item: Item) -> bool:
    """Remove the item; False if another process is writing it. Raises ResourceError if it cannot be removed."""
    # Packing and reordering lock the packed file's name, a count that of its profile (`profile/counting.py`), training
    # one of its own (`cli/training/`), an evaluation that of its folder.
    locks = (".safetensors", ".profile", ".training", ".eval")
    if any(is_locked(path.with_suffix(suffix)) for path in item.paths for suffix in locks):
        return False
    for path in item.paths:
        try:
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)
        except OSError as error:
            raise ResourceError(f"cannot remove {item.label}: {error.strerror} ({os.fspath(path)})") from error
    return True
