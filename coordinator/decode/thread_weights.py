"""The weights that the coordinator's threads read, in one block of memory, sliced over the threads' NUMA nodes."""

from collections.abc import Iterator
from itertools import accumulate

import numpy as np
import numpy.typing as npt

from warmfront.coordinator.decode.row_split import portion
from warmfront.coordinator.selectors.lowbit import Lowbit
from warmfront.shared.machine.core_plan import CorePlan
from warmfront.shared.machine.memory import address, anonymous, collapse
from warmfront.shared.machine.numa import bind, pages_by_node
from warmfront.shared.model.store import PackedModel

__all__ = ["ThreadWeights"]

_ALIGN = 64


class ThreadWeights:
    """A block of memory for the tensors, filled by the threads."""

    def __init__(
        self,
        model: PackedModel,
        lowbit: Lowbit | None,
        selector: str,
        cores: CorePlan,
        cuts: npt.NDArray[np.int64],
    ) -> None:
        """All tensors but bundles and unused predictors; pages are bound by the present `cuts` (see `RowSplit`)."""
        self._spec, self._cuts, self._threads = model.spec, cuts.copy(), len(cuts) - 1
        idle = (".ffn",) if selector == "lowrank" else (".ffn", ".fc1", ".fc2")
        apart = ("tokenizer", "profile", "places")
        # The file that each tensor is read from.
        self.files = {n: model for n in model.entries if not n.endswith(idle) and n not in apart}
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
            entry, at = file.entries[name], first.get(name.rpartition(".")[2])
            rows = entry.shape[0]
            ends = portion(self._cuts, rows if at is None else q + 2 * kv, 8, rank)
            low, high = (min(max(end - (at or 0), 0), rows) * (entry.nbytes // rows) for end in ends)
            if low < high:
                yield name, low, high

    def _bytes_of(self, name: str, low: int, high: int) -> npt.NDArray[np.uint8]:
        start = self.at[name] - address(self._block)
        return self._block[start + low : start + high]

    def fill(self, rank: int) -> None:
        """Read a thread's rows of every tensor; in that thread, so that their pages lie near its core."""
        for name, low, high in self._rows_of(rank):
            out = self._bytes_of(name, low, high)
            self.files[name].read_into(name, out, low)
            collapse(out)
            self._loaded[rank] += high - low

    def pages(self) -> list[dict[int, int]]:
        """Of a sample of the pages of each thread's largest part, how many lie on which NUMA node."""
        largest = (max(self._rows_of(m), key=lambda part: part[2] - part[1]) for m in range(self._threads))
        return [pages_by_node(self._bytes_of(*part)) for part in largest]
