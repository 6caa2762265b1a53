"""The board: the one mapping through which the coordinator hands feed-forward jobs to the workers.

    byte 0      ┌──────────────────────────────────────────────────────────────┐
                │ header   magic "WARMFRNT", version, workers, layers, groups, │
                │          hidden, max_tokens: one int64 each after the magic  │
    128         ├──────────────────────────────────────────────────────────────┤
                │ abort    a word: not 0 = every wait ends at once             │
    256         ├──────────────────────────────────────────────────────────────┤
                │ job      a handoff line: sequence, sleepers                  │
    384         ├──────────────────────────────────────────────────────────────┤
                │ order    layer (-1: leave the loop), tokens, lanes, measure  │
    512         ├──────────────────────────────────────────────────────────────┤
                │ owner    uint8 [layers, groups]: index of the worker that    │
                │          computes the group; padded to 128                   │
                ├──────────────────────────────────────────────────────────────┤
                │ mask     uint32 [groups]: with a predicting selector, bit i  │
                │          = compute neuron i of the group; padded to 128      │
                ├──────────────────────────────────────────────────────────────┤
                │ x        float32 [panels, hidden, lanes]: the input, room    │
                │          for max_tokens tokens; padded to 128                │
                ├──────────────────────────────────────────────────────────────┤
    for each    │ done     a handoff line: sequence of the last job finished   │
    worker      │ record   start ns, end ns, neurons, bytes of that job        │
                │ y        float32 like x: its part of the feed-forward sum    │
                └──────────────────────────────────────────────────────────────┘

The coordinator writes order, mask and x, then announces job = n. Each worker computes the groups that `owner` gives it,
writes y and its record, then announces done = n. The coordinator adds the parts up. It changes `owner` only while
no job is under way. Everything is in the machine's byte order: the board never leaves the machine.

The mask holds for single tokens; several are computed densely. With `measure` set, the workers also compute the neurons
that were not selected and note what the selection missed (`messages.LoadReport`).

Lanes: a single token has one lane; several tokens come 16 to a panel (see `kernels.py`).
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from warmfront.shared.errors import ProtocolError
from warmfront.shared.memory import address

__all__ = ["ABORT_AT", "JOB_AT", "LEAVE", "ORDER_AT", "Board", "BoardSizes"]

MAGIC = b"WARMFRNT"
VERSION = 2
LINE = 128
ABORT_AT, JOB_AT, ORDER_AT, OWNER_AT = 128, 256, 384, 512
# The layer of a job that tells the workers to leave their loop.
LEAVE = -1


def _padded(size: int) -> int:
    return -(-size // LINE) * LINE


@dataclass(frozen=True, slots=True)
class BoardSizes:
    """What determines the layout; `max_tokens` is a multiple of 16."""

    workers: int
    layers: int
    groups: int
    hidden: int
    max_tokens: int

    @property
    def mask_at(self) -> int:
        """Offset of the mask."""
        return OWNER_AT + _padded(self.layers * self.groups)

    @property
    def x_at(self) -> int:
        """Offset of x."""
        return self.mask_at + _padded(4 * self.groups)

    @property
    def vector_bytes(self) -> int:
        """Bytes of x, and of each y."""
        return _padded(4 * self.hidden * self.max_tokens)

    def worker_at(self, index: int) -> int:
        """Offset of worker `index`'s done line; its record and y follow."""
        return self.x_at + self.vector_bytes + index * (2 * LINE + self.vector_bytes)

    @property
    def total(self) -> int:
        """Bytes of the whole board."""
        return self.worker_at(self.workers)


class Board:
    """Views of a mapped board.

    `Board.create(mapping, sizes)` writes the header, `Board.attach(mapping)` reads and checks it; the mapping is
    uint8 [total].
    """

    def __init__(self, mapping: npt.NDArray[np.uint8], sizes: BoardSizes) -> None:
        self.mapping = mapping
        self.sizes = sizes
        self.base = address(mapping)
        words = mapping[:OWNER_AT].view(np.int64)
        self.abort = words[ABORT_AT // 8 : ABORT_AT // 8 + 1]
        self.job = words[JOB_AT // 8 : JOB_AT // 8 + 2]
        self.order = words[ORDER_AT // 8 : ORDER_AT // 8 + 4]
        count = sizes.layers * sizes.groups
        self.owner = mapping[OWNER_AT : OWNER_AT + count].reshape(sizes.layers, sizes.groups)
        self.mask = mapping[sizes.mask_at : sizes.mask_at + 4 * sizes.groups].view(np.uint32)
        self.x = self._vector(sizes.x_at)
        self.done = [self._words(index, 0, 2) for index in range(sizes.workers)]
        self.record = [self._words(index, LINE, 4) for index in range(sizes.workers)]
        self.y = [self._vector(sizes.worker_at(index) + 2 * LINE) for index in range(sizes.workers)]

    @classmethod
    def create(cls, mapping: npt.NDArray[np.uint8], sizes: BoardSizes) -> "Board":
        """Lay out a zeroed mapping of `sizes.total` bytes."""
        fields = (VERSION, sizes.workers, sizes.layers, sizes.groups, sizes.hidden, sizes.max_tokens)
        mapping[:8] = np.frombuffer(MAGIC, np.uint8)
        mapping[8 : 8 + 8 * len(fields)].view(np.int64)[:] = fields
        return cls(mapping, sizes)

    @classmethod
    def attach(cls, mapping: npt.NDArray[np.uint8]) -> "Board":
        """Read the header of a mapped board; raises ProtocolError if it is none, or of another version."""
        if mapping.size < OWNER_AT or mapping[:8].tobytes() != MAGIC:
            raise ProtocolError("the shared memory handed over is no board")
        version, *fields = (int(v) for v in mapping[8:64].view(np.int64))
        sizes = BoardSizes(*fields[:5])
        if version != VERSION or mapping.size != sizes.total:
            raise ProtocolError(f"board of version {version} and {mapping.size} bytes: this is version {VERSION}")
        return cls(mapping, sizes)

    def _words(self, index: int, offset: int, count: int) -> npt.NDArray[np.int64]:
        start = self.sizes.worker_at(index) + offset
        return self.mapping[start : start + 8 * count].view(np.int64)

    def _vector(self, start: int) -> npt.NDArray[np.float32]:
        size = 4 * self.sizes.hidden * self.sizes.max_tokens
        return self.mapping[start : start + size].view(np.float32)
