"""The prompt of `generate`: from the command line, a file, or stdin."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO

from warmfront.shared.errors import UsageError

__all__ = ["read_prompt"]

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
        try:
            with file.open("rb") as opened:
                return _decoded(opened, str(file))
        except OSError as error:
            raise UsageError(f"cannot read the prompt from {file}: {error.strerror}") from None
    if sys.stdin is None or (text is None and file is None and sys.stdin.isatty()):
        prompt = ""
    else:
        prompt = _decoded(sys.stdin.buffer, "stdin")
    if not prompt:
        raise UsageError("there is no prompt: give -p TEXT or --prompt-ids 1,2,3 or -f FILE, or pipe it in")
    return prompt


def _decoded(source: BinaryIO, name: str) -> str:
    data = source.read(_MAX_BYTES + 1)
    if len(data) > _MAX_BYTES:
        raise UsageError(f"the prompt in {name} is larger than {_MAX_BYTES >> 20} MiB: shorten it")
    try:
        return data.decode()
    except UnicodeDecodeError:
        raise UsageError(f"the prompt in {name} is not UTF-8: give it in that encoding") from None
