"""A Chrome trace (chrome://tracing, ui.perfetto.dev) of where each token's time goes: processes by layers.

From the timing records that the compiled pass and the workers leave anyway. One row for the coordinator's first thread
(norm, q, k and v; attention; output; predictor; post; wait; merge), one for each worker (its part of the layer) and one
more for the groups that move to it.
Format: https://docs.google.com/document/d/1CvAClvFfyA5R-PhYUmn5OOQtYMH4h6I0nSsKchNAySU (JSON object format).
"""

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import numpy.typing as npt

from warmfront.coordinator.front import Transfer
from warmfront.shared.errors import ResourceError

__all__ = ["Trace"]

_PARTS = ("qkv", "attention", "output", "predictor", "post")
Times = npt.NDArray[np.int64]


class Trace:
    """Collects jobs and writes them when closed. Raises ResourceError if `path` cannot be written."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file = self._open()
        self._jobs: list[tuple[int, int, Times, Times]] = []

    def _open(self) -> TextIO:
        try:
            return self._path.open("w", encoding="utf-8")
        except OSError as error:
            raise ResourceError(f"cannot write the trace {self._path}: {error.strerror}") from error

    def note(self, position: int, tokens: int, times: Times, spans: Times) -> None:
        """A job of `tokens` tokens at `position`; int64 [layers, steps] and [layers, workers, 2], ns."""
        self._jobs.append((position, tokens, times.copy(), spans.copy()))

    def close(self, workers: Mapping[str, int], transfers: Iterable[Transfer]) -> None:
        """Write the file, unless there was no job; `workers`: name -> pid, in the order of the board.

        Raises ResourceError if it cannot be written.
        """
        if not self._jobs:
            self._file.close()
            self._path.unlink()
            return
        try:
            with self._file as file:
                file.write('{"displayTimeUnit": "ns", "traceEvents": [\n')
                file.write(",\n".join(json.dumps(event) for event in self._events(workers, transfers)))
                file.write("\n]}\n")
        except OSError as error:
            raise ResourceError(f"cannot write the trace {self._path}: {error.strerror}") from error

    def _events(self, workers: Mapping[str, int], transfers: Iterable[Transfer]) -> Iterator[dict[str, Any]]:
        pids = [os.getpid(), *workers.values()]
        for pid, name in zip(pids, ("coordinator", *workers), strict=True):
            yield {"ph": "M", "name": "process_name", "pid": pid, "tid": 0, "args": {"name": name}}
        start = self._jobs[0][2][0, 0] if self._jobs else 0

        def event(name: str, pid: int, first: int, last: int, args: dict[str, int], row: int = 0) -> dict[str, Any]:
            span = {"ts": (int(first) - int(start)) / 1e3, "dur": max(0, int(last) - int(first)) / 1e3}
            return {"ph": "X", "name": name, "pid": pid, "tid": row, **span, "args": args}

        for transfer in transfers:
            args = {"groups": transfer.groups}
            yield event("move", pids[1 + transfer.worker], transfer.began, transfer.ended, args, 1)

        for position, tokens, times, spans in self._jobs:
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
