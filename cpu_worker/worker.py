"""The CPU worker's threads: each pins itself, loads its share of the neurons, then serves the board for ever."""

import threading
from typing import Any

import numpy as np
import numpy.typing as npt

from warmfront.cpu_worker.cached_jobs import cached_dense, cached_gates, cached_listed, cached_routed, cached_tiles
from warmfront.cpu_worker.executor import BUSY_NS, BYTES, COMPARED, JOBS, NEURONS, Worker, serve
from warmfront.cpu_worker.jobs import decode_gates, decode_listed, decode_tiles, prefill_dense, prefill_routed
from warmfront.cpu_worker.neuron_cache import NeuronCache
from warmfront.cpu_worker.resident_groups import ResidentGroups
from warmfront.shared.kernels.by_address.kernels import entry_of
from warmfront.shared.kernels.by_address.records import by_address
from warmfront.shared.kernels.byte_dot import quantised_bytes
from warmfront.shared.kernels.feed_forward.ffn import batch_scratch_bytes
from warmfront.shared.kernels.jit import compile_for
from warmfront.shared.kernels.prefill.dense_groups import scratch_bytes
from warmfront.shared.kernels.prefill.notes import Notes, noting
from warmfront.shared.kernels.prefill.routed_groups import routed_buffers
from warmfront.shared.machine.memory import address, zeros
from warmfront.shared.machine.process import pin, take_short_turns
from warmfront.shared.model.branches import bounds_of
from warmfront.shared.model.bundle import GROUP
from warmfront.shared.model.panels import BATCH
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
        # Words between threads: barrier generation and arrivals, then arrivals of finished threads.
        self._lines = zeros(3 * LINE // 8, np.int64)
        lines_at, quit_at = address(self._lines), address(board.quit[plan.index])
        places = np.argwhere(home)
        # What holds the groups.
        self._groups: ResidentGroups | NeuronCache
        if plan.ram_budget:
            self._groups = NeuronCache(plan, self._model, places, quit_at)
        else:
            self._groups = ResidentGroups(plan, self._model, places, board.slot[plan.index])
        self._load = np.zeros((sizes.layers, 8), np.int64)
        neurons = sizes.groups * GROUP
        scratch = max(batch_scratch_bytes(sizes.hidden), scratch_bytes(sizes.hidden, sizes.groups, sizes.max_tokens))
        self._worker = by_address(
            Worker(
                me=plan.index,
                threads=threads,
                masked=selector.masked,
                skip=selector.skips(spec.sparse),
                slow=plan.slowdown,
                bundles=self._groups.bundles,
                cache=self._groups.record,
                gate_bytes=layout.gate_bytes,
                rest_bytes=layout.rest_bytes,
                bounds=bounds_of(spec),
                slot=self._groups.slot,
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
            self._groups.fill(rank)
            decode_at, prefill_at = (entry_of(part, self._worker, 0, 0, 0, 0) for part in self._parts())
            compile_for(serve, rank, self._worker, decode_at, prefill_at)
            self._serving[rank].set()
            serve(rank, self._worker, decode_at, prefill_at)
            self._groups.check()
        except BaseException as error:
            self._errors.append(error)

    def _parts(self) -> tuple[Any, Any]:
        """The kernels of a batch and of a prompt's tokens, by selector and model."""
        routed, gates = len(self._worker.bounds) > 2, selector_of(self._plan.selector).work is Work.GATES
        if self._plan.ram_budget:
            decode = cached_tiles if self._worker.bundles.tiled else cached_listed
            return cached_gates if gates else decode, cached_routed if routed else cached_dense
        decode = decode_tiles if self._worker.bundles.tiled else decode_listed
        return decode_gates if gates else decode, prefill_routed if routed else prefill_dense

    def move(self, places: Places) -> int:
        """Read groups into slots of this worker; returns the ns of work that it took. Nobody computes with them yet."""
        return self._groups.move(places)

    def progress(self) -> tuple[int, int]:
        """Bytes loaded, of how many."""
        return self._groups.progress()

    def ready(self) -> bool:
        """Whether all threads serve the board; raises the error of one that failed."""
        if self._errors:
            raise self._errors[0]
        return all(serving.is_set() for serving in self._serving)

    def capacity(self) -> tuple[int, dict[str, int]]:
        """Slots: those of the homes and the spare ones; bytes of the homes by NUMA node."""
        return self._groups.capacity()

    def report(self) -> LoadReport:
        """Work on single tokens so far, by layer."""
        load: npt.NDArray[np.int64] = self._load.copy()
        busy, neurons, read = (load[:, column].tolist() for column in (BUSY_NS, NEURONS, BYTES))
        return LoadReport(
            int(load[:, JOBS].sum()), busy, neurons, read, load[:, COMPARED:].sum(0).tolist(), self._groups.counters()
        )

    def stop(self) -> None:
        """Join the threads; this worker's `quit` word is set."""
        for thread in self._threads:
            thread.join()
        self._groups.stop()
        self._model.close()
