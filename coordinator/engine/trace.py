"""A Chrome trace (chrome://tracing, ui.perfetto.dev) of where each token's time goes: processes by layers.

From the timing records that the compiled pass and the workers leave anyway. One row for the coordinator's first thread
(norm, q, k and v; attention; output; predictor; post; wait; merge), one for each worker (its part of the layer) and one
more for the groups that move to it.
Format: https://docs.google.com/document/d/1CvAClvFfyA5R-PhYUmn5OOQtYMH4h6I0nSsKchNAySU (JSON object format).
"""

import contextlib
import json
import os
import stat
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import numpy.typing as npt

from warmfront.coordinator.balancing.flow import Transfer
from warmfront.shared.errors import ResourceError
from warmfront.shared.files import published

__all__ = ["Trace"]

_PARTS = ("qkv", "attention", "output", "predictor", "post")
Times = npt.NDArray[np.int64]


class Trace:
    """Collects jobs in a nameless file and writes them to `path` when closed: it is replaced as a whole or not at all.

    A link is followed; a pipe or device is written through. Raises ResourceError if `path` cannot be written.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._shapes: tuple[tuple[int, ...], tuple[int, ...]] | None = None
        self._closing = contextlib.ExitStack()
        with self._explained():
            self._stream = self._open_stream()
            folder = os.path.dirname(os.path.realpath(path)) if self._stream is None else None
            self._spool = self._closing.enter_context(tempfile.TemporaryFile(dir=folder))  # noqa: SIM115

    def _open_stream(self) -> TextIO | None:
        """What is written to as it is; None for a file that is replaced, or is not there yet."""
        try:
            status = self._path.stat()
        except FileNotFoundError:
            return None
        if not stat.S_ISREG(status.st_mode):
            return self._closing.enter_context(self._path.open("w", encoding="utf-8"))
        if not os.access(self._path, os.W_OK):
            raise PermissionError(None, "the file is read-only")
        if any(os.path.samestat(status, os.fstat(fd)) for fd in (1, 2)):
            raise PermissionError(None, "the output goes there")
        return None

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            self._closing.close()
            raise ResourceError(f"cannot write the trace {self._path}: {error.strerror}") from error

    def note(self, position: int, tokens: int, times: Times, spans: Times) -> None:
        """A job of `tokens` tokens at `position`; int64 [layers, steps] and [layers, workers, 2], ns."""
        self._shapes = times.shape, spans.shape
        with self._explained():
            self._spool.write(np.concatenate(([position, tokens], times.ravel(), spans.ravel())).tobytes())

    def close(self, workers: Mapping[str, int], transfers: Iterable[Transfer]) -> None:
        """Write the file, unless there was no job; `workers`: name -> pid, in the order of the board.

        Raises ResourceError if it cannot be written.
        """
        with self._explained(), self._closing:
            if self._shapes is None:
                return
            lines = map(json.dumps, self._events(workers, transfers))
            if self._stream is not None:
                _write(self._stream, lines)
                return
            with (
                published(Path(os.path.realpath(self._path))) as fd,
                open(fd, "w", encoding="utf-8", closefd=False) as file,
            ):
                _write(file, lines)

    def _jobs(self) -> Iterator[tuple[int, int, Times, Times]]:
        """What was noted, one job at a time."""
        assert self._shapes is not None
        first, second = self._shapes
        cut = 2 + int(np.prod(first))
        self._spool.seek(0)
        while record := self._spool.read(8 * (cut + int(np.prod(second)))):
            numbers = np.frombuffer(record, np.int64)
            yield int(numbers[0]), int(numbers[1]), numbers[2:cut].reshape(first), numbers[cut:].reshape(second)

    def _events(self, workers: Mapping[str, int], transfers: Iterable[Transfer]) -> Iterator[dict[str, Any]]:
        pids = [os.getpid(), *workers.values()]
        for pid, name in zip(pids, ("coordinator", *workers), strict=True):
            yield {"ph": "M", "name": "process_name", "pid": pid, "tid": 0, "args": {"name": name}}
        start = next(self._jobs())[2][0, 0]

        def event(name: str, pid: int, first: int, last: int, args: dict[str, int], row: int = 0) -> dict[str, Any]:
            span = {"ts": (int(first) - int(start)) / 1e3, "dur": max(0, int(last) - int(first)) / 1e3}
            return {"ph": "X", "name": name, "pid": pid, "tid": row, **span, "args": args}

        for transfer in transfers:
            args = {"groups": transfer.groups}
            yield event("move", pids[1 + transfer.worker], transfer.began, transfer.ended, args, 1)

        for position, tokens, times, spans in self._jobs():
            for layer, (steps, parts) in enumerate(zip(times, spans, strict=True)):
                args = {"layer": layer, "position": position, "tokens": tokens}
                for name, first, last in zip(_PARTS, steps, steps[1:], strict=False):
                    yield event(name, pids[0], first, last, args)
                posted, merged = steps[len(_PARTS) :]
                answered = min(max(posted, parts[:, 1].max()), merged)
                yield event("wait", pids[0], posted, answered, args)
                yield event("merge", pids[0], answered, merged, args)
                for pid, (first, last) in zip(pids[1:], parts, strict=True):
                    yield event("feed-forward", pid, first, last, args)


def _write(file: TextIO, lines: Iterator[str]) -> None:
    file.write('{"displayTimeUnit": "ns", "traceEvents": [\n' + next(lines))
    file.writelines(f",\n{line}" for line in lines)
    file.write("\n]}\n")
    file.flush()
