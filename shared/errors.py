"""Every error that warmfront raises on purpose.

    WarmfrontError            exit code 1
    ├── UsageError            exit code 2: the request makes no sense (counts, sizes, options, prompt length)
    ├── ModelError            the model file is missing, damaged or of an unsupported kind
    │   └── DamagedError      a packed file in the cache is not what was written: it is made again
    ├── ResourceError         memory, disk or device cannot hold what was asked for
    ├── ProtocolError         a message or board that does not fit the protocol
    ├── BusyError             as many requests as may are waiting: later this one will be taken
    └── WorkerError           a worker process died, failed or went silent

A message is one line that says what is wrong and what to do about it; the CLI prints it without a traceback.
"""

__all__ = [
    "BusyError",
    "DamagedError",
    "ModelError",
    "ProtocolError",
    "ResourceError",
    "UsageError",
    "WarmfrontError",
    "WorkerError",
]

# Characters of a message; the middle of a longer one is left out.
MAX_LENGTH = 2000


class WarmfrontError(Exception):
    """Base of the tree. `exit_code` is what the CLI returns."""

    exit_code = 1

    def __str__(self) -> str:
        """The message in one line that a terminal can show, though it may quote a hostile file."""
        text = super().__str__()
        short = text if len(text) <= MAX_LENGTH else f"{text[: MAX_LENGTH // 2]} ... {text[-MAX_LENGTH // 2 :]}"
        return "".join(c if c.isprintable() else "?" for c in short)


class UsageError(WarmfrontError):
    """The request itself is wrong; nothing was started."""

    exit_code = 2


class ModelError(WarmfrontError):
    """The model cannot be read or is of a kind that warmfront does not run."""


class DamagedError(ModelError):
    """A packed file of the cache is not what was written; what it was made from is not at fault."""


class ResourceError(WarmfrontError):
    """The machine cannot hold what was asked for."""


class ProtocolError(WarmfrontError):
    """Two processes disagree on a message or on the board."""


class BusyError(WarmfrontError):
    """As many requests as may are waiting already; later this one will be taken."""


class WorkerError(WarmfrontError):
    """A worker process died, reported an error or stopped answering."""
