"""Texts on a running model, and the jobs that compute their tokens: of a prompt, or decoded ones of many texts.

Each text (`scheduling/text.py`) has its own part of the KV cache. Jobs come one at a time, from any thread. Compiled
code checks no bounds, so whatever reaches it is checked here. A process that was forked has no use of it.
"""

import contextlib
import os
import threading
import warnings
import weakref
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Self

import numpy as np

from warmfront.coordinator.decode.team_config import Place
from warmfront.coordinator.engine.resolve import RunPlan
from warmfront.coordinator.engine.runtime import Runtime
from warmfront.coordinator.engine.trace import Trace
from warmfront.coordinator.scheduling.pages import Pages
from warmfront.coordinator.scheduling.text import Text
from warmfront.shared.errors import UsageError
from warmfront.shared.machine.process import hold_interrupts
from warmfront.shared.model.kv_layout import pages_of
from warmfront.shared.model.store import PackedModel

__all__ = ["Batch", "Passes"]

# Texts, and the tokens of each.
Batch = Sequence[tuple[Text, list[int]]]


def _close_dropped(closing: contextlib.ExitStack, owner: int) -> None:
    """End what a session that nobody closed has left running, unless this process was forked from its owner."""
    if os.getpid() == owner:
        closing.close()
        warnings.warn(
            "an engine was not closed: call close(), or use it in a with block", ResourceWarning, stacklevel=2
        )


class Passes:
    """Owns `model` and what runs it; `close` ends it at any point. `profiles`: see `Runtime`."""

    def __init__(self, model: PackedModel, plan: RunPlan, *, profiles: bool = False) -> None:
        self.model, self.plan = model, plan
        self.runtime = Runtime(model, plan, profiles=profiles)
        self.single = False  # one text at a time: what begins one ends the other
        self._owner, self._lock = os.getpid(), threading.RLock()
        self._closed = self._serving = False
        self._jobs = 0
        self.pages = Pages(plan.texts * pages_of(plan.context))
        self._latest: Text | None = None  # the last that `begin` gave
        self._trace = Trace(Path(plan.config.trace)) if plan.config.trace is not None else None
        self._closing = contextlib.ExitStack()
        self._closing.callback(model.close)
        self._closing.callback(self.runtime.close)
        self._dropped = weakref.finalize(self, _close_dropped, self._closing, os.getpid())

    def serve(self) -> None:
        """From now on the jobs are a user's: they are traced and compared."""
        self._serving = True

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        """No other thread has a job in between: what is of the last one, such as the logits, stays."""
        self.check_open()
        with self._lock:
            self.check_open()
            yield

    @contextlib.contextmanager
    def text(self) -> Iterator[Text]:
        """Begin a text, or go on with what the last such text has left in the cache, alone: other threads wait."""
        with self.alone():
            text = self.begin()
            try:
                yield text
            finally:
                self.leave(text)

    def begin(self) -> Text:
        """The same until `leave`, beside other texts; but where one is at a time, the one before is over."""
        with self.alone():
            last = self._latest
            goes_on = last is not None and (last.left or self.single)
            self._latest = last.moved() if last is not None and goes_on else self.new_text()
            return self._latest

    def leave(self, text: Text) -> None:
        """The text's owner is done with it: what it has in the cache is there for the next one. In any thread."""
        if os.getpid() == self._owner:
            with self._lock:
                text.left = True
                if text is not self._latest:
                    self.close_text(text)

    def settle(self) -> None:
        """Give up what the last text has left: its pages are needed, and prompts that begin like its own find it."""
        with self._lock:
            if self._latest is not None and self._latest.left:
                self.close_text(self._latest)
                self._latest = None

    def new_text(self) -> Text:
        """An empty text of its own, until `close_text`."""
        return Text(self.pages, self.plan.context)

    def close_text(self, text: Text) -> None:
        """Give up what the text has in the cache; prompts that begin like its own find that."""
        with self._lock:
            if not text.over and not self._closed:
                self.forget(text, 0)
                text.close()
            text.over = True

    def read(self, text: Text, tokens: list[int], *, want_logits: bool, noted: bool = False) -> None:
        """Compute the next tokens of a prompt, of one job at most; `runtime.logits[0]`, if wanted, is of the last."""
        self.run([(text, tokens)], want_logits=want_logits, noted=noted)

    def run(
        self,
        batch: Batch,
        *,
        want_logits: bool = False,
        decode: bool = False,
        compare_selection: bool = False,
        capture: bool = False,
        noted: bool = False,
    ) -> None:
        """Run tokens behind what the cache holds of their texts: of a prompt, or as decoded ones."""
        tokens = [token for _, own in batch for token in own]
        with self.alone(), hold_interrupts():
            most = self.runtime.batch if decode else self.runtime.max_tokens
            if not 0 < len(tokens) <= most:
                raise UsageError(f"a job of {len(tokens)} tokens: give 1 to {most}")
            self.check_ids(tokens)
            if self.single and len(batch) > 1:
                raise UsageError("a pass of several texts, but a core is of one: load with another selector")
            places: list[Place] = []
            for text, own in batch:
                self.check_under_way(text)
                self.check_room(len(text), len(own))
                if text.guesses:
                    self.forget(text, len(text))
                text.grow(len(text) + len(own))
                places += [Place(len(text) + i, text.table) for i in range(len(own) if decode else 1)]
            rows = np.cumsum([0, *(len(own) for _, own in batch)]).tolist()
            self._jobs += 1
            options = {"decode": decode, "compare_selection": compare_selection, "capture": capture, "noted": noted}
            self.runtime.run(tokens, places, want_logits, observed=rows[:-1], **options)
            if self._trace is not None and self._serving:
                self._trace.note(places[0].position, len(tokens), *self.runtime.times())
            spoiled = self.runtime.spoiled()
            for (text, own), row in zip(batch, rows, strict=False):
                for token, position in spoiled:
                    if row <= token < row + len(own):
                        text.spoil(position, len(text) + len(own))
                text.job, text.row, text.accepted = self._jobs, row, 0
                if decode:
                    text.ids.append(own[0])
                    text.guesses = own[1:]
                else:
                    text.read(own)

    def check_under_way(self, text: Text) -> None:
        """Raise UsageError if another text has ended this one."""
        if text.over:
            raise UsageError("this text is over: another one was begun with the same engine, whose core is of one")

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

    def is_last(self, text: Text) -> bool:
        """Whether the last job was a pass of this text."""
        return text.job == self._jobs

    def forget(self, text: Text, position: int) -> None:
        """Drop what the KV cache holds of the text from `position` on, or a little before it."""
        with self._lock, hold_interrupts():
            first, end = text.spoiled(position)
            if first < end:
                self.runtime.scrub(text.table, first, end)
            text.cut(position)

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
