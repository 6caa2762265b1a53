"""The coordinator's team of resident threads: holds the attention weights and the KV cache, runs `forward`."""

import threading
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from warmfront.coordinator.decode.attention import attend_batch, attend_panels
from warmfront.coordinator.decode.footprint import chunks_of, scratch_shapes
from warmfront.coordinator.decode.forward import serve_team
from warmfront.coordinator.decode.kv.cache import KvCache
from warmfront.coordinator.decode.linear import entry_of_linear
from warmfront.coordinator.decode.network import (
    CAPTURE,
    COMPARE,
    DECODE,
    LOWBIT,
    POSITION,
    POSTED,
    ROLES,
    SEQUENCE,
    STEPS,
    TOKENS,
    WANT_LOGITS,
    Handoff,
    Network,
    Parts,
    State,
)
from warmfront.coordinator.decode.norms import normalise_heads
from warmfront.coordinator.decode.predictor import predict_lowbit, predict_lowrank
from warmfront.coordinator.decode.router import route, router_of
from warmfront.coordinator.decode.row_split import RowSplit
from warmfront.coordinator.decode.team_config import Place, TeamConfig
from warmfront.coordinator.decode.thread_weights import ThreadWeights
from warmfront.coordinator.selectors.lowbit import Lowbit
from warmfront.shared.errors import WarmfrontError, WorkerError
from warmfront.shared.kernels.activation import activation_of
from warmfront.shared.kernels.by_address.kernels import entry_of
from warmfront.shared.kernels.by_address.records import by_address
from warmfront.shared.kernels.byte_dot import quantised_bytes
from warmfront.shared.kernels.fetching import CACHED_TILES
from warmfront.shared.kernels.jit import compile_for
from warmfront.shared.kernels.lowbit import lowbit_bytes
from warmfront.shared.machine.memory import address, zeros
from warmfront.shared.machine.process import hold_interrupts, pin, set_name, take_short_turns
from warmfront.shared.model.architecture import NORMS
from warmfront.shared.model.branches import predictors_of
from warmfront.shared.model.bundle import GROUP
from warmfront.shared.model.kv_layout import pages_of
from warmfront.shared.model.panels import BATCH, LANES, whole_panels
from warmfront.shared.model.spec import Predictor
from warmfront.shared.model.store import PackedModel
from warmfront.shared.wire.board import Board
from warmfront.shared.wire.handoff import DONE, HANDOFF_SPINS, LATE, LINE, Barrier, announce, await_sequence

__all__ = ["ThreadTeam"]


class ThreadTeam:
    """Runs tokens through the model. Make it, `start()` it, wait for `ready()`, then `run()` jobs one at a time."""

    def __init__(
        self,
        model: PackedModel,
        board: Board,
        dead: npt.NDArray[np.int64],
        config: TeamConfig,
        lowbit: Lowbit | None = None,
    ) -> None:
        """`dead`: int64 [workers], not 0 = that worker's process is; `lowbit`: what that selector needs."""
        self._model, self._board, self._dead, self._config, self._lowbit = model, board, dead, config, lowbit
        self._cpus = cpus = config.cores.coordinator
        # int64 [workers]: whether it takes part in the next job.
        self.present: npt.NDArray[np.int64] = np.ones(len(dead), np.int64)
        self.logits: npt.NDArray[np.float32] = zeros((BATCH, model.spec.vocab), np.float32)
        self._rows = RowSplit(len(cpus), config.balances)
        self._weights = ThreadWeights(model, lowbit, config.selector, config.cores, self._rows.cuts)
        ahead = int(config.distances[CACHED_TILES, config.cache_kind])
        self._cache = KvCache(model.spec, config, self._rows.cuts, ahead)
        # Lines: go, finished (and its arrivals), barrier (and its arrivals).
        self._lines = zeros(6 * LINE // 8, np.int64)
        self._network = self._describe()
        self._state = self._prepare()
        self._sequence = 0
        self._predicted: npt.NDArray[np.float32] | None = None  # the thresholds, once neurons are selected beside them
        self._errors: list[BaseException] = []
        self._serving = [threading.Event() for _ in cpus]
        self._threads = [threading.Thread(target=self._live, args=(i,), daemon=True) for i in range(len(cpus))]

    @property
    def nbytes(self) -> int:
        """Bytes of the weights that the coordinator holds."""
        return self._weights.nbytes

    def _describe(self) -> Network:
        """The network as the compiled pass reads it."""
        spec, at, files = self._model.spec, self._weights.at, self._weights.files
        weights = np.zeros((spec.layers, len(ROLES)), np.int64)
        kinds = np.zeros((spec.layers, len(ROLES)), np.int64)
        ranks = np.zeros(spec.layers, np.int64)
        for layer in range(spec.layers):
            for column, role in enumerate(ROLES):
                here = role.replace("ffn_norm", "attn_norm") if spec.architecture.norm.shared else role
                name = f"layers.{layer}.{here}"
                if name in at:
                    weights[layer, column] = at[name]
                    kinds[layer, column] = files[name].entries[name].kind or 0
                    if role == "fc1":
                        ranks[layer] = files[name].entries[name].shape[0] // predictors_of(spec)
        predictor, lowbit = spec.predictor or Predictor(), self._lowbit
        thresholds = np.full((spec.layers, 1, self._model.layout.groups * GROUP), predictor.threshold, np.float32)
        for layer in range(spec.layers):
            if (name := f"layers.{layer}.fc2.bias") in at:
                # logit + bias > threshold
                thresholds[layer] -= self._model.floats(name)
        if lowbit is not None:
            kinds[:, LOWBIT] = lowbit.bits
            thresholds = lowbit.thresholds
        architecture, attention, positions = spec.architecture, spec.architecture.attention, spec.architecture.positions
        tables = [positions.table_of(layer) for layer in range(spec.layers)]
        head = "head" if "head" in at else "embed"
        return by_address(
            Network(
                layers=spec.layers,
                hidden=spec.hidden,
                heads=attention.heads,
                kv_heads=attention.kv_heads,
                head_dim=attention.head_dim,
                vocab=spec.vocab,
                norm_kind=NORMS.index(architecture.norm.kind),
                norm_eps=np.float32(architecture.norm.epsilon),
                parallel=architecture.residual == "parallel",
                norms_sum=architecture.norm.placement == "sum",
                qk_norm=attention.qk_norm is not None,
                whole_qk_norm=attention.qk_norm == "whole",
                score_scale=np.float32(attention.score_scale),
                score_cap=np.float32(attention.soft_cap or 0),
                embedding_scale=np.float32(architecture.embedding_scale),
                residual_scale=np.float32(architecture.residual_scale),
                logit_scale=np.float32(architecture.logit_scale),
                logit_cap=np.float32(architecture.logit_cap or 0),
                weights=weights,
                kinds=kinds,
                ahead=self._config.distances,
                embed=at["embed"],
                embed_kind=int(self._model.entries["embed"].kind or 0),
                learned=at.get("positions", 0),
                learned_kind=int(self._model.entries["positions"].kind or 0) if "positions" in at else 0,
                learned_rows=self._model.entries["positions"].shape[0] if "positions" in at else 0,
                learned_offset=positions.learned_offset or 0,
                head=at[head],
                head_kind=int(self._model.entries[head].kind or 0),
                norm=at.get("norm", 0),
                norm_bias=at.get("norm.bias", 0),
                rotary=positions.tables(self._config.context),
                table=np.array(tables, np.int64),
                pairs=np.array([positions.rotary[t].dim // 2 if t >= 0 else 0 for t in tables], np.int64),
                windows=np.array(attention.windows or (0,) * spec.layers, np.int64),
                predicts=self._config.selector.predicts,
                look_ahead=self._config.look_ahead,
                router=router_of(spec),
                groups=self._model.layout.groups,
                reach=self._model.reach,
                degree=architecture.feed_forward.degree,
                biased=int(bool(architecture.feed_forward.neuron_biases)),
                normed=predictor.input == "normed",
                rectified=predictor.activation == "relu",
                ranks=ranks,
                thresholds=thresholds,
                activation=activation_of(architecture.feed_forward),
                lowbit_stride=lowbit_bytes(lowbit.bits, spec.hidden) if lowbit is not None else 0,
            )
        )

    def _prepare(self) -> State:
        """The state, allocated."""
        spec, board, threads = self._model.spec, self._board, len(self._cpus)
        max_tokens = board.sizes.max_tokens
        shapes = scratch_shapes(spec, threads, max_tokens)
        widest, inner = shapes["h"][1] // max_tokens, int(self._network.ranks.max())
        packed = max(BATCH * quantised_bytes(max(widest, inner)), 2 * max_tokens * widest)
        # All of a prompt for calibration and training, and one token for evaluation.
        captured = (spec.layers, (max_tokens if self._config.captures else 1) * spec.hidden)
        barrier_at = address(self._lines) + 3 * LINE
        return by_address(
            State(
                linear=np.zeros(1, np.int64),
                threads=threads,
                cuts=self._rows.cuts,
                busy=self._rows.busy,
                barrier=Barrier(barrier_at, threads, self._config.cores.spins, address(board.abort)),
                handoff=self._handoff(),
                job=np.zeros(16, np.int64),
                tokens=np.zeros(max_tokens, np.int64),
                positions=np.zeros(BATCH, np.int64),
                tables=zeros((BATCH, pages_of(self._config.context)), np.int64),
                spoiled=np.zeros(max_tokens, np.int64),
                status=np.zeros(threads, np.int64),
                chunks=chunks_of(spec, threads),
                **{name: zeros(shape, np.float32) for name, shape in shapes.items()},
                packed=zeros((threads, packed), np.uint8),
                logits=self.logits,
                inner=zeros(BATCH * inner * predictors_of(spec), np.float32),
                captured=zeros(captured, np.float32),
                times=np.zeros((spec.layers, len(STEPS)), np.int64),
                spans=np.zeros((spec.layers, len(board.done), 2), np.int64),
                uses=zeros((threads, spec.layers, board.sizes.branches), np.int64),
                cache=self._cache.layout,
            )
        )

    def _parts(self) -> Parts:
        """The parts of the pass that this run has, compiled."""
        network, predict = self._network, predict_lowrank if self._lowbit is None else predict_lowbit
        uses = {
            attend_batch: True,
            attend_panels: True,
            normalise_heads: network.qk_norm,
            route: network.router.experts > 0,
            predict: network.predicts,
        }
        return by_address(
            Parts(*(entry_of(part, network, self._state, 0, 0) if used else 0 for part, used in uses.items()))
        )

    def _handoff(self) -> Handoff:
        board, lines = self._board, address(self._lines)
        return Handoff(
            go_at=lines,
            finished_at=lines + LINE,
            abort_at=address(board.abort),
            job_at=address(board.job),
            descriptor=board.descriptor,
            board_x=board.x,
            inverse=board.inverse,
            mask=board.mask,
            uses=board.uses,
            routing=board.routing,
            present=self.present,
            done_at=np.array([address(line) for line in board.done], np.int64),
            dead_at=address(self._dead) + 8 * np.arange(len(self._dead)),
            record_at=np.array([address(record) for record in board.record], np.int64),
            y_at=np.array([address(y) for y in board.y], np.int64),
            spins=HANDOFF_SPINS,
        )

    def pages(self) -> list[dict[int, int]]:
        """Where the threads' weights lie: see `ThreadWeights.pages`."""
        return self._weights.pages()

    def start(self) -> None:
        """Start the threads: each reads its share of the weights and enters the resident loop."""
        for thread in self._threads:
            thread.start()

    def _live(self, rank: int) -> None:
        try:
            if self._config.pinned:
                pin([self._cpus[rank]])
            take_short_turns()
            set_name(f"wf-team{rank}")
            self._weights.fill(rank)
            parts = self._parts()
            compile_for(serve_team, rank, self._network, self._state, parts)
            # Last: the workers need most of it too, and may have compiled that by now.
            self._state.linear[0] = entry_of_linear()
            self._serving[rank].set()
            serve_team(rank, self._network, self._state, parts)
        except BaseException as error:
            self._fail(error)

    def _fail(self, error: BaseException) -> None:
        """A thread has failed, and with it every later job: nobody may wait for it or for what it would have posted."""
        self._errors.append(error)
        self._board.end()
        self._dead[:] = 1

    def progress(self) -> tuple[int, int]:
        """Bytes of weights loaded, of how many."""
        return self._weights.loaded, self._weights.nbytes

    def ready(self) -> bool:
        """Whether every thread waits for jobs; raises the error of one that failed."""
        self.check()
        return all(serving.is_set() for serving in self._serving)

    def check(self) -> None:
        """Raise the error that ended a thread, if one did."""
        if self._errors:
            error = self._errors[0]
            if isinstance(error, WarmfrontError):
                raise error
            raise WorkerError(f"a thread of the coordinator failed: {type(error).__name__}: {error}") from error

    def spoiled(self) -> list[tuple[int, int]]:
        """Of which tokens of the last job a key or value is infinite or NaN: their numbers, and from which position of
        their text on that may be so."""
        job, positions = self._state.job, self._state.positions
        tokens = np.flatnonzero(self._state.spoiled[: job[TOKENS]]).tolist()
        return [(token, int(positions[token] if job[DECODE] else job[POSITION] + token)) for token in tokens]

    def scrub(self, table: npt.NDArray[np.int64], first: int, end: int) -> None:
        """See `KvCache.scrub`."""
        self._cache.scrub(table, first, end)

    def run(
        self,
        tokens: Sequence[int],
        places: Sequence[Place],
        want_logits: bool,
        *,
        decode: bool = False,
        compare_selection: bool = False,
        capture: bool = False,
    ) -> int:
        """Run up to max_tokens `tokens` of a prompt, the first at `places[0]`, filling the KV cache and, if wanted,
        `logits[0]`.

        `decode`: at most 16, each with its place and as if it came alone, with logits of each, float32 [len(tokens),
        vocab]; of tokens of one text each attends to those before it. `compare_selection`: the workers compare the
        selection of a single token with the truth; `capture`: keep the feed-forward inputs.
        Returns DONE; ABORTED if the board was; LOST if a worker has died, and the job is to be run again. A
        KeyboardInterrupt waits for the job to end before it goes on.
        """
        job, handoff = self._state.job, self._state.handoff
        self._state.tokens[: len(tokens)] = tokens
        for row, place in enumerate(places):
            self._state.positions[row], self._state.tables[row] = place
        self._state.spoiled[: len(tokens)] = 0
        job[DECODE], job[COMPARE], job[CAPTURE] = decode, compare_selection, capture
        with hold_interrupts():
            self._post(len(tokens), places[0].position, want_logits)
            result = await_sequence(handoff.finished_at, self._sequence, handoff.abort_at, 0, 0)
        if decode:
            self._rows.token()
        if result == DONE and LATE in self._state.status:
            self._fail(WorkerError("a worker did not answer for two minutes"))
        self.check()
        return int(self._state.status[0]) if result == DONE else int(result)

    def admit(self, words: npt.NDArray[np.uint32] | None) -> None:
        """Select these neurons, uint32 [layers, groups], whatever is predicted; None: all."""
        thresholds = self._network.thresholds[:, 0]
        if self._predicted is None:
            self._predicted = thresholds.copy()
        thresholds[:] = -np.inf
        if words is not None:
            admitted = np.unpackbits(words.view(np.uint8), axis=1, bitorder="little").astype(bool)
            np.copyto(thresholds, self._predicted, where=~admitted)

    def times(self) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """Of the last job, ns on the monotonic clock: the first thread's steps [layers, STEPS], and when each worker
        began and ended [layers, workers, 2]."""
        return self._state.times, self._state.spans

    def uses(self) -> npt.NDArray[np.int64]:
        """How many tokens have used each branch, int64 [layers, branches]; zeros for a model without experts."""
        return np.asarray(self._state.uses.sum(0))

    def captured(self, tokens: int) -> npt.NDArray[np.float32]:
        """The feed-forward inputs of the last job, run with `capture`: float32 [layers, tokens, hidden]."""
        layers, hidden = self._model.spec.layers, self._model.spec.hidden
        decoded = bool(self._state.job[DECODE])
        lanes, size = (1, tokens) if decoded else (LANES, whole_panels(tokens))
        wide = self._state.captured[:, : size * hidden].reshape(layers, size // lanes, hidden, lanes)
        return np.ascontiguousarray(wide.swapaxes(2, 3).reshape(layers, -1, hidden)[:, :tokens])

    def residual(self, tokens: int) -> npt.NDArray[np.float32]:
        """Behind the last layer, of the last job, a prompt's without logits: float32 [tokens, hidden]."""
        hidden, size = self._model.spec.hidden, whole_panels(tokens)
        wide = self._state.x[0, : size * hidden].reshape(-1, hidden, LANES)
        return np.ascontiguousarray(wide.swapaxes(1, 2).reshape(size, hidden)[:tokens])

    def _post(self, tokens: int, position: int, want_logits: bool) -> None:
        job = self._state.job
        job[TOKENS], job[POSITION], job[WANT_LOGITS] = tokens, position, want_logits
        job[SEQUENCE] = job[POSTED]
        self._sequence += 1
        announce(self._state.handoff.go_at, self._sequence)

    def stop(self) -> None:
        """End the resident loops and tell the workers to quit theirs; harmless after an abort."""
        if any(thread.is_alive() for thread in self._threads):
            self._post(0, 0, False)
        for thread in self._threads:
            if thread.ident is not None:
                thread.join()
