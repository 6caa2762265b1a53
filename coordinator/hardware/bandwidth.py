"""Read bandwidth of the memory, as the decoding threads see it: the upper bound of every tok/s.

Each thread, pinned to a core of its own, adds up its parts of a block that fits no cache, with nothing but vector loads
and additions. On a shared machine the bandwidth changes within seconds: measure it next to the speed that it is to
explain.
"""

import threading
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from warmfront.shared.errors import ResourceError
from warmfront.shared.kernels.atomics import clock_ns
from warmfront.shared.kernels.jit import kernel
from warmfront.shared.kernels.simd import I32, I64, call, constants, load, long, prefetch_line, vector
from warmfront.shared.machine.memory import address, anonymous, zeros
from warmfront.shared.machine.numa import bind, free_on
from warmfront.shared.machine.process import pin
from warmfront.shared.machine.topology import read_caches, read_topology
from warmfront.shared.wire.handoff import BARRIER_SPINS, LINE, Barrier, barrier

__all__ = ["Bandwidth"]

Bytes = npt.NDArray[np.uint8]
Times = npt.NDArray[np.int64]

_BYTES = 1 << 30
# A pass reads one part of the block, so that it is short and finds nothing in a cache: all others were read since.
_PARTS = 8
# Ways to read: streams that a thread reads side by side, and how many bytes ahead of each are fetched by software.
# Which is fastest differs: here 31.7, 35.4, 34.0 and 35.2 GB/s, and elsewhere all alike (docs/log.md).
_WAYS = ((1, 0), (1, 512), (4, 0), (4, 512))
_LAPS = 4  # around the block, so that each way has 8 passes
_CHUNK = 512  # bytes of one step of all streams: eight vectors, each with a sum of its own
_NUMBERS = vector(I32)  # 64 bytes


def _add_up(b: Any, at: Any, size: Any, streams: int, ahead: int) -> Any:
    """The sums, lane by lane, of `size` bytes, a multiple of _CHUNK."""
    sums = [cgutils.alloca_once_value(b, constants(0, _NUMBERS)) for _ in range(_CHUNK // 64)]
    step = _CHUNK // streams
    length = b.udiv(size, long(streams))
    with cgutils.for_range(b, b.udiv(size, long(_CHUNK)), intp=I64) as loop:
        for i, lanes in enumerate(sums):
            stream, line = divmod(64 * i, step)
            start = b.add(at, b.mul(length, long(stream)))
            offset = b.add(b.mul(loop.index, long(step)), long(line))
            if ahead:
                prefetch_line(b, b.add(b.add(start, offset), long(ahead)))
            b.store(b.add(b.load(lanes), load(b, start, offset, _NUMBERS)), lanes)
    total = b.load(sums[0])
    for lanes in sums[1:]:
        total = b.add(total, b.load(lanes))
    return total


@intrinsic
def _read(context, way, at, size):
    """The sum, modulo 2^32, of `size` bytes at address `at` as 32-bit numbers, read in one of _WAYS."""

    def build(_context, b, _signature, arguments):
        way, at, size = arguments
        result = cgutils.alloca_once_value(b, ir.Constant(I32, 0))
        for number, (streams, ahead) in enumerate(_WAYS):
            with b.if_then(b.icmp_signed("==", way, long(number))):
                lanes = _add_up(b, at, size, streams, ahead)
                b.store(call(b, "llvm.vector.reduce.add.v16i32", I32, lanes), result)
        return b.load(result)

    return types.int32(types.int64, types.int64, types.int64), build


@kernel
def _passes(team: Barrier, at: int, size: int, times: Times) -> int:
    """One thread's passes over its `size` bytes at `at`, all threads at once; returns the sum of what it read.

    times: int64 [passes, 2], gets when each began and ended, ns on the monotonic clock.
    """
    part = size // _PARTS
    total = 0
    for i in range(len(times)):
        barrier(team)
        times[i, 0] = clock_ns()
        total += _read(i % len(_WAYS), at + i % _PARTS * part, part)
        times[i, 1] = clock_ns()
    return total


class Bandwidth:
    """Measures with one thread on each of `cpus`; holds a block of 1 GiB meanwhile, more where caches are large.

    `node`: the node whose memory is read, None = wherever the threads' first touch puts it. Raises ResourceError, here
    and in `measure`, if one of the cpus may not be used any more.
    """

    def __init__(self, cpus: Sequence[int], node: int | None = None) -> None:
        self._cpus = list(cpus)
        # A cache of 480 MB (of a host, seen through a virtual machine) served all of 128 MB, at 58 instead of 35 GB/s,
        # a sixth of 256 MB, 5 % of 512 MB, and less than 1 % of 1 GB.
        caches = sum(cache.bytes * cache.count for cache in read_caches(allowed=self._cpus))
        free = read_topology().available_bytes if node is None else free_on(node)
        unit = len(self._cpus) * _PARTS * 4 * _CHUNK  # whole chunks for each stream of each thread's part
        size = min(max(_BYTES, 2 * caches), free // 8)
        self._block = anonymous(max(size // unit, 1) * unit, huge=True)
        if node is not None:
            bind(self._block, node)
        self._shares = np.split(self._block, len(self._cpus))
        self._each(lambda thread: self._shares[thread].fill(1))
        _passes(Barrier(0, 1, 0, 0), 0, 0, np.empty((0, 2), np.int64))  # compiles

    def measure(self) -> float:
        """GB/s of the fastest of several passes in each of several ways to read; takes as long as reading 4 GB."""
        line = zeros(3 * LINE, np.uint8)  # two of the barrier, one with its abort word
        start = address(line)
        team = Barrier(start, len(self._shares), BARRIER_SPINS, start + 2 * LINE)
        times = np.zeros((len(self._shares), _LAPS * _PARTS, 2), np.int64)

        def read(thread: int) -> None:
            share = self._shares[thread]
            _passes(team, address(share), share.nbytes, times[thread])

        self._each(read)
        seconds = (times[..., 1].max(axis=0) - times[..., 0].min(axis=0)) / 1e9
        return float(self._block.nbytes / _PARTS / seconds.min() / 1e9)

    def _each(self, act: Callable[[int], object]) -> None:
        """Have every thread `act` on its share, all at once, and wait for them."""
        gate = threading.Barrier(len(self._cpus))
        errors: list[ResourceError] = []

        def run(thread: int, cpu: int) -> None:
            try:
                pin([cpu])
            except ResourceError as error:
                errors.append(error)
            gate.wait()
            if not errors:
                act(thread)

        threads = [threading.Thread(target=run, args=each) for each in enumerate(self._cpus)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if errors:
            raise errors[0]
