"""The groups of a CPU worker with a RAM budget: the packed file is their home, memory is a cache of it.

The budget counts all that the worker holds of the feed-forward weights: pinned gate rows and tails, cached units, what
a prompt's groups are read into, and the readers' buffers. The rest of the process, some 150 MB of Python and compiled
code, does not depend on the model, and is not counted.
"""

import errno
import os
import threading

import numpy as np
import numpy.typing as npt

from warmfront.cpu_worker.cache_layout import cache_layout
from warmfront.cpu_worker.cache_reader import DAMAGED, FAILED, buffer_bytes, read_requests
from warmfront.cpu_worker.cache_table import (
    BYTES_READ,
    CAPACITY,
    COUNTERS,
    FREE,
    LEVELS,
    RING,
    STATE_WORDS,
    Cache,
    fill_cache,
)
from warmfront.shared.errors import ModelError, ResourceError
from warmfront.shared.kernels.by_address.records import by_address
from warmfront.shared.kernels.feed_forward.bundles import bundles_at
from warmfront.shared.kernels.fetching import as_distances
from warmfront.shared.kernels.jit import compile_for
from warmfront.shared.machine.memory import address, reserved, zeros
from warmfront.shared.machine.numa import bind, ensure_free, pages_by_node
from warmfront.shared.model.bundle import GROUP
from warmfront.shared.model.store import PackedModel
from warmfront.shared.offload import OFFLOAD_POLICIES
from warmfront.shared.selector import Work, selector_of
from warmfront.shared.wire.handoff import LINE, wake
from warmfront.shared.wire.messages import Assignment
from warmfront.shared.wire.worker_main import Places

__all__ = ["NeuronCache"]

# Threads that read: a disk behind a hypervisor gives its most requests a second to 8 at a time (docs/log.md).
_READERS = 8
# A prompt's groups are read so many at a time, and the next so many meanwhile; at most a share of the budget.
_CHUNK, _CHUNK_SHARE = 24, 1 / 16
# Waiters of a line with this in its `crowded` word sleep at once (`handoff.py`).
_ALWAYS_CROWDED = 1 << 62


class NeuronCache:
    """Opened empty; then `fill`ed, while its threads read; `stop` ends these once the word `quit` is set."""

    def __init__(self, plan: Assignment, model: PackedModel, places: npt.NDArray[np.int64], quit_at: int) -> None:
        """`places` [n, (layer, group)]: the groups whose home the worker is; `quit_at`: the word that ends all waits.

        Raises ResourceError for a budget that does not hold what the largest layer may want.
        """
        self._model, self._places, self._budget = model, places, plan.ram_budget
        layout, layers, groups = model.layout, model.spec.layers, model.layout.groups
        work = selector_of(plan.selector).work
        self._sizes = sizes = cache_layout(layout, work)
        # Groups without weights are never wanted.
        there = places[places[:, 1] < np.array(model.groups)[places[:, 0]]]
        self._there = np.zeros((layers, groups), bool)
        self._there[there[:, 0], there[:, 1]] = True
        self._file, alignment = _open_past_page_cache(model)
        try:
            chunk, capacity = self._divide(alignment)
            self._memory = reserved(layers * groups * sizes.group_bytes)
            if plan.memory_node >= 0 and bind(self._memory, plan.memory_node):
                ensure_free(plan.memory_node, plan.ram_budget)
        except BaseException:
            os.close(self._file)
            raise
        self.slot = np.arange(layers * groups, dtype=np.int32).reshape(layers, groups)
        feed_forward, distances = model.spec.architecture.feed_forward, as_distances(plan.distances)
        dense, gates = work is Work.DENSE, work is Work.GATES
        self.bundles = sizes.bundles(
            bundles_at(address(self._memory), layout, feed_forward, dense, distances, gates), layout
        )
        units = layers * groups * sizes.units
        starts, sums = model.placed_groups()
        self._lines = zeros(3 * LINE // 8, np.int64)
        self._lines[2] = _ALWAYS_CROWDED
        lines_at = address(self._lines)
        self._words = zeros(2 * LINE // 8, np.int64)
        self._failure, self._counters = np.zeros(4, np.int64), np.zeros(COUNTERS, np.int64)
        self._state = np.zeros(STATE_WORDS, np.int64)
        self._state[FREE] = self._state[CAPACITY] = min(capacity, int(self._there.sum()) * sizes.units)
        self._prior = self._rates(units)
        ends = np.arange(units + LEVELS, dtype=np.int32)
        self.record = by_address(
            Cache(
                at=address(self._memory),
                units=sizes.units,
                unit_bytes=sizes.unit_bytes,
                pinned_bytes=sizes.pinned_bytes,
                group_bytes=sizes.group_bytes,
                skipped=sizes.skipped,
                step=sizes.step,
                tail_at=sizes.tail_at,
                biases_at=sizes.biases_at,
                apart=sizes.apart,
                bundle_bytes=layout.bundle_bytes,
                packed_bytes=layout.group_bytes,
                tail_offset=layout.tail_offset,
                starts=starts,
                bundles=self.bundles,
                fd=self._file,
                alignment=alignment,
                held=np.zeros((layers, groups), np.uint32),
                arrived=zeros((layers, groups), np.int64),
                known=np.zeros((layers, groups), np.uint8),
                unit_sums=np.zeros((layers, groups, sizes.units), np.uint64),
                group_sums=sums,
                following=ends,
                preceding=ends.copy(),
                level=np.zeros(units, np.uint8),
                score=self._prior.copy(),
                prior=self._prior,
                used=np.zeros(units, np.int32),
                policy=OFFLOAD_POLICIES.index(plan.offload_policy),
                window=plan.offload_window * layers,
                state=self._state,
                counters=self._counters,
                ring=zeros((RING, 4), np.int64),
                posted_at=lines_at,
                done_at=lines_at + LINE,
                taken_at=lines_at + 2 * LINE,
                quit_at=quit_at,
                failure=self._failure,
                buffers=zeros((_READERS, buffer_bytes(layout.group_bytes, alignment) + alignment), np.uint8),
                present=np.zeros(groups, np.uint32),
                late=np.zeros(groups, np.int32),
                late_taken_at=address(self._words),
                chunk=chunk,
                waits=not plan.offload_asynchronous,
                reading_at=address(self._words) + LINE,
            )
        )
        self._posted_at = lines_at
        self._readers: list[threading.Thread] = []

    def _divide(self, alignment: int) -> tuple[int, int]:
        """Groups of a chunk, and units that are cached, within the budget."""
        sizes, packed = self._sizes, self._model.layout.group_bytes
        units_bytes = sizes.units * sizes.unit_bytes
        buffers = _READERS * (buffer_bytes(packed, alignment) + alignment)
        fixed = int(self._there.sum()) * sizes.pinned_bytes + buffers
        layer = int(self._there.sum(1).max(initial=0))
        spare = self._budget - fixed - layer * units_bytes
        chunk = min(max(int(self._budget * _CHUNK_SHARE), 2 * units_bytes), spare) // (2 * units_bytes)
        if chunk < 1:
            need = fixed + (layer + 2) * units_bytes
            pinned = " with all gates" if sizes.apart else ""
            raise ResourceError(
                f"a RAM budget of {self._budget / 1e6:.0f} MB is below what one token may need of a layer{pinned}: "
                f"pass --ram-budget {-(-need // 1_000_000)}MB or more"
            )
        chunk = min(chunk, _CHUNK)
        return chunk, (self._budget - fixed) // sizes.unit_bytes - 2 * chunk * sizes.units

    def _rates(self, units: int) -> npt.NDArray[np.float32]:
        """How often each unit is used by the model's profile, between 0 and 1; without one the same for all."""
        model, sizes = self._model, self._sizes
        if "profile" not in model.entries:
            return np.zeros(units, np.float32)
        counts = model.bytes_of("profile").view(np.uint16).reshape(model.entries["profile"].shape)
        fired = counts.astype(np.float32).sum(1).reshape(-1, GROUP)
        whole = fired.max(1) if sizes.units == 1 else fired
        return np.ascontiguousarray((whole / max(float(whole.max()), 1.0)).reshape(-1))

    def fill(self, rank: int) -> None:
        """Read what is cached at first: what fires most by the profile, or the first groups of each layer."""
        if rank != 0:
            return
        compile_for(read_requests, self.record, 0)
        for reader in range(_READERS):
            thread = threading.Thread(target=read_requests, args=(self.record, reader), daemon=True)
            self._readers.append(thread)
            thread.start()
        sizes, shape = self._sizes, self._there.shape
        order = np.argsort(-self._prior, kind="stable")
        if not self._prior.any():
            order = np.arange(len(self._prior)).reshape(shape[0], -1).T.reshape(-1)
        order = order[self._there.reshape(-1)[order // sizes.units]][: self._state[FREE]]
        chosen = np.zeros(len(self._prior), np.uint32)
        chosen[order] = 1
        bits = np.uint32(1) << np.arange(sizes.units, dtype=np.uint32)
        words = (chosen.reshape(*shape, sizes.units) * bits).sum(2, dtype=np.uint32)
        pinned = (self._there & (sizes.pinned_bytes > 0)).astype(np.uint8)
        fill_cache(self.record, pinned, words)
        self._counters[:] = 0

    def move(self, places: Places) -> int:
        """Nothing has to be copied: the file is every worker's home of every group."""
        return 0

    def progress(self) -> tuple[int, int]:
        """Bytes read, of how many that are cached."""
        return min(int(self._counters[BYTES_READ]), self._budget), self._budget

    def capacity(self) -> tuple[int, dict[str, int]]:
        """Groups whose home this is; bytes held by NUMA node."""
        held = int((self._state[CAPACITY] - self._state[FREE]) * self._sizes.unit_bytes)
        held += int(self._there.sum()) * self._sizes.pinned_bytes
        pages = pages_by_node(self._memory)
        found = max(1, sum(pages.values()))
        return len(self._places), {f"node{n}": held * count // found for n, count in pages.items()}

    def counters(self) -> list[int]:
        """What was counted since the start: as in `cache_table.py`."""
        return [int(number) for number in self._counters]

    def check(self) -> None:
        """Raise what a reader met."""
        wrong, layer, _, number = self._failure.tolist()
        if wrong == 0:
            return
        path = self._model.path
        if wrong == FAILED:
            raise ResourceError(f"reading {path} failed: {os.strerror(number)}; is the disk in order?")
        if wrong == DAMAGED:
            raise self._model.discarded(f"layers.{layer}.ffn")
        raise ModelError(f"the packed model {path} was cut off while it was in use; delete it, it will be made again")

    def stop(self) -> None:
        """Join the threads that read; the word `quit` is set."""
        wake(self._posted_at)
        for reader in self._readers:
            reader.join()
        os.close(self._file)


def _open_past_page_cache(model: PackedModel) -> tuple[int, int]:
    """The model's file for direct reads, and the multiple of bytes at which it may be read."""
    name = f"/proc/self/fd/{model.fileno()}"  # the same file, whatever its path names by now
    try:
        file = os.open(name, os.O_RDONLY | os.O_CLOEXEC | os.O_DIRECT)
    except OSError:  # a file system without direct reads, such as some in memory
        return os.open(name, os.O_RDONLY | os.O_CLOEXEC), 512
    buffer = zeros(8192, np.uint8)
    for alignment in (512, 4096):
        try:
            os.preadv(file, [buffer[:alignment].data], alignment)
        except OSError as error:
            if error.errno != errno.EINVAL:
                os.close(file)
                raise ResourceError(f"cannot read {model.path}: {error.strerror}") from error
        else:
            return file, alignment
    os.close(file)
    return os.open(name, os.O_RDONLY | os.O_CLOEXEC), 512
