"""The prompt of `generate`, from the command line, a file, or stdin; and the chat template of a file."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO

from warmfront.shared.errors import UsageError

__all__ = ["read_prompt", "read_template"]

# Bytes: far more than any context holds; an endless file must not fill the memory.
_MAX_BYTES = 1 << 28


def read_prompt(text: str | None, ids: Sequence[int] | None, file: Path | None) -> str | Sequence[int]:
    """The one that is given; without any, or with "-" as text or file, all of stdin.

    Raises UsageError for more than one, for none, and for what cannot be read or is not UTF-8.
    """
    if sum(given is not None for given in (text, ids, file)) > 1:
        raise UsageError("give either -p TEXT or --prompt-ids 1,2,3 or -f FILE, one of them")
    if ids is not None:
        return ids
    if text is not None and text != "-":
        return text
    if file is not None and str(file) != "-":
        return _read(file, "prompt")
    if sys.stdin is None or (text is None and file is None and sys.stdin.isatty()):
        prompt = ""
    else:
        prompt = _decoded(sys.stdin.buffer, "stdin")
    if not prompt:
        raise UsageError("there is no prompt: give -p TEXT or --prompt-ids 1,2,3 or -f FILE, or pipe it in")
    return prompt


def read_template(file: Path | None) -> str | None:
    """The chat template in `file`. Raises UsageError if it cannot be read or is not UTF-8."""
    return None if file is None else _read(file, "chat template")


def _read(file: Path, what: str) -> str:
    try:
        with file.open("rb") as opened:
            return _decoded(opened, str(file), what)
    except OSError as error:
        raise UsageError(f"cannot read the {what} from {file}: {error.strerror}") from None


def _decoded(source: BinaryIO, name: str, what: str = "prompt") -> str:
    data = source.read(_MAX_BYTES + 1)
    if len(data) > _MAX_BYTES:
        raise UsageError(f"the {what} in {name} is larger than {_MAX_BYTES >> 20} MiB: shorten it")
    try:
        return data.decode()
    except UnicodeDecodeError:
        raise UsageError(f"the {what} in {name} is not UTF-8: give it in that encoding") from None
