"""Loading a tokenizer.json with the tokenizers library, and turning the library's errors into lines.

The library raises bare Exceptions. Where its Rust code panics, for example when a regular expression of the file
backtracks for too long, it raises PanicException, which is a BaseException, and writes to stderr by itself.
"""

import contextlib
import os
from collections.abc import Iterator

from tokenizers import Tokenizer

from warmfront.shared.errors import ModelError, WarmfrontError

__all__ = ["load_tokenizer", "one_line_errors"]


def load_tokenizer(text: str) -> Tokenizer:
    """The tokenizer, without truncation and padding, which training may have left in the file; as in transformers."""
    tokenizer = Tokenizer.from_str(text)
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


@contextlib.contextmanager
def one_line_errors(what: str, advice: str) -> Iterator[None]:
    """Raise ModelError "what (why); advice" for any error of the block that is not warmfront's own.

    What the block writes to stderr is held back until it ends, and dropped if it fails.
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
    """Restore `stderr` as the process's, and write to it what was held back."""
    os.dup2(stderr, 2)
    os.close(stderr)
    with contextlib.suppress(OSError):
        os.write(2, os.pread(held, os.fstat(held).st_size, 0))


def _panic(error: BaseException) -> bool:
    return type(error).__name__ == "PanicException"  # the library does not export it
