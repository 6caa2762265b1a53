"""What the user sees on stderr: notes and progress bars; bars only on a terminal."""

import sys
from types import TracebackType
from typing import Self

import click

__all__ = ["Bars", "say"]

_WIDTH = 30


def say(message: str) -> None:
    """Print a note."""
    click.echo(message, err=True)


class Bars:
    """A progress bar that is redrawn in place and gone when done; a context manager."""

    def __init__(self) -> None:
        self._shown = ""
        self._live = sys.stderr is not None and sys.stderr.isatty()

    def show(self, what: str, done: int, total: int) -> None:
        """Draw `done` of `total` bytes of `what`."""
        if not self._live or not total:
            return
        filled = _WIDTH * done // total
        line = f"{what} [{'#' * filled}{'.' * (_WIDTH - filled)}] {done / 1e6:.0f} of {total / 1e6:.0f} MB"
        if line != self._shown:
            sys.stderr.write("\r" + line.ljust(len(self._shown)))
            sys.stderr.flush()
            self._shown = line

    def close(self) -> None:
        """Wipe the bar."""
        if self._shown:
            sys.stderr.write("\r" + " " * len(self._shown) + "\r")
            sys.stderr.flush()
            self._shown = ""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()
