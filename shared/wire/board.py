"""The board: the one mapping through which the coordinator hands feed-forward jobs to the workers.

    byte 0      ┌────────────────────────────────────────────────────────────────┐
                │ header      magic "WARMFRNT", version, workers, layers,        │
                │             groups, hidden, max_tokens, noted, branches:       │
                │             one int64 each                                     │
    128         ├────────────────────────────────────────────────────────────────┤
                │ abort       a word: not 0 = every wait ends at once            │
    256         ├────────────────────────────────────────────────────────────────┤
                │ job         a handoff line: sequence, sleepers                 │
    384         ├────────────────────────────────────────────────────────────────┤
                │ descriptor  of the job: layer (-1: quit), tokens, lanes,       │
                │             whether to compare the selection, ns when it was   │
                │             announced                                          │
    512         ├────────────────────────────────────────────────────────────────┤
                │ owner       uint8 [layers, groups]: index of the worker that   │
                │             computes the group; padded to 128                  │
                ├────────────────────────────────────────────────────────────────┤
                │ mask        uint32 [16, layers, groups]: with a predicting     │
                │             selector, bit i = compute neuron i of the group,   │
                │             for each token of a batch; padded                  │
                ├────────────────────────────────────────────────────────────────┤
                │ computed    uint32 [16, layers, groups]: bit i = neuron i was  │
                │             computed whole, for the last batch; padded         │
                ├────────────────────────────────────────────────────────────────┤
                │ uses        uint8 [16, layers, branches]: 1 where a token of   │
                │             the last batch uses the branch; padded             │
                ├────────────────────────────────────────────────────────────────┤
                │ noted       uint16: what is noted of a prompt's neurons, if    │
                │             anything (`shared/model/noted.py`)                 │
                ├────────────────────────────────────────────────────────────────┤
                │ x           float32 [panels, hidden, lanes]: the input, room   │
                │             for max_tokens tokens; padded to 128               │
                │ inverse     float32 [max_tokens]: 1 / unit of each token's     │
                │             sums (`shared/kernels/exact_sums.py`); padded      │
                │ routing     float32 [max_tokens, branches]: the weight of each │
                │             branch (`shared/model/branches.py`) for the token, │
                │             0: it does not use it; of branch 0 always 1; padded│
                ├────────────────────────────────────────────────────────────────┤
    for each    │ done        a handoff line: sequence of the last job finished  │
    worker      │ record      start ns, end ns, neurons, bytes of that job       │
                │ quit        a word: not 0 = the worker's waits end at once     │
                │ slot        int32 [layers, groups]: where in its memory the    │
                │             group lies; only that of owned groups counts       │
                │ requested   uint32 [16, layers, groups]: the neurons that it   │
                │             was asked for, of the last batch                   │
                │ y           int64 like x: its part of the feed-forward sums,   │
                │             in units                                           │
                └────────────────────────────────────────────────────────────────┘

The coordinator writes descriptor, mask, x, inverse and routing, then announces job = n. Each worker computes the groups
that `owner` gives it of the branches that the tokens use, writes computed, requested, y and its record, then announces
done = n. The coordinator adds the parts up. It changes `owner` and `slot` only while no job is under way: that is how a
group moves, all at once. Everything is in the machine's byte order: the board never leaves the machine.

Lanes: 1 for a batch of decoded tokens, 16 for a prompt's in panels (`shared/model/panels.py`). The mask holds for a
batch, each token by its own; panels are computed densely. With experts it is only for the coordinator, what the router
has chosen, as are the uses, and `computed` counts where it has bits. If the selection is to be compared, which only a
single token can ask for, the workers compute the gates that were not selected, too, and count what the selection missed
(`messages.LoadReport`). Notes are made of the tokens of panels.
"""

import dataclasses
import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from warmfront.shared.errors import ProtocolError
from warmfront.shared.machine.memory import address
from warmfront.shared.model.bundle import GROUP
from warmfront.shared.model.noted import Noted
from warmfront.shared.model.panels import BATCH, LANES

__all__ = [
    "ALL_NEURONS",
    "ANNOUNCED_NS",
    "COMPARE_SELECTION",
    "JOB_LANES",
    "JOB_TOKENS",
    "LAYER",
    "QUIT",
    "Board",
    "BoardSizes",
]

MAGIC = b"WARMFRNT"
VERSION = 9
LINE = 128
ABORT_AT, JOB_AT, DESCRIPTOR_AT, OWNER_AT = 128, 256, 384, 512
# Words of the descriptor.
LAYER, JOB_TOKENS, JOB_LANES, COMPARE_SELECTION, ANNOUNCED_NS = range(5)
# A word of a mask: the whole group.
ALL_NEURONS = 0xFFFFFFFF
# The layer of a job that tells the workers to quit their loop.
QUIT = -1


def _padded(size: int) -> int:
    return -(-size // LINE) * LINE


@dataclass(frozen=True, slots=True)
class BoardSizes:
    """What determines the layout."""

    workers: int
    layers: int
    # Groups of neurons of a layer.
    groups: int
    hidden: int
    # Tokens of the longest job, a multiple of 16.
    max_tokens: int
    # One of `Noted`.
    noted: int = Noted.NOTHING
    # Of a layer's feed-forward: see `shared/model/branches.py`.
    branches: int = 1

    @property
    def words_bytes(self) -> int:
        """Bytes of four for each group of each layer."""
        return _padded(4 * self.layers * self.groups)

    @property
    def masks_bytes(self) -> int:
        """The same for each token of a batch."""
        return _padded(4 * BATCH * self.layers * self.groups)

    @property
    def mask_at(self) -> int:
        """Offset of the mask."""
        return OWNER_AT + _padded(self.layers * self.groups)

    @property
    def uses_at(self) -> int:
        """Offset of the uses."""
        return self.mask_at + 2 * self.masks_bytes

    @property
    def noted_at(self) -> int:
        """Offset of the notes."""
        return self.uses_at + _padded(BATCH * self.layers * self.branches)

    @property
    def noted_shape(self) -> tuple[int, ...]:
        """Of the notes; [layers, 0] if there are none."""
        shapes = {
            Noted.NOTHING: (0,),
            Noted.FIRING: (self.groups, GROUP, self.max_tokens // LANES),
            Noted.MAGNITUDES: (self.max_tokens, self.groups * GROUP),
        }
        return self.layers, *shapes[Noted(self.noted)]

    @property
    def x_at(self) -> int:
        """Offset of x."""
        return self.noted_at + _padded(2 * math.prod(self.noted_shape))

    @property
    def inverse_at(self) -> int:
        """Offset of inverse."""
        return self.x_at + _padded(4 * self.hidden * self.max_tokens)

    @property
    def routing_at(self) -> int:
        """Offset of routing."""
        return self.inverse_at + _padded(4 * self.max_tokens)

    def worker_at(self, index: int) -> int:
        """Offset of worker `index`'s done line; its other parts follow."""
        y_bytes = _padded(8 * self.hidden * self.max_tokens)
        first = self.routing_at + _padded(4 * self.max_tokens * self.branches)
        return first + index * (3 * LINE + self.words_bytes + self.masks_bytes + y_bytes)

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
        self.descriptor = words[DESCRIPTOR_AT // 8 : DESCRIPTOR_AT // 8 + 5]
        count = sizes.layers * sizes.groups
        self.owner = mapping[OWNER_AT : OWNER_AT + count].reshape(sizes.layers, sizes.groups)
        self.mask = self._masks(sizes.mask_at)
        self.computed = self._masks(sizes.mask_at + sizes.masks_bytes)
        uses = mapping[sizes.uses_at : sizes.uses_at + BATCH * sizes.layers * sizes.branches]
        self.uses = uses.reshape(BATCH, sizes.layers, sizes.branches)
        noted = mapping[sizes.noted_at : sizes.noted_at + 2 * math.prod(sizes.noted_shape)]
        self.noted = noted.view(np.uint16).reshape(sizes.noted_shape)
        vector = sizes.hidden * sizes.max_tokens
        self.x = mapping[sizes.x_at : sizes.x_at + 4 * vector].view(np.float32)
        self.inverse = mapping[sizes.inverse_at : sizes.inverse_at + 4 * sizes.max_tokens].view(np.float32)
        routing = mapping[sizes.routing_at : sizes.routing_at + 4 * sizes.max_tokens * sizes.branches]
        self.routing = routing.view(np.float32).reshape(sizes.max_tokens, sizes.branches)
        starts = [sizes.worker_at(index) for index in range(sizes.workers)]
        self.done = [self._words(start, 2) for start in starts]
        self.record = [self._words(start + LINE, 4) for start in starts]
        self.quit = [self._words(start + 2 * LINE, 1) for start in starts]
        self.slot = [self._slots(start + 3 * LINE) for start in starts]
        self.requested = [self._masks(start + 3 * LINE + sizes.words_bytes) for start in starts]
        self.y = [self._words(start + 3 * LINE + sizes.words_bytes + sizes.masks_bytes, vector) for start in starts]

    @classmethod
    def create(cls, mapping: npt.NDArray[np.uint8], sizes: BoardSizes) -> "Board":
        """Lay out a zeroed mapping of `sizes.total` bytes."""
        fields = (VERSION, *(getattr(sizes, field.name) for field in dataclasses.fields(sizes)))
        mapping[:8] = np.frombuffer(MAGIC, np.uint8)
        mapping[8 : 8 + 8 * len(fields)].view(np.int64)[:] = fields
        return cls(mapping, sizes)

    @classmethod
    def attach(cls, mapping: npt.NDArray[np.uint8]) -> "Board":
        """Read the header of a mapped board; raises ProtocolError if it is not one, or of another version."""
        if mapping.size < OWNER_AT or mapping[:8].tobytes() != MAGIC:
            raise ProtocolError("the shared memory handed over is not a board")
        version, *fields = (int(v) for v in mapping[8 : 16 + 8 * len(dataclasses.fields(BoardSizes))].view(np.int64))
        sizes = BoardSizes(*fields)
        if version != VERSION or mapping.size != sizes.total:
            raise ProtocolError(f"board of version {version} and {mapping.size} bytes: this is version {VERSION}")
        return cls(mapping, sizes)

    def fires(self, tokens: int) -> npt.NDArray[np.bool_]:
        """Which neurons each token of the last job fires, if that is noted: bool [layers, tokens, neurons]."""
        layers, groups, neurons, panels = self.noted.shape
        bits = np.unpackbits(self.noted.view(np.uint8), bitorder="little").astype(bool)
        bits = bits.reshape(layers, groups * neurons, panels * LANES)[:, :, :tokens]
        return np.ascontiguousarray(bits.swapaxes(1, 2))

    def end(self) -> None:
        """Have every wait of every process end: nothing more will be computed on this board."""
        self.abort[0] = 1
        for word in self.quit:
            word[0] = 1

    def _words(self, start: int, count: int) -> npt.NDArray[np.int64]:
        return self.mapping[start : start + 8 * count].view(np.int64)

    def _slots(self, start: int) -> npt.NDArray[np.int32]:
        shape = self.sizes.layers, self.sizes.groups
        return self.mapping[start : start + 4 * math.prod(shape)].view(np.int32).reshape(shape)

    def _masks(self, start: int) -> npt.NDArray[np.uint32]:
        shape = BATCH, self.sizes.layers, self.sizes.groups
        return self.mapping[start : start + 4 * math.prod(shape)].view(np.uint32).reshape(shape)
