"""What the user sees on stderr: notes and progress bars; bars only on a terminal."""

import io
import os
import sys
import time
from types import TracebackType
from typing import Self

import click

__all__ = ["Bars", "prepare_output", "say"]

_WIDTH, _MIN_WIDTH = 30, 5
_COLUMNS = 80  # where nothing tells the width


def say(message: str) -> None:
    """Print a note."""
    click.echo(message, err=True)


def prepare_output() -> None:
    """Print "?" for a character that the encoding of stdout or stderr lacks."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")


def _columns() -> int:
    """$COLUMNS, else the width of the terminal behind stderr."""
    try:
        return int(os.environ.get("COLUMNS", 0)) or os.get_terminal_size(sys.stderr.fileno()).columns or _COLUMNS
    except (OSError, ValueError):
        return _COLUMNS


class Bars:
    """A progress bar that is redrawn in place and erased at the end; a context manager."""

    def __init__(self) -> None:
        self._line = ""
        self._on_terminal = sys.stderr is not None and sys.stderr.isatty()
        self._start: tuple[float, int] | None = None

    def show(self, what: str, done: int, total: int) -> None:
        """Draw `done` of `total` bytes of `what`; nothing is left of a bar that is full."""
        self._draw(what, done, total, f"{done / 1e6:.0f} of {total / 1e6:.0f} MB")
        if done >= total:
            self.close()

    def count(self, what: str, done: int, total: int) -> None:
        """Draw `done` of `total` tokens of `what`, and the rate since the first call."""
        now = time.monotonic()
        start, first = self._start = self._start or (now, done)
        rate = f", {(done - first) / (now - start):,.0f} a second" if done > first else ""
        self._draw(what, done, total, f"{done:,} of {total:,} tokens{rate}")

    def last(self, what: str, passed: float, left: float) -> None:
        """Draw how far `what` has come in time: seconds passed, and an estimate of those left."""
        self._draw(what, round(passed), round(passed + left), f"{left:.0f} s left")

    def _draw(self, what: str, done: int, total: int, numbers: str) -> None:
        if not self._on_terminal or not total:
            return
        # A line that reaches the last column would wrap, and could not be erased.
        columns = _columns() - 1
        width = min(_WIDTH, columns - len(f"{what} [] {numbers}"))
        filled = width * done // total
        bar = f"[{'#' * filled}{'.' * (width - filled)}] " if width >= _MIN_WIDTH else ""
        line = f"{what} {bar}{numbers}"[:columns]
        if line != self._line:
            sys.stderr.write("\r" + line.ljust(len(self._line)))
            sys.stderr.flush()
            self._line = line

    def close(self) -> None:
        """Erase the bar."""
        if self._line:
            sys.stderr.write("\r" + " " * len(self._line) + "\r")
            sys.stderr.flush()
            self._line = ""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()
