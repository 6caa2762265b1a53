"""Read bandwidth of the memory, as the decoding threads see it: the upper bound of every tok/s.

Each thread, pinned to a core of its own, sums its share of a block that fits no cache. On a shared machine the
bandwidth changes within seconds: measure it next to the speed that it is to explain.
"""

import threading
import time
from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

from warmfront.shared.errors import ResourceError
from warmfront.shared.kernels.jit import kernel
from warmfront.shared.machine.memory import anonymous
from warmfront.shared.machine.numa import bind, free_on
from warmfront.shared.machine.process import pin
from warmfront.shared.machine.topology import read_topology

__all__ = ["Bandwidth"]

Values = npt.NDArray[np.int64]

_BYTES = 1 << 30


@kernel
def _total(values: Values) -> int:
    total = 0
    for i in range(len(values)):
        total += values[i]
    return total


class Bandwidth:
    """Measures with one thread on each of `cpus`; holds a block of 1 GiB meanwhile, less where little is free.

    `node`: the node whose memory is read, None = wherever the threads' first touch puts it. Raises ResourceError, here
    and in `measure`, if one of the cpus may not be used any more.
    """

    def __init__(self, cpus: Sequence[int], node: int | None = None) -> None:
        self._cpus = list(cpus)
        free = read_topology().available_bytes if node is None else free_on(node)
        self._block = anonymous(max(min(_BYTES, free // 8), 1 << 20) // 4096 * 4096, huge=True)
        if node is not None:
            bind(self._block, node)
        self._each(lambda values: values.fill(1))
        _total(self._block[:8].view(np.int64))  # compiles

    def measure(self) -> float:
        """GB/s of reading the block once."""
        return self._block.nbytes / self._each(_total) / 1e9

    def _each(self, act: Callable[[Values], object]) -> float:
        """Have every thread `act` on its share of the block; returns the seconds until all are done."""
        shares = np.array_split(self._block.view(np.int64), len(self._cpus))
        gate = threading.Barrier(len(shares) + 1)
        errors: list[ResourceError] = []

        def run(cpu: int, values: Values) -> None:
            try:
                pin([cpu])
            except ResourceError as error:
                errors.append(error)
            gate.wait()
            if not errors:
                act(values)

        threads = [threading.Thread(target=run, args=each) for each in zip(self._cpus, shares, strict=True)]
        for thread in threads:
            thread.start()
        gate.wait()
        started = time.perf_counter()
        for thread in threads:
            thread.join()
        if errors:
            raise errors[0]
        return time.perf_counter() - started
