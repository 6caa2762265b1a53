"""The CPU worker's threads: each pins itself, loads its share of the neurons, then serves the board for ever.

A thread writes the memory that it will mostly read, so that pages lie near its core.
"""

import threading
import time
from typing import Any

import numpy as np
import numpy.typing as npt

from warmfront.cpu_worker.executor import (
    BUSY_NS,
    BYTES,
    COMPARED,
    JOBS,
    NEURONS,
    Worker,
    decode_gates,
    decode_listed,
    decode_tiles,
    prefill_dense,
    prefill_routed,
    serve,
)
from warmfront.shared.kernels.by_address.kernels import entry_of
from warmfront.shared.kernels.by_address.records import by_address
from warmfront.shared.kernels.byte_dot import quantised_bytes
from warmfront.shared.kernels.feed_forward.bundles import arrange_group, bundles_at
from warmfront.shared.kernels.feed_forward.ffn import batch_scratch_bytes
from warmfront.shared.kernels.fetching import as_distances
from warmfront.shared.kernels.jit import compile_for
from warmfront.shared.kernels.prefill.dense_groups import scratch_bytes
from warmfront.shared.kernels.prefill.notes import Notes, noting
from warmfront.shared.kernels.prefill.routed_groups import routed_buffers
from warmfront.shared.machine.memory import address, anonymous, collapse, zeros
from warmfront.shared.machine.numa import bind, ensure_free, free_on, pages_by_node
from warmfront.shared.machine.process import pin, take_short_turns
from warmfront.shared.model.branches import bounds_of
from warmfront.shared.model.bundle import GROUP
from warmfront.shared.model.panels import BATCH
from warmfront.shared.model.store import run_of
from warmfront.shared.selector import Work, selector_of
from warmfront.shared.wire.board import Board
from warmfront.shared.wire.handoff import HANDOFF_SPINS, LINE, Barrier
from warmfront.shared.wire.messages import Assignment, LoadReport
from warmfront.shared.wire.worker_main import Places, open_assigned

__all__ = ["CpuWorker"]


class CpuWorker:
    """Holds every group whose home this worker is, in order of layer and group, and some spare slots behind them.

    Computes the groups that the board's owner table gives it.
    """

    def __init__(self, plan: Assignment, board: Board) -> None:
        self._plan = plan
        self._board = board
        self._model = open_assigned(plan)
        sizes, layout, spec = board.sizes, self._model.layout, self._model.spec
        selector = selector_of(plan.selector)
        threads = len(plan.cpus)
        home = np.frombuffer(plan.home, np.uint8).reshape(sizes.layers, sizes.groups) == plan.index
        self._places = np.argwhere(home)
        self._weights = anonymous(max(1, len(self._places) + plan.spare_slots) * layout.group_bytes, huge=True)
        self._spare = plan.spare_slots
        if plan.memory_node >= 0:
            self._bind(plan.memory_node)
        self._load = np.zeros((sizes.layers, 8), np.int64)
        # Words between threads: barrier generation and arrivals, then arrivals of finished threads.
        self._lines = zeros(3 * LINE // 8, np.int64)
        lines_at, quit_at = address(self._lines), address(board.quit[plan.index])
        neurons = sizes.groups * GROUP
        scratch = max(batch_scratch_bytes(sizes.hidden), scratch_bytes(sizes.hidden, sizes.groups, sizes.max_tokens))
        self._worker = by_address(
            Worker(
                me=plan.index,
                threads=threads,
                masked=selector.masked,
                skip=selector.skips(spec.sparse),
                slow=plan.slowdown,
                bundles=bundles_at(
                    address(self._weights),
                    layout,
                    spec.architecture.feed_forward,
                    selector.work is Work.DENSE,
                    as_distances(plan.distances),
                    selector.work is Work.GATES,
                ),
                gate_bytes=layout.gate_bytes,
                rest_bytes=layout.rest_bytes,
                bounds=bounds_of(spec),
                slot=board.slot[plan.index],
                owner=board.owner,
                mask=board.mask,
                routing=board.routing,
                requested=board.requested[plan.index],
                computed=board.computed,
                notes=Notes(noting(sizes.noted), address(board.noted), sizes.noted_shape[-1]),
                notes_step=board.noted.strides[0],
                owned=zeros((threads, sizes.groups), np.int32),
                ids=zeros((threads, sizes.groups), np.int32),
                branches=zeros((threads, sizes.groups), np.int32),
                factors=zeros((threads, BATCH), np.float32),
                routed=routed_buffers(threads, sizes.hidden, sizes.branches, sizes.max_tokens),
                words=zeros((threads, BATCH, sizes.groups), np.uint32),
                bits=zeros((threads, BATCH, sizes.groups), np.uint32),
                wanted=zeros((threads, sizes.groups), np.uint32),
                listed=np.tile(np.arange(neurons, dtype=np.int32), (threads, 1)),
                gates=zeros((threads, BATCH * neurons), np.float32),
                opened=zeros((threads, neurons), np.int32),
                opened_count=zeros((threads, 16), np.int64),
                counts=zeros((threads, 16), np.int64),
                quantised=zeros((threads, BATCH * quantised_bytes(sizes.hidden)), np.uint8),
                sums=zeros((threads, sizes.max_tokens * sizes.hidden), np.int64),
                scratch=zeros((threads, scratch), np.uint8),
                started=np.zeros(1, np.int64),
                load=self._load,
                job_at=address(board.job),
                quit_at=quit_at,
                descriptor=board.descriptor,
                x_at=address(board.x),
                inverse_at=address(board.inverse),
                y_at=address(board.y[plan.index]),
                done_at=address(board.done[plan.index]),
                record=board.record[plan.index],
                barrier=Barrier(lines_at, threads, plan.spins, quit_at),
                arrivals_at=lines_at + 2 * LINE,
                joined=int(board.job[0]),
                job_spins=HANDOFF_SPINS,
            )
        )
        self._loaded = [0] * threads
        self._errors: list[BaseException] = []
        self._serving = [threading.Event() for _ in range(threads)]
        self._threads = [threading.Thread(target=self._live, args=(i,), daemon=True) for i in range(threads)]
        for thread in self._threads:
            thread.start()

    def _live(self, rank: int) -> None:
        try:
            if self._plan.pinned:
                pin([self._plan.cpus[rank]])
            take_short_turns()
            self._fill(rank)
            decode_at, prefill_at = (entry_of(part, self._worker, 0, 0, 0, 0) for part in self._parts())
            compile_for(serve, rank, self._worker, decode_at, prefill_at)
            self._serving[rank].set()
            serve(rank, self._worker, decode_at, prefill_at)
        except BaseException as error:
            self._errors.append(error)

    def _parts(self) -> tuple[Any, Any]:
        """The kernels of a batch and of a prompt's tokens, by selector and model."""
        decode = decode_tiles if self._worker.bundles.tiled else decode_listed
        if selector_of(self._plan.selector).work is Work.GATES:
            decode = decode_gates
        return decode, prefill_dense if len(self._worker.bounds) == 2 else prefill_routed

    def _bind(self, node: int) -> None:
        """Bind the weights to `node`: what it cannot hold is refused, and there are only as many spare slots as fit."""
        size = self._model.layout.group_bytes
        if bind(self._weights, node):
            ensure_free(node, len(self._places) * size)
            self._spare = min(self._spare, free_on(node) // size - len(self._places))

    def _fill(self, rank: int) -> None:
        """Read this thread's share of the groups, a run of neighbours at a time."""
        count, threads = len(self._places), len(self._plan.cpus)
        low, high = count * rank // threads, count * (rank + 1) // threads
        size = self._model.layout.group_bytes
        since = low
        while low < high:
            layer, group = self._places[low].tolist()
            run = run_of(self._places[low:high])
            # What has no weights takes no memory: it is never touched.
            have = min(run, max(self._model.groups[layer] - group, 0))
            out = self._weights[low * size : (low + have) * size]
            self._model.read_groups(layer, group, out.reshape(have, size))
            self._arrange(out)
            self._loaded[rank] += run * size
            if have < run:
                collapse(self._weights[since * size : (low + have) * size])
                since = low + run
            low += run
        collapse(self._weights[since * size : high * size])

    def _arrange(self, groups: npt.NDArray[np.uint8]) -> None:
        """Lay groups that have been read out as they are computed."""
        for at in range(0, groups.nbytes, self._model.layout.group_bytes):
            arrange_group(self._worker.bundles, address(groups) + at)

    def move(self, places: Places) -> int:
        """Read groups into slots of this worker; returns the ns of work that it took. Nobody computes with them yet."""
        size, started = self._model.layout.group_bytes, time.thread_time_ns()
        for layer, group, slot in places.tolist():
            out = self._weights[slot * size : (slot + 1) * size]
            self._model.read_groups(layer, group, out.reshape(1, size))
            self._arrange(out)
        return time.thread_time_ns() - started

    def progress(self) -> tuple[int, int]:
        """Bytes loaded, of how many."""
        return sum(self._loaded), len(self._places) * self._model.layout.group_bytes

    def ready(self) -> bool:
        """Whether all threads serve the board; raises the error of one that failed."""
        if self._errors:
            raise self._errors[0]
        return all(serving.is_set() for serving in self._serving)

    def capacity(self) -> tuple[int, dict[str, int]]:
        """Slots: those of the homes and the spare ones; bytes of the homes by NUMA node."""
        size = len(self._places) * self._model.layout.group_bytes
        pages = pages_by_node(self._weights[:size])
        found = max(1, sum(pages.values()))
        return len(self._places) + self._spare, {f"node{n}": size * count // found for n, count in pages.items()}

    def report(self) -> LoadReport:
        """Work on single tokens so far, by layer."""
        load: npt.NDArray[np.int64] = self._load.copy()
        busy, neurons, read = (load[:, column].tolist() for column in (BUSY_NS, NEURONS, BYTES))
        return LoadReport(int(load[:, JOBS].sum()), busy, neurons, read, load[:, COMPARED:].sum(0).tolist())

    def stop(self) -> None:
        """Join the threads; this worker's `quit` word is set."""
        for thread in self._threads:
            thread.join()
        self._model.close()
