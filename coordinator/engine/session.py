"""Tokens in, logits out: one text at a time on a running model, and what of it the KV cache holds.

What begins a text ends those begun before, also from other threads; a job of an ended one raises UsageError. Compiled
code checks no bounds, so whatever reaches it is checked here. A process that was forked has no use of a session.
"""

import contextlib
import os
import threading
import warnings
import weakref
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Self

import numpy as np
import numpy.typing as npt

from warmfront.coordinator.engine.resolve import RunPlan
from warmfront.coordinator.engine.runtime import Runtime
from warmfront.coordinator.engine.trace import Trace
from warmfront.coordinator.text.tokenizer import Tokenizer
from warmfront.shared.errors import UsageError
from warmfront.shared.machine.process import hold_interrupts
from warmfront.shared.model.store import PackedModel

if TYPE_CHECKING:
    from warmfront.coordinator.engine.text_core import TextCore

__all__ = ["Session"]

Floats = npt.NDArray[np.float32]
# Of how many decoded tokens one has its selection compared with the neurons that fire: that computes all of them.
_COMPARE_EVERY = 64


def _close_dropped(closing: contextlib.ExitStack, owner: int) -> None:
    """End what a session that nobody closed has left running, unless this process was forked from its owner."""
    if os.getpid() == owner:
        closing.close()
        warnings.warn(
            "an engine was not closed: call close(), or use it in a with block", ResourceWarning, stacklevel=2
        )


class Session:
    """Owns `model` and what runs it; made empty, then `start`ed once. `close` ends it at any point.

    `profiles`: `firing` and `feed_forward_inputs` can be asked for; such a session notes nothing in a trace.
    """

    def __init__(self, model: PackedModel, plan: RunPlan, *, profiles: bool = False) -> None:
        self.model, self.plan = model, plan
        self.tokenizer = Tokenizer(model)
        self.runtime = Runtime(model, plan, profiles=profiles)
        self._owner, self._lock, self._turn = os.getpid(), threading.RLock(), 0
        self._closed = self._serving = False
        # To compare a selection all gates are read, which a cache of the file does not hold.
        self._compares = plan.config.measure and plan.config.ram_budget is None
        self._decoded = self._compare_at = 0
        self._cached: list[int] = []  # the tokens that the KV cache holds
        # Of the last batch: tokens behind those that are not of the text yet, and how many have become so.
        self._guesses: list[int] = []
        self._accepted = 0
        self.core: TextCore | None = None  # of texts, with selectors that have one
        self._trace = Trace(Path(plan.config.trace)) if plan.config.trace is not None else None
        self._closing = contextlib.ExitStack()
        self._closing.callback(model.close)
        self._closing.callback(self.runtime.close)
        self._dropped = weakref.finalize(self, _close_dropped, self._closing, os.getpid())

    def start(self, say: Callable[[str], None], progress: Callable[[str, int, int], None]) -> None:
        """Start the workers and the team and wait until they have loaded."""
        self.runtime.start(say, progress)

    def open_core(self, say: Callable[[str], None]) -> None:
        """From now on texts have cores."""
        with hold_interrupts():
            from warmfront.coordinator.engine.text_core import TextCore

        self.core = TextCore(self.runtime, say)

    def serve(self) -> None:
        """From now on the jobs are a user's: they are traced and compared."""
        self._serving = True

    @contextlib.contextmanager
    def text(self) -> Iterator[int]:
        """Begin a text, or go on with what the cache holds, alone: other threads wait, older texts are over.

        Yields the number of the text, by which its jobs are known.
        """
        self.check_open()
        with self._lock:
            self.check_open()
            self._turn += 1
            yield self._turn

    @contextlib.contextmanager
    def going_on(self, turn: int) -> Iterator[None]:
        """Hold what is of the last job, such as the logits; raises UsageError if another text has begun."""
        with self._lock:
            self._check_turn(turn)
            yield

    def prefill(self, turn: int, ids: list[int]) -> tuple[Floats, int]:
        """Logits, float32 [vocab], after `ids`, valid until the next job; and how many of `ids` were computed for them.

        The rest was in the cache.
        """
        return self._fill(turn, ids, len(ids) - 1)

    def hold(self, turn: int, ids: list[int]) -> None:
        """Have the cache hold `ids`, none or more, and nothing behind them; those that it lacks are computed."""
        self._fill(turn, ids, len(ids))

    def _fill(self, turn: int, ids: list[int], most: int) -> tuple[Floats, int]:
        """Compute `ids`, but for `most` at their beginning that the cache holds: the logits after the last that was
        computed, and how many were."""
        known = self._known(ids, most)
        if self.core is not None:
            # What scores the neurons is the same whatever was in the cache.
            self.core.begin()
            known = min(known, len(ids) - self.core.unread(len(ids)))
        self.forget(known)
        self._read(turn, ids, want_logits=True)
        logits = self.runtime.logits[0]
        if self.core is not None:
            logits = logits.copy()
            self._choose_core()
        return logits, len(ids) - known

    def _read(self, turn: int, ids: list[int], want_logits: bool) -> None:
        """Compute what of `ids` is not in the cache, the last tokens in a job that scores the neurons."""
        last = len(ids) - self.core.unread(len(ids)) if self.core is not None else len(ids)
        while (at := len(self._cached)) < len(ids):
            end = min(at + self.runtime.max_tokens, last if at < last else len(ids))
            scores = self.core is not None and at >= last
            self._run(turn, ids[at:end], want_logits=want_logits and end == len(ids), noted=scores)
            if scores and self.core is not None:
                self.core.learn(end - at, end)

    def _known(self, ids: Sequence[int], most: int) -> int:
        """How many of `ids`, at most `most`, need not be computed: the cache holds them, finite."""
        most, known = min(len(self._cached), most, self.runtime.clean), 0
        while known < most and self._cached[known] == ids[known]:
            known += 1
        return known

    def step(self, turn: int, token: int) -> Floats:
        """Logits, float32 [vocab], after one token more behind what the cache holds; valid until the next job."""
        logits: Floats = self.verify(turn, [token])[0]
        return logits

    def watched_step(self, turn: int, token: int) -> tuple[Floats, Floats]:
        """As `step`, and what the feed-forward layers got for the token, after their norm: float32 [layers, hidden]."""
        logits = self.verify(turn, [token], capture=True)[0]
        return logits, self.runtime.captured(1)[:, 0]

    def selected(self) -> npt.NDArray[np.uint32]:
        """The neurons that the selector chose for the last single token: [layers, groups], bit i = neuron i.

        Where nothing is predicted, those that were computed whole.
        """
        return self.runtime.ownership.asked() if self.plan.selector.masked else self.runtime.ownership.fired()

    def verify(self, turn: int, tokens: list[int], *, capture: bool = False) -> Floats:
        """Logits, float32 [len(tokens), vocab], after each of up to `runtime.batch` tokens; valid until the next job.
        `capture`: of a single token the feed-forward inputs are kept.

        The first is the text's next token, the others are a guess of what follows: of the text they are only once they
        are accepted. The logits are the same bit for bit as if the tokens came one by one; only those after the first
        if a key or value is not finite.
        """
        self._keep_core(turn)
        at = len(self._cached)
        compare = self._serving and self._compares and len(tokens) == 1 and self._decoded >= self._compare_at
        if compare:
            self._compare_at = self._decoded + _COMPARE_EVERY
        self._decoded += 1
        self._run(turn, tokens, want_logits=True, decode=True, compare_selection=compare, capture=capture)
        if len(tokens) > 1 and at <= self.runtime.clean < at + len(tokens):
            # The tokens share tiles of the cache, where 0 times infinity is NaN.
            self.forget(at)
            tokens = tokens[:1]
            self._run(turn, tokens, want_logits=True, decode=True)
        return self.runtime.logits[: len(tokens)]

    def _keep_core(self, turn: int) -> None:
        """Where it is time for that, read the last tokens of the text again, and choose its core by them too."""
        if self.core is None:
            return
        # A text that is over must not make the one under way forget its last tokens.
        with self.going_on(turn):
            if len(self._cached) < self.core.due:
                return
            text = self._cached.copy()
            self.forget(len(text) - self.core.unread(len(text)))
            self._read(turn, text, want_logits=False)
            self._choose_core()

    def core_scores(self, ids: list[int]) -> npt.NDArray[np.float64]:
        """What the tokens of a text of its own, one job at most, give the neurons: float64 [layers, neurons]."""
        assert self.core is not None
        with self.text() as turn:
            self.core.begin()
            self.forget(0)
            self._read(turn, ids, want_logits=False)
            return self.core.scores.copy()

    def measure_core(self, ids: list[int]) -> None:
        """Find out from `ids`, as many as fit, which layers lose so much by a core that they are computed whole.

        Measured with tokens behind those that tell the core: of their own neurons a core has more than of later ones.
        """
        assert self.core is not None
        most = min(self.core.window, self.plan.context, len(ids))
        with self.text() as turn:
            self.prefill(turn, ids[: most - most // 8])
            self._run(turn, ids[most - most // 8 : most])
            with hold_interrupts():
                self.core.measure_layers(self._cached)
            self.reset()

    def _choose_core(self) -> None:
        with self._lock, hold_interrupts():
            assert self.core is not None
            self.core.choose(self._cached)

    def accept(self, turn: int) -> None:
        """The next guess of the last `verify` is the text's next token: its logits count, and the cache holds it."""
        with self._lock, hold_interrupts():
            self._check_turn(turn)
            self._accepted += 1
            self._cached.append(self._guesses.pop(0))
            self._decoded += 1
            self.runtime.observe(self._accepted)

    def firing(self, ids: Sequence[int]) -> npt.NDArray[np.bool_]:
        """Which neurons each of up to 288 tokens fires, computed anew from an empty cache: [layers, tokens, neurons].

        Only of a session that profiles, without a GPU.
        """
        self.check_open()
        if not self.runtime.profiles:
            raise UsageError("this engine does not note which neurons fire: open it for profiling")
        with self.text() as turn:
            self.forget(0)
            # A single token would take the way of decoding, which does not note this.
            self._run(turn, [*ids, ids[0]] if len(ids) == 1 else list(ids))
            return self.runtime.fired(len(ids))

    def feed_forward_inputs(self, ids: Sequence[int]) -> Floats:
        """What the feed-forward layers get, after their norm, for each token: float32 [layers, len(ids), hidden].

        Only with the selector lowbit, or of a session that profiles. What exceeds the context is computed as a text of
        its own.
        """
        self.check_open()
        if self.runtime.lowbit is None and not self.runtime.profiles:
            raise UsageError(
                "the feed-forward inputs are kept for the selector lowbit only: load with selector='lowbit'"
            )
        max_tokens = min(self.runtime.max_tokens, self.plan.context)
        inputs: list[Floats] = []
        with self.text() as turn:
            for at in range(0, len(ids), max_tokens):
                chunk = list(ids[at : at + max_tokens])
                if not inputs or len(self._cached) + len(chunk) > self.plan.context:
                    self.forget(0)
                self._run(turn, chunk, capture=True)
                inputs.append(self.runtime.captured(len(chunk)))
        return np.concatenate(inputs, axis=1)

    def reset(self) -> None:
        """Forget the KV cache and the text's core: the next prompt is computed from its first token."""
        with self.text():
            self.forget(0)
            if self.core is not None:
                self.core.begin()

    def forget(self, position: int) -> None:
        """Drop what the KV cache holds from `position` on."""
        del self._cached[position:]
        self._guesses = []
        self.runtime.forget(position)

    def _run(
        self,
        turn: int,
        tokens: list[int],
        *,
        want_logits: bool = False,
        decode: bool = False,
        compare_selection: bool = False,
        capture: bool = False,
        noted: bool = False,
    ) -> None:
        """Run `tokens` behind what the cache holds, for the text that began with `turn`."""
        self.check_open()
        with self._lock, hold_interrupts():
            self.check_open()
            self._check_turn(turn)
            at = len(self._cached)
            self.check_room(at, len(tokens))
            most = self.runtime.batch if decode else self.runtime.max_tokens
            if not 0 < len(tokens) <= most:
                raise UsageError(f"a job of {len(tokens)} tokens: give 1 to {most}")
            self.check_ids(tokens)
            if self._guesses:
                self.runtime.forget(at)
            options = {"decode": decode, "compare_selection": compare_selection, "capture": capture, "noted": noted}
            self.runtime.run(tokens, at, want_logits, **options)
            if self._trace is not None and self._serving:
                self._trace.note(at, len(tokens), *self.runtime.times())
            self._cached += tokens[:1] if decode else tokens
            self._guesses, self._accepted = tokens[1:] if decode else [], 0

    def _check_turn(self, turn: int) -> None:
        if turn != self._turn:
            raise UsageError("this text is over: another one was begun with the same engine, which computes one")

    def check_room(self, at: int, tokens: int) -> None:
        """Raise UsageError unless the context holds `tokens` behind the first `at`."""
        if at + tokens > self.plan.context:
            raise UsageError(
                f"{tokens} tokens behind the first {at}, but the context holds {self.plan.context}: pass a larger --ctx"
            )

    def check_ids(self, ids: Sequence[int]) -> None:
        """Raise UsageError unless all are ids of the vocabulary."""
        vocab = self.model.spec.vocab
        for token in ids:
            if not isinstance(token, int | np.integer):
                raise UsageError(f"token id {token!r} is not a whole number")
            if not 0 <= token < vocab:
                raise UsageError(f"token id {token} is outside the vocabulary of {vocab}")

    def check_open(self) -> None:
        """Raise UsageError if the session was closed, or belongs to the process that this one was forked from."""
        if self._closed:
            raise UsageError("this engine is closed: load the model again")
        if os.getpid() != self._owner:
            raise UsageError(f"this engine belongs to process {self._owner}: load the model in this one")

    def close(self) -> None:
        """End the workers and the team, after a job that another thread has under way; may be called twice."""
        # A forked child may have copied the lock as another thread held it.
        with self._lock if os.getpid() == self._owner else contextlib.nullcontext():
            self._close()

    def _close(self) -> None:
        if self._trace is not None and not self._closed:
            pids = {name: hello.pid for name, hello in self.runtime.workers().items()}
            self._closing.callback(self._trace.close, pids, self.runtime.transfers())
        self._closed = True
        if self._dropped.detach() is not None:
            self._closing.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
