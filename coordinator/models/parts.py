"""Models in several GGUF files: NAME-00001-of-00003.gguf and so on, as llama-gguf-split names them."""

import re
from pathlib import Path

from warmfront.shared.errors import ModelError

__all__ = ["parts_of"]


def parts_of(path: Path) -> list[Path]:
    """All files of the model of which `path`, a file, is one; raises ModelError if one is not there."""
    match = re.fullmatch(r"(.+)-(\d{5})-of-(\d{5})\.gguf", path.name)
    if match is None:
        return [path]
    count = int(match[3])
    parts = [path.with_name(f"{match[1]}-{i:05}-of-{match[3]}.gguf") for i in range(1, count + 1)]
    missing = next((part for part in parts if not part.exists()), None)
    if missing is not None or path not in parts:
        raise ModelError(f"{missing or path}: part of a model of {count} files, which is not there; fetch it too")
    return parts
