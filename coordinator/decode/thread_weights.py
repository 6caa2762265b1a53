"""The weights that the coordinator's threads read, in one block of memory, sliced over the threads' NUMA nodes."""

from collections.abc import Iterator
from itertools import accumulate

import numpy as np
import numpy.typing as npt

from warmfront.coordinator.decode.row_split import portion
from warmfront.coordinator.selectors.lowbit import Lowbit
from warmfront.shared.kernels.tiles import TILE, in_tiles, interleave
from warmfront.shared.machine.core_plan import CorePlan
from warmfront.shared.machine.memory import address, anonymous, collapse
from warmfront.shared.machine.numa import bind, pages_by_node
from warmfront.shared.model.formats import row_cols
from warmfront.shared.model.store import PackedModel
from warmfront.shared.selector import Selector

__all__ = ["ThreadWeights"]

_ALIGN = 64


class ThreadWeights:
    """A block of memory for the tensors, filled by the threads."""

    def __init__(
        self,
        model: PackedModel,
        lowbit: Lowbit | None,
        selector: Selector,
        cores: CorePlan,
        cuts: npt.NDArray[np.int64],
    ) -> None:
        """`PackedModel.resident` tensors and copies; pages are bound by the present `cuts` (see `RowSplit`)."""
        self._spec, self._cuts, self._threads = model.spec, cuts.copy(), len(cuts) - 1
        # The file that each tensor is read from.
        self.files = dict.fromkeys(model.resident(selector), model)
        if lowbit is not None:
            self.files |= dict.fromkeys(lowbit.file.entries, lowbit.file)
        sizes = [-(-file.entries[name].nbytes // _ALIGN) * _ALIGN for name, file in self.files.items()]
        offsets = accumulate(sizes, initial=0)
        self._block = anonymous(sum(sizes), huge=True)
        # The address of each tensor.
        self.at = {name: address(self._block) + offset for name, offset in zip(self.files, offsets, strict=False)}
        self._loaded = [0] * self._threads
        for rank, cpu in enumerate(cores.coordinator):
            node = cores.memory_of(cpu)
            if node is not None:
                for name, low, high in self._rows_of(rank):
                    bind(self._bytes_of(name, low, high), node)

    @property
    def nbytes(self) -> int:
        """Bytes of memory."""
        return self._block.nbytes

    @property
    def loaded(self) -> int:
        """Bytes read so far."""
        return sum(self._loaded)

    def _rows_of(self, rank: int) -> Iterator[tuple[str, int, int]]:
        """The rows that a thread will mostly read: of each tensor the range of bytes."""
        attention = self._spec.architecture.attention
        q, kv = attention.q_rows, attention.kv_rows
        first = {"q": 0, "k": q, "v": q + kv}  # of the joint rows, which are shared out together
        for name, file in self.files.items():
            rows, at = file.entries[name].shape[0], first.get(name.rpartition(".")[2])
            _, size = self._rows_kind(name)
            ends = portion(self._cuts, rows if at is None else q + 2 * kv, 8, rank)
            first_row, end_row = (min(max(end - (at or 0), 0), rows) for end in ends)
            if self._tiled(name):
                # A tile is one thread's to make.
                first_row, end_row = (row if row == rows else row // TILE * TILE for row in (first_row, end_row))
            if first_row < end_row:
                yield name, first_row * size, end_row * size

    def _rows_kind(self, name: str) -> tuple[int, int]:
        """Weight type of a tensor's rows, -1 if it has none, and the bytes of a row."""
        entry = self.files[name].entries[name]
        return -1 if entry.kind is None else int(entry.kind), entry.nbytes // entry.shape[0]

    def _tiled(self, name: str) -> bool:
        kind, _ = self._rows_kind(name)
        return kind >= 0 and bool(in_tiles(kind))

    def _bytes_of(self, name: str, low: int, high: int) -> npt.NDArray[np.uint8]:
        start = self.at[name] - address(self._block)
        return self._block[start + low : start + high]

    def fill(self, rank: int) -> None:
        """Read a thread's rows of every tensor; in that thread, so that their pages lie near its core."""
        for name, low, high in self._rows_of(rank):
            out = self._bytes_of(name, low, high)
            self.files[name].read_into(name, out, low)
            collapse(out)
            if self._tiled(name):
                kind, size = self._rows_kind(name)
                interleave(kind, address(out), (high - low) // size // TILE * TILE, row_cols(kind, size))
            self._loaded[rank] += high - low

    def pages(self) -> list[dict[int, int]]:
        """Of a sample of the pages of each thread's largest part, how many lie on which NUMA node."""
        largest = (max(self._rows_of(m), key=lambda part: part[2] - part[1]) for m in range(self._threads))
        return [pages_by_node(self._bytes_of(*part)) for part in largest]
