"""Text files that are there as a whole or not at all."""

import os
import tempfile
from pathlib import Path

from warmfront.shared.errors import UsageError

__all__ = ["check_writable", "write_whole"]


def check_writable(path: Path) -> None:
    """Raise UsageError if a file cannot be written to the folder of `path`."""
    folder = path.parent
    if not folder.is_dir():
        raise UsageError(f"cannot write {path}: {folder} is no folder; make it, or name another file")
    if not os.access(folder, os.W_OK):
        raise UsageError(f"cannot write {path}: {folder} may not be written to; name another file")


def write_whole(path: Path, text: str) -> None:
    """Write `text` to `path`; a file that is there is replaced in one step. Raises OSError, and then leaves nothing."""
    with tempfile.TemporaryDirectory(prefix=f".{path.name}-", dir=path.parent) as scratch:
        whole = Path(scratch) / path.name
        whole.write_text(text, encoding="utf-8")
        whole.replace(path)
