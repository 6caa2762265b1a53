"""Text files that are there as a whole or not at all."""

import tempfile
from pathlib import Path

__all__ = ["write_whole"]


def write_whole(path: Path, text: str) -> None:
    """Write `text` to `path`; a file that is there is replaced in one step. Raises OSError, and then leaves nothing."""
    with tempfile.TemporaryDirectory(prefix=f".{path.name}-", dir=path.parent) as scratch:
        whole = Path(scratch) / path.name
        whole.write_text(text)
        whole.replace(path)
