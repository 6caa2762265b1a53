"""The Python API: load a model, generate tokens, read what it cost.

    with Engine.load("smollm2-135m") as engine:
        for token in engine.generate("The lighthouse keeper", max_new_tokens=32):
            print(token.text, end="")

An engine owns its worker processes, its team of threads and the board between them; `close` ends them all. It computes
one text at a time: what begins a text (`generate`, `decode_ids`, ...) ends those begun before, which then raise
UsageError, also from other threads. A process that was forked has no use of it.
"""

import contextlib
import os
import threading
import time
import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import numpy.typing as npt

from warmfront.coordinator.engine.resolve import (
    choose_attention,
    choose_context,
    choose_cores,
    choose_devices,
    choose_selector,
)
from warmfront.coordinator.engine.runtime import Runtime
from warmfront.coordinator.engine.stats import Selection, Stats, Token, WorkerStats
from warmfront.coordinator.engine.trace import Trace
from warmfront.coordinator.hardware.settings import tuned
from warmfront.coordinator.models.default_model import DEFAULT_MODEL, resolve
from warmfront.coordinator.packing.packer import ensure_packed, mended
from warmfront.coordinator.profile.counting import ensure_profiled
from warmfront.coordinator.text.sampling import Sampler, token_logprobs
from warmfront.coordinator.text.stop_strings import StopText
from warmfront.coordinator.text.tokenizer import Tokenizer
from warmfront.shared.config import PREDICTING, EngineConfig, Sampling, whole_number
from warmfront.shared.errors import UsageError
from warmfront.shared.machine.core_plan import CorePlan
from warmfront.shared.machine.process import hold_interrupts
from warmfront.shared.model.bundle import GROUP
from warmfront.shared.model.store import PackedModel
from warmfront.shared.wire.board import LANES
from warmfront.shared.wire.messages import LoadReport

if TYPE_CHECKING:
    from warmfront.coordinator.balancing.ownership import Ownership
    from warmfront.coordinator.selectors.lowbit import Lowbit

__all__ = ["Engine"]

# Of how many decoded tokens one has its selection measured.
_MEASURE_EVERY = 64
Say = Callable[[str], None]
Progress = Callable[[str, int, int], None]


def _quiet(_message: str) -> None:
    pass


def _no_progress(_what: str, _done: int, _total: int) -> None:
    pass


def _close_dropped(closing: contextlib.ExitStack, owner: int) -> None:
    """End what an engine that nobody closed has left running, unless this process was forked from its owner."""
    if os.getpid() == owner:
        closing.close()
        warnings.warn(
            "an engine was not closed: call close(), or use it in a with block", ResourceWarning, stacklevel=2
        )


class Engine:
    """A loaded model and everything that runs it: made by `Engine.load`, ended by `close` or a with block."""

    def __init__(self, model: PackedModel, config: EngineConfig, *, profiles: bool = False) -> None:
        self.model = model
        self.config = config
        self.tokenizer = Tokenizer(model)
        self.selector = choose_selector(config, model)
        self.context = choose_context(config, model)
        self.attention = choose_attention(config, self.selector)
        self.stats = Stats()
        self._closed = False
        self._owner, self._lock, self._turn = os.getpid(), threading.RLock(), 0
        self._decoded, self._measures, self._serving = 0, False, False
        self._worked = np.zeros((0, 0, 2), np.int64)  # the sums of `times` over the tokens of the last answer
        self._runtime = Runtime(model, config, self.selector, self.context, self.attention, profiles)
        self._trace = Trace(Path(config.trace)) if config.trace is not None else None
        self._cached: list[int] = []  # the tokens that the KV cache holds
        self._closing = contextlib.ExitStack()
        self._closing.callback(model.close)
        self._closing.callback(self._runtime.close)
        self._dropped = weakref.finalize(self, _close_dropped, self._closing, os.getpid())

    @classmethod
    def load(
        cls, model: str = DEFAULT_MODEL, *, say: Say = _quiet, progress: Progress = _no_progress, **wishes: Any
    ) -> Self:
        """Load `model` (a GGUF file, a Hugging Face folder or "smollm2-135m") and start its workers.

        `wishes` are the fields of `EngineConfig`. `say` gets a line for each thing worth knowing, `progress` (what,
        bytes done, bytes in all). Raises a WarmfrontError; then nothing is left running.
        """
        config = EngineConfig(**wishes)
        # What cannot be had is refused before the model is packed.
        choose_cores(config)
        config = choose_devices(config, say)
        return mended(lambda: cls._loaded(model, config, say, progress), say)

    @classmethod
    def _loaded(cls, model: str, config: EngineConfig, say: Say, progress: Progress) -> Self:
        started = time.monotonic()
        path = ensure_packed(resolve(model, say), config.dtype, say, partial(progress, "packing"))
        config = tuned(config, path, None if config.gpu == "none" else config.gpu, say)
        engine = cls._opened(path, config)
        try:
            if ensure_profiled(engine.model, config, say, progress):
                engine.close()
                engine = cls._opened(path, config)
            engine._run_up(say, progress)
        except BaseException:
            engine.close()
            raise
        engine.stats.load_s = time.monotonic() - started
        return engine

    @classmethod
    def for_profiling(
        cls, path: Path, config: EngineConfig, *, say: Say = _quiet, progress: Progress = _no_progress
    ) -> Self:
        """Load the packed model at `path` as it is, ready to say which neurons fire; else as `load` does."""
        engine = cls._opened(path, choose_devices(config, say), profiles=True)
        try:
            engine._run_up(say, progress)
        except BaseException:
            engine.close()
            raise
        return engine

    @classmethod
    def _opened(cls, path: Path, config: EngineConfig, *, profiles: bool = False) -> Self:
        packed = PackedModel(path)
        try:
            return cls(packed, config, profiles=profiles)
        except BaseException:
            packed.close()
            raise

    def _run_up(self, say: Say, progress: Progress) -> None:
        self._runtime.start(say, progress)
        if self.lowbit is not None and not self.lowbit.calibrated:
            self._calibrate(self.lowbit, say)
        self._measures, self._serving = self.config.measure, True

    @property
    def cores(self) -> CorePlan:
        """Who runs on which cpus."""
        return self._runtime.cores

    @property
    def ownership(self) -> "Ownership":
        """Who holds and who computes which neurons."""
        self._check_open()
        return self._runtime.ownership

    @property
    def lowbit(self) -> "Lowbit | None":
        """The copies of the gates, with the selector lowbit."""
        return self._runtime.lowbit

    def expected_bytes(self) -> npt.NDArray[np.float64]:
        """Bytes that a token is expected to read of each group, by the model's profile: float64 [layers, groups]."""
        self._check_open()
        return self._runtime.expected_bytes()

    def _calibrate(self, lowbit: "Lowbit", say: Say) -> None:
        from warmfront.coordinator.selectors.calibration import calibrate, sample_ids

        say(f"calibrating the selector for a recall of {lowbit.recall:g} (first use only)")
        lowbit.thresholds[:] = -np.inf  # until they are known, everything is selected
        calibrate(lowbit, self.model, self.feed_forward_inputs(sample_ids(self)))
        lowbit.save(say)
        self.reset()

    def feed_forward_inputs(self, ids: Sequence[int]) -> npt.NDArray[np.float32]:
        """What the feed-forward layers get, after their norm, for each token: float32 [layers, len(ids), hidden].

        Only with the selector lowbit. What exceeds the context is computed as a text of its own.
        """
        self._check_open()
        if self._runtime.lowbit is None:
            raise UsageError(
                "the feed-forward inputs are kept for the selector lowbit only: load with selector='lowbit'"
            )
        most = min(self._runtime.board.sizes.max_tokens, self.context)
        inputs: list[npt.NDArray[np.float32]] = []
        with self._text() as turn:
            for at in range(0, len(ids), most):
                some = list(ids[at : at + most])
                if not inputs or len(self._cached) + len(some) > self.context:
                    self._forget(0)
                self._run(turn, some, False, capture=True)
                inputs.append(self._runtime.team.captured(len(some)))
        return np.concatenate(inputs, axis=1)

    def firing(self, ids: Sequence[int]) -> npt.NDArray[np.bool_]:
        """Which neurons each of up to 288 tokens fires, computed anew from an empty cache: [layers, tokens, neurons].

        Only of an engine that profiles, without a GPU.
        """
        self._check_open()
        if not self._runtime.profiles:
            raise UsageError("this engine does not note which neurons fire: load it with Engine.for_profiling")
        with self._text() as turn:
            self._forget(0)
            # A single token would take the way of decoding, which does not note this.
            self._run(turn, [*ids, ids[0]] if len(ids) == 1 else list(ids), False)
            return self._fired(len(ids))

    def _fired(self, tokens: int) -> npt.NDArray[np.bool_]:
        """Of the last job, from the board's [layers, groups, 32, panels] of 16 tokens a word."""
        layers, groups, neurons, panels = self._runtime.board.firing.shape
        bits = np.unpackbits(self._runtime.board.firing.view(np.uint8), bitorder="little").astype(bool)
        bits = bits.reshape(layers, groups * neurons, panels * LANES)[:, :, :tokens]
        return np.ascontiguousarray(bits.swapaxes(1, 2))

    def generate(
        self,
        prompt: str | Sequence[int],
        *,
        max_new_tokens: int = 128,
        sampling: Sampling | None = None,
        stop: str | Sequence[str] = (),
        ignore_eos: bool = False,
        logprobs: int | None = None,
    ) -> Iterator[Token]:
        """Yield the tokens that follow `prompt` (text or token ids) as they are computed.

        Ends after `max_new_tokens`, at an end-of-turn token (unless `ignore_eos`), before a stop string, or when the
        context is full; `stats.finish_reason` says which. The end-of-turn token itself is yielded only if it brings
        text that was held back. With `logprobs` each token comes with its own log probability and those of that many
        most probable ones, by the model's distribution before sampling.
        Raises UsageError for a wrong request or a prompt that does not fit the context, WorkerError if a worker dies.
        """
        if not isinstance(sampling, Sampling | None):
            raise UsageError(f"sampling is {sampling!r}: give a Sampling, such as Sampling(temperature=0.8)")
        ids, most = self.prompt_ids(prompt), whole_number("max_new_tokens", max_new_tokens, 1)
        counted = None if logprobs is None else whole_number("logprobs", logprobs, 0)
        sampler, seen = Sampler(sampling or Sampling()), list(ids)
        text, stops = self.tokenizer.stream(ids), StopText(stop)
        ends = frozenset[int]() if ignore_eos else self.tokenizer.end_ids
        stats = self.stats = Stats(load_s=self.stats.load_s, prompt_tokens=len(ids))
        with self._text() as turn:
            logits = self._prefill(turn, ids)
        first_at = time.monotonic()
        self._worked = np.zeros_like(self.times()[1])
        while True:
            with self._lock:  # the logits are the engine's: another text would write over them
                self._check_turn(turn)
                token = sampler.pick(logits, seen)
                chances = () if counted is None else token_logprobs(logits, token, counted)
            seen.append(token)
            stats.new_tokens += 1
            stats.decode_s = time.monotonic() - first_at
            ended = token in ends
            last = ended or stats.new_tokens == most or len(seen) >= self.context
            piece = stops.push(text.rest() if ended else text.push(token))
            if last and not ended:
                piece += stops.push(text.rest())
            if last or stops.found:
                piece += stops.rest()
                stats.finish_reason = "stop" if ended or stops.found else "length"
            if piece or not ended:
                yield Token(token, piece, *chances)
            if last or stops.found:
                return
            logits = self._step(turn, token)
            self._worked += self.times()[1]

    def busy_shares(self) -> dict[str, float]:
        """Of each worker the part of the last answer's decode time that it computed, 1 at most; 0 without an answer."""
        if not self._worked.size:
            return dict.fromkeys(self.ownership.names, 0.0)
        busy_s = (self._worked[:, :, 1] - self._worked[:, :, 0]).sum(0) / 1e9
        shares = np.clip(busy_s / max(self.stats.decode_s, 1e-9), 0, 1)
        return dict(zip(self.ownership.names, shares.tolist(), strict=True))

    def prompt_ids(self, prompt: str | Sequence[int]) -> list[int]:
        """The token ids of a prompt, checked against vocabulary and context."""
        if isinstance(prompt, str):
            ids = self.tokenizer.encode(prompt)
        elif isinstance(prompt, bytes) or not isinstance(prompt, Iterable):
            raise UsageError(f"the prompt is of type {type(prompt).__name__}: give text or token ids")
        else:
            ids = [whole_number("a token id", token) for token in prompt]
        if not ids:
            raise UsageError("the prompt is empty: give at least one token")
        self._check_ids(ids)
        if len(ids) >= self.context:
            raise UsageError(
                f"the prompt has {len(ids)} tokens, and the context holds {self.context}, the answer included: "
                "shorten it or pass a larger --ctx"
            )
        return [int(token) for token in ids]

    def decode_ids(self, ids: Sequence[int], count: int) -> list[int]:
        """The `count` greedy tokens that follow `ids` after the first, past any end of the text: for measurements."""
        ids, count = self.prompt_ids(ids), whole_number("count", count, 0)
        self.stats = Stats(load_s=self.stats.load_s, prompt_tokens=len(ids), new_tokens=count + 1)
        with self._text() as turn:
            self._check_room(len(ids), count)
            logits, answer = self._prefill(turn, ids), []
            started = time.monotonic()
            for _ in range(count):
                answer.append(int(np.argmax(logits)))
                logits = self._step(turn, answer[-1])
        self.stats.decode_s = time.monotonic() - started
        return answer

    def forced_logits(self, ids: Sequence[int], prefill: int) -> Iterator[npt.NDArray[np.float32]]:
        """Teacher forcing: prefill the first `prefill` tokens, at least one, then decode the rest one at a time.

        Yields float32 [vocab] logits after the prefill and after each further token: how quality is measured, since
        prefill alone is dense and never takes the sparse path.
        """
        ids, prefill = self.prompt_ids(ids), whole_number("prefill", prefill)
        if not 1 <= prefill <= len(ids):
            raise UsageError(f"a prefill of {prefill} of {len(ids)} tokens: there are no logits before the first")
        with self._text() as turn:
            self._forget(0)
            logits = self._prefill(turn, ids[:prefill]).copy()
        yield logits
        for token in ids[prefill:]:
            with self._lock:
                logits = self._step(turn, token).copy()
            yield logits

    def step(self, token: int) -> npt.NDArray[np.float32]:
        """Logits, float32 [vocab], after one token more behind what the cache holds; valid until the next job.

        Raises UsageError for a token outside the vocabulary and when the context is full.
        """
        with self._text() as turn:
            return self._step(turn, token)

    @contextlib.contextmanager
    def _text(self) -> Iterator[int]:
        """Begin a text, or go on with what the cache holds, alone: other threads wait, older texts are over."""
        self._check_open()
        with self._lock:
            self._check_open()
            self._turn += 1
            yield self._turn

    def _prefill(self, turn: int, ids: list[int]) -> npt.NDArray[np.float32]:
        """Logits after `ids`; what the cache already holds of them is not computed again."""
        started = time.monotonic()
        known, most = 0, min(len(self._cached), len(ids) - 1, self._runtime.team.clean)
        while known < most and self._cached[known] == ids[known]:
            known += 1
        self._forget(known)
        most = self._runtime.board.sizes.max_tokens
        while len(self._cached) < len(ids):
            at = len(self._cached)
            self._run(turn, ids[at : at + most], at + most >= len(ids))
        self.stats.prefilled = len(ids) - known
        self.stats.prefill_s = time.monotonic() - started
        return self._logits

    def _step(self, turn: int, token: int) -> npt.NDArray[np.float32]:
        measure = self._measures and self._decoded % _MEASURE_EVERY == 0
        self._decoded += 1
        self._run(turn, [token], True, measure=measure)
        return self._logits

    def _run(
        self, turn: int, tokens: list[int], want_logits: bool, *, measure: bool = False, capture: bool = False
    ) -> None:
        """Run `tokens` behind what the cache holds, for the text that began with `turn`.

        Compiled code checks no bounds, so all are checked here.
        """
        self._check_open()
        with self._lock, hold_interrupts():
            self._check_open()
            self._check_turn(turn)
            at = len(self._cached)
            self._check_room(at, len(tokens))
            if not 0 < len(tokens) <= self._runtime.board.sizes.max_tokens:
                raise UsageError(f"a job of {len(tokens)} tokens: give 1 to {self._runtime.board.sizes.max_tokens}")
            self._check_ids(tokens)
            self._runtime.run(tokens, at, want_logits, measure=measure, capture=capture)
            if self._trace is not None and self._serving:
                self._trace.note(at, len(tokens), *self.times())
            self._cached += tokens

    def _check_turn(self, turn: int) -> None:
        if turn != self._turn:
            raise UsageError("this text is over: another one was begun with the same engine, which computes one")

    def _check_room(self, at: int, tokens: int) -> None:
        if at + tokens > self.context:
            raise UsageError(
                f"{tokens} tokens behind the first {at}, but the context holds {self.context}: pass a larger --ctx"
            )

    def _check_ids(self, ids: Sequence[int]) -> None:
        vocab = self.model.spec.vocab
        for token in ids:
            if not isinstance(token, int | np.integer):
                raise UsageError(f"token id {token!r} is not a whole number")
            if not 0 <= token < vocab:
                raise UsageError(f"token id {token} is outside the vocabulary of {vocab}")

    def _forget(self, position: int) -> None:
        """Drop what the KV cache holds from `position` on."""
        del self._cached[position:]
        self._runtime.team.forget(position)

    def _check_open(self) -> None:
        if self._closed:
            raise UsageError("this engine is closed: load the model again")
        if os.getpid() != self._owner:
            raise UsageError(f"this engine belongs to process {self._owner}: load the model in this one")

    @property
    def _logits(self) -> npt.NDArray[np.float32]:
        return self._runtime.team.logits

    def workers(self) -> list[WorkerStats]:
        """What each worker has done since the model was loaded."""
        self._check_open()
        reports = self._runtime.supervisor.reports()
        stats = []
        for index, (name, hello) in enumerate(self._runtime.supervisor.hellos.items()):
            report = reports.get(name, LoadReport(0, [], [], [], [0] * 4))
            groups = int(np.count_nonzero(self._runtime.board.owner == index))
            busy = sum(report.busy_ns) / 1e9
            read, neurons = sum(report.bytes), sum(report.neurons)
            nodes = {} if name.startswith("gpu") else dict(self._runtime.supervisor.readies[name].ledger)
            stats.append(WorkerStats(name, hello.device, hello.pid, busy, neurons, read, groups, report.jobs, nodes))
        return stats

    def times(self) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """When what of the last job was done: see `ThreadTeam.times`."""
        self._check_open()
        return self._runtime.team.times()

    def reports(self) -> Mapping[str, LoadReport]:
        """What each worker has done on single tokens, by layers; the front's fit goes on from there."""
        self._check_open()
        return self._runtime.supervisor.reports()

    def device_memory(self) -> dict[str, int]:
        """Bytes of the GPU worker's memory by purpose; empty without one."""
        self._check_open()
        readies = self._runtime.supervisor.readies.items()
        return {what: size for name, ready in readies if name.startswith("gpu") for what, size in ready.ledger.items()}

    def selection(self) -> Selection | None:
        """How the selected neurons compare with those that fire; None if nothing was predicted and measured."""
        self._check_open()
        measured = np.array([report.measured for report in self._runtime.supervisor.reports().values()])
        if self.selector not in PREDICTING or not self.model.spec.sparse or not measured[0, 0]:
            return None
        neurons = int(measured[0, 0]) * self.model.layout.groups * GROUP
        selected, fired, hit = (int(column) for column in measured[:, 1:].sum(0))
        return Selection(fired / neurons, selected / neurons, hit / max(fired, 1), hit / max(selected, 1))

    def coordinator_bytes(self) -> dict[str, int]:
        """Bytes of weights that the coordinator reads for a token: attention, predictor, head."""
        entries = dict(self.model.entries)
        if self.lowbit is not None:
            entries |= self.lowbit.file.entries
        roles = {name: name.rpartition(".")[2] for name in entries if name.startswith("layers.")}
        predicting = {"lowrank": ("fc1", "fc2"), "lowbit": ("lowbit",)}.get(self.selector, ())
        return {
            "attention": sum(entries[name].nbytes for name, role in roles.items() if role in ("q", "k", "v", "o")),
            "predictor": sum(entries[name].nbytes for name, role in roles.items() if role in predicting),
            "head": entries["head" if "head" in entries else "embed"].nbytes,
        }

    def active_fraction(self, workers: Sequence[WorkerStats]) -> float | None:
        """Share of all neurons that were computed, over all single-token jobs; None if there were none."""
        layout = self.model.layout
        passes = workers[0].jobs
        total = passes * layout.groups * GROUP
        return sum(worker.neurons for worker in workers) / total if total else None

    def reset(self) -> None:
        """Forget the KV cache: the next prompt is computed from its first token."""
        with self._text():
            self._forget(0)

    def close(self) -> None:
        """End the workers and the team, after a job that another thread has under way; may be called twice."""
        # A forked child may have copied the lock as another thread held it.
        with self._lock if os.getpid() == self._owner else contextlib.nullcontext():
            self._close()

    def _close(self) -> None:
        if self._trace is not None and not self._closed:
            pids = {name: hello.pid for name, hello in self._runtime.workers().items()}
            transfers = self.ownership.transfers if hasattr(self._runtime, "front") else ()
            self._closing.callback(self._trace.close, pids, transfers)
        self._closed = True
        if self._dropped.detach() is not None:
            self._closing.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()
