"""A command on a pseudo-terminal that is its controlling terminal, as in a shell: Ctrl-C and Ctrl-D work."""

import os
import pty
import select
import subprocess
import sys
import time
from collections.abc import Sequence
from types import TracebackType
from typing import Self

CTRL_C, CTRL_D = "\x03", "\x04"
_ATTACH = "import fcntl, os, sys, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0); os.execv(sys.argv[1], sys.argv[1:])"


class Terminal:
    """A command to type to and read from; a context manager that ends it. `text` is all that was shown."""

    def __init__(self, command: Sequence[str], kind: str = "dumb") -> None:
        self._master, slave = pty.openpty()
        self.text = ""
        self.process = subprocess.Popen(
            [sys.executable, "-c", _ATTACH, *command],
            stdin=slave,
            stdout=slave,
            stderr=slave,
            start_new_session=True,
            env=os.environ | {"TERM": kind},
        )
        os.close(slave)

    def press(self, keys: str) -> None:
        os.write(self._master, keys.encode())

    def read_until(self, wanted: str, timeout: float = 30) -> str:
        """Read until the new text contains `wanted`; returns the new text. Fails after `timeout` seconds."""
        deadline = time.monotonic() + timeout
        fresh = ""
        while wanted not in fresh:
            fresh += (piece := self._read(deadline, repr(wanted)))
            assert piece, f"ended before {wanted!r}: {self.text!r}"
        return fresh

    def _read(self, deadline: float, wanted: str) -> str:
        """The text that is shown next; empty if the other side is closed."""
        ready, _, _ = select.select([self._master], [], [], max(0, deadline - time.monotonic()))
        assert ready, f"{wanted} did not come in time after {self.text!r}"
        try:
            piece = os.read(self._master, 4096).decode(errors="replace")
        except OSError:
            return ""
        self.text += piece
        return piece

    def wait(self, timeout: float = 10) -> int:
        """The exit code, after reading what is still shown."""
        deadline = time.monotonic() + timeout
        while self._read(deadline, "the end"):
            pass
        return self.process.wait(max(0.1, deadline - time.monotonic()))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        os.close(self._master)
