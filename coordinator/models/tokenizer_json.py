"""A tokenizer.json in the hands of the tokenizers library, and the library's errors in one line.

It raises bare Exceptions, and where its Rust code panics a PanicException, which is a BaseException; a panic also
writes to stderr by itself. An expression of a tokenizer.json that backtracks for too long ends so, for one.
"""

import contextlib
import os
from collections.abc import Iterator

from tokenizers import Tokenizer

from warmfront.shared.errors import ModelError, WarmfrontError

__all__ = ["load_tokenizer", "told_in_one_line"]


def load_tokenizer(text: str) -> Tokenizer:
    """The tokenizer. Like transformers' it neither cuts nor pads, though training may have left the file saying so."""
    tokenizer = Tokenizer.from_str(text)
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


@contextlib.contextmanager
def told_in_one_line(what: str, advice: str) -> Iterator[None]:
    """Raise ModelError "what (why); advice" for whatever goes wrong in the block, but for errors of warmfront's own.

    What the block writes to stderr is held back until it ends, and dropped if it panics.
    """
    with contextlib.ExitStack() as stack:
        held = stack.enter_context(os.fdopen(os.memfd_create("stderr"), "w+b", buffering=0))
        with contextlib.suppress(OSError):  # without a stderr there is nothing to hold back
            stack.callback(_give_back, os.dup(2), held.fileno())
            os.dup2(held.fileno(), 2)
        try:
            yield
        except BaseException as error:
            if isinstance(error, WarmfrontError) or not (isinstance(error, Exception) or _panic(error)):
                raise
            held.truncate(0)
            raise ModelError(f"{what} ({error}); {advice}") from error


def _give_back(stderr: int, held: int) -> None:
    """Make `stderr` the process's again, and write to it what was held back."""
    os.dup2(stderr, 2)
    os.close(stderr)
    with contextlib.suppress(OSError):
        os.write(2, os.pread(held, os.fstat(held).st_size, 0))


def _panic(error: BaseException) -> bool:
    return type(error).__name__ == "PanicException"  # the library does not export it
