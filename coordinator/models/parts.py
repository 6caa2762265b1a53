"""Models in several GGUF files: NAME-00001-of-00003.gguf and so on, as llama-gguf-split names them."""

import re
from pathlib import Path

from warmfront.shared.errors import ModelError

__all__ = ["part_names", "parts_of", "split_name"]

_PART = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})(?P<end>\.gguf)", re.IGNORECASE)


def split_name(name: str) -> tuple[str, int]:
    """A GGUF file's name without its end and without what tells the parts of a model apart, and which part it is."""
    part = _PART.fullmatch(name)
    return (part["stem"], int(part["number"])) if part else (name[: -len(".gguf")], 1)


def part_names(name: str) -> list[str]:
    """The names of all files of the model of which `name` is one, in order."""
    part = _PART.fullmatch(name)
    if part is None:
        return [name]
    stem, count, end = part["stem"], part["count"], part["end"]
    return [f"{stem}-{number:05}-of-{count}{end}" for number in range(1, int(count) + 1)]


def parts_of(path: Path) -> list[Path]:
    """All files of the model of which `path`, a file, is one; raises ModelError if one is not there."""
    names = part_names(path.name)
    if names == [path.name]:
        return [path]
    parts = [path.with_name(name) for name in names]
    missing = next((part for part in parts if not part.exists()), None)
    if missing is not None or path not in parts:
        raise ModelError(f"{missing or path}: part of a model of {len(parts)} files, which is not there; fetch it too")
    return parts
