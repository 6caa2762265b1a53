"""What the user sees on stderr: notes and progress bars; bars only on a terminal."""

import io
import os
import sys
import time
from types import TracebackType
from typing import Self

import click

__all__ = ["Bars", "prepare_output", "say"]

_WIDTH, _LEAST_WIDTH = 30, 5
_USUAL = 80


def say(message: str) -> None:
    """Print a note."""
    click.echo(message, err=True)


def prepare_output() -> None:
    """Have a character that the terminal's encoding lacks come out as "?"."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")


def _columns() -> int:
    """The width of the terminal behind stderr, or what $COLUMNS says."""
    try:
        return int(os.environ.get("COLUMNS", 0)) or os.get_terminal_size(sys.stderr.fileno()).columns or _USUAL
    except (OSError, ValueError):
        return _USUAL


class Bars:
    """A progress bar that is redrawn in place and gone when done; a context manager."""

    def __init__(self) -> None:
        self._shown = ""
        self._live = sys.stderr is not None and sys.stderr.isatty()
        self._began: tuple[float, int] | None = None

    def show(self, what: str, done: int, total: int) -> None:
        """Draw `done` of `total` bytes of `what`."""
        self._draw(what, done, total, f"{done / 1e6:.0f} of {total / 1e6:.0f} MB")

    def count(self, what: str, done: int, total: int) -> None:
        """Draw `done` of `total` tokens of `what`, and how many of them a second."""
        now = time.monotonic()
        began, first = self._began = self._began or (now, done)
        rate = f", {(done - first) / (now - began):,.0f} a second" if done > first else ""
        self._draw(what, done, total, f"{done:,} of {total:,} tokens{rate}")

    def last(self, what: str, passed: float, left: float) -> None:
        """Draw how far in time `what` has come: seconds passed, and those to come as far as can be told."""
        self._draw(what, round(passed), round(passed + left), f"{left:.0f} s left")

    def _draw(self, what: str, done: int, total: int, numbers: str) -> None:
        if not self._live or not total:
            return
        # A line that reaches the last column would wrap, and stay.
        room = _columns() - 1
        width = min(_WIDTH, room - len(f"{what} [] {numbers}"))
        filled = width * done // total
        bar = f"[{'#' * filled}{'.' * (width - filled)}] " if width >= _LEAST_WIDTH else ""
        line = f"{what} {bar}{numbers}"[:room]
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
