"""Read bandwidth of the memory, as the decoding threads see it: the ceiling of every tok/s.

Each thread, pinned to a core of its own, sums its share of a block that no cache holds. Machines are shared and their
bandwidth moves within seconds: measure it beside what it is to explain.
"""

import threading
import time
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from warmfront.shared.errors import ResourceError
from warmfront.shared.jit import kernel
from warmfront.shared.memory import anonymous
from warmfront.shared.numa import bind, free_on
from warmfront.shared.process import pin

__all__ = ["Bandwidth"]

_BYTES = 1 << 30


@kernel
def _total(values: npt.NDArray[np.int64]) -> int:
    total = 0
    for i in range(len(values)):
        total += values[i]
    return total


class Bandwidth:
    """Measures with one thread on each of `cpus`; keeps a block of 1 GiB meanwhile.

    `node`: whose memory is read, None = the threads' own; the block is smaller if little is free there.
    """

    def __init__(self, cpus: Sequence[int], node: int | None = None) -> None:
        self._cpus = list(cpus)
        size = _BYTES if node is None else min(_BYTES, free_on(node) // 8)
        self._block = anonymous(max(size, 1 << 20) // 4096 * 4096, huge=True)
        if node is not None:
            bind(self._block, node)
        self._block[:] = 1
        _total(self._block[:8].view(np.int64))

    def measure(self) -> float:
        """GB/s of reading the block once. Raises ResourceError if one of the cpus may not be used any more."""
        shares = np.array_split(self._block.view(np.int64), len(self._cpus))
        gate = threading.Barrier(len(shares) + 1)
        errors: list[ResourceError] = []

        def read(cpu: int, values: npt.NDArray[np.int64]) -> None:
            try:
                pin([cpu])
            except ResourceError as error:
                errors.append(error)
            gate.wait()
            if not errors:
                _total(values)

        threads = [threading.Thread(target=read, args=each) for each in zip(self._cpus, shares, strict=True)]
        for thread in threads:
            thread.start()
        gate.wait()
        started = time.perf_counter()
        for thread in threads:
            thread.join()
        if errors:
            raise errors[0]
        return self._block.nbytes / (time.perf_counter() - started) / 1e9
