"""The content of the model at a path, as a key for everything that the cache keeps about it.

The key is a SHA-256 of all that a reader may read: of a folder the weights, configurations and templates, but not its
README, pictures or hidden files. So that a start need not read 40 GB, `sources/` in the cache remembers the key
together with each file's inode, size and times (mtime, and ctime, which no user can set). If any of these differs, the
files are read again: a model that was only touched, copied or moved keeps its key, an edited one gets another.
"""

import contextlib
import hashlib
import json
import os
import re
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from warmfront.coordinator.models.open import model_files
from warmfront.shared.errors import ModelError
from warmfront.shared.files import locked, make_folder, write_whole
from warmfront.shared.paths import cache_root

__all__ = ["Known", "content_of", "known_sources", "state_of"]

# Files of a folder that readers read.
_READ = (".gguf", ".jinja", ".json", ".safetensors")
_PREDICTOR = re.compile(r"model_\d+\.pt")
# Bytes that one thread hashes at a time.
_PIECE = 64 << 20
# Bytes from which on the user is told that reading takes a while.
_LONG = 4 << 30
State = dict[str, list[int]]


@dataclass(frozen=True, slots=True)
class Known:
    """The model that was last found at a path."""

    # Where this is remembered.
    file: Path
    # Of the model.
    path: Path
    state: State
    # The key.
    content: str

    @property
    def current(self) -> bool:
        """Whether the same files are still at the path."""
        with contextlib.suppress(ModelError, ValueError):
            return state_of(self.path) == self.state
        return False


def state_of(path: Path) -> State:
    """Inode, size, mtime and ctime in ns of each file of the model, by name; the name of a single file is "".

    Raises ModelError if one cannot be read.
    """
    try:
        files = [file for file in model_files(path) if file == path or _is_read(file)]
        stats = {file.name if file != path else "": file.stat() for file in files}
    except OSError as error:
        raise ModelError(f"cannot read {error.filename}: {error.strerror}") from error
    return {name: [s.st_ino, s.st_size, s.st_mtime_ns, s.st_ctime_ns] for name, s in stats.items()}


def _is_read(file: Path) -> bool:
    return (file.suffix in _READ or _PREDICTOR.fullmatch(file.name) is not None) and not file.name.startswith(".")


def content_of(path: Path, say: Callable[[str], None]) -> str:
    """The key of the model at `path`: 20 hexadecimal digits. Raises ModelError if it cannot be read."""
    state, place = state_of(path), path.resolve()
    file = cache_root() / "sources" / f"{hashlib.sha256(os.fsencode(place)).hexdigest()[:20]}.json"
    known = _remembered(file)
    if known is not None and known.path == place and known.state == state:
        return known.content
    size = sum(fields[1] for fields in state.values())
    if size > _LONG:
        say(f"reading {path} ({size / 1e9:.0f} GB) to see whether it is packed already")
    content = _digest(path, state)
    facts = {"path": os.fspath(place), "state": state, "content": content}
    try:
        make_folder(file.parent)
        with locked(file):
            write_whole(file, json.dumps(facts).encode())
    except OSError as error:
        if size > _LONG:
            say(f"the cache cannot keep what {path} is ({error.strerror}): it is read again next time")
    return content


def _digest(path: Path, state: State) -> str:
    """The key of names, sizes and contents; pieces are read in parallel on all cores."""
    sizes = {name: fields[1] for name, fields in state.items()}
    home = path if path.is_dir() else path.parent
    pieces = [(home / name if name else path, at) for name, size in sizes.items() for at in range(0, size, _PIECE)]
    digest = hashlib.sha256(repr(sizes).encode())
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        for piece in pool.map(_digest_piece, pieces):
            digest.update(piece)
    return digest.hexdigest()[:20]


def _digest_piece(piece: tuple[Path, int]) -> bytes:
    file, at = piece
    digest, left = hashlib.sha256(), _PIECE
    try:
        with file.open("rb", buffering=0) as stream:
            stream.seek(at)
            while left and (data := stream.read(min(left, 1 << 20))):
                digest.update(data)
                left -= len(data)
    except OSError as error:
        raise ModelError(f"cannot read {error.filename or file}: {error.strerror}") from error
    return digest.digest()


def _remembered(file: Path) -> Known | None:
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError, RecursionError):
        facts: Any = json.loads(file.read_bytes())
        if isinstance(facts["content"], str):
            return Known(file, Path(facts["path"]), facts["state"], facts["content"])
    return None


def known_sources() -> Iterator[Known]:
    """All models that are remembered."""
    with contextlib.suppress(OSError):
        for file in sorted((cache_root() / "sources").iterdir()):
            if (known := _remembered(file)) is not None:
                yield known
