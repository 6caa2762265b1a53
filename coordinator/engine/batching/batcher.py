"""Continuous batching: the answers under way on one engine, a pass at a time, as `scheduling/turns.py` decides.

One thread owns it. A request has all of the KV cache that it may need from its admission to its end. Its greedy tokens
are those that it gets alone: its prompt is read as ever, or was for a request that began like it, and each token is
computed as if it came alone (`Session.decode`).
"""

import time
from collections import deque
from collections.abc import Callable, Iterable

import numpy as np
import numpy.typing as npt

from warmfront.coordinator.engine.engine import Engine
from warmfront.coordinator.engine.speculation import Speculation
from warmfront.coordinator.engine.stats import Stats, Token
from warmfront.coordinator.scheduling.text import Text
from warmfront.coordinator.scheduling.turns import Admit, Decode, Idle, Limits, Read, Running, decide
from warmfront.coordinator.text.reply import Reply, Wishes
from warmfront.shared.model.panels import BATCH, PRODUCT_TOKENS

__all__ = ["Batcher", "Event", "Floats", "Request"]

Floats = npt.NDArray[np.float32]
# A token, or hidden states of tokens, [tokens, hidden]; the end, or an error instead.
Event = Token | Floats | Exception | None


class Request:
    """What is asked, and what has become of it; made by any thread.

    `embeds`: no answer is wanted but the hidden states of all of its tokens, which are computed whatever is cached.
    """

    def __init__(self, engine: Engine, ids: list[int], wishes: Wishes, *, embeds: bool = False) -> None:
        self.ids, self.embeds = ids, embeds
        self.reply = Reply(ids, engine.tokenizer, engine.plan.context, wishes)
        self.stats = Stats(load_s=engine.stats.load_s, prompt_tokens=len(ids))
        self.cancelled = False  # set by any thread
        # Of the one that computes.
        self.text: Text | None = None
        self.served = self.unread = 0
        self.since = 0.0
        self.guessing: Speculation | None = None

    @property
    def until(self) -> int:
        """Positions of the KV cache that it may need: the last token is never put in."""
        return len(self.ids) + self.reply.most - 1


class Batcher:
    """Requests, waiting and under way."""

    def __init__(self, engine: Engine) -> None:
        self._engine, self._session = engine, engine.session
        runtime = self._session.runtime
        most = 1 if self._session.single else BATCH
        self._limits = Limits(most, runtime.batch, runtime.max_tokens, PRODUCT_TOKENS)
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []
        self._tokens, self._read_last = 0, False
        self._events: list[tuple[Request, Event]] = []

    def step(self) -> list[tuple[Request, Event]] | None:
        """Do what is next; what came of it, for whom. None: there is nothing to do."""
        self._drop(request for request in self.running if request.cancelled)
        for request in [request for request in self.waiting if request.cancelled]:
            self.waiting.remove(request)
        running = [Running(each.unread, each.served) for each in self.running]
        step = decide(self._fits(), running, self._limits, read_last=self._read_last)
        if not isinstance(step, Admit):  # or prompts that are read in one job each would follow upon another
            self._read_last = isinstance(step, Read)
        match step:
            case Idle():
                return None
            case Admit():
                self._guarded([self.waiting[0]], self._admit)
            case Read(index, tokens):
                request = self.running[index]
                self._guarded([request], lambda: self._read(request, tokens))
            case Decode(indices):
                batch = [self.running[index] for index in indices]
                self._guarded(batch, lambda: self._decode(batch))
        events, self._events = self._events, []
        return events

    def end(self, error: Exception) -> list[tuple[Request, Event]]:
        """No request goes on, and nor does the engine: all of them get `error`."""
        ended: list[tuple[Request, Event]] = [(request, error) for request in (*self.running, *self.waiting)]
        self.running.clear()
        self.waiting.clear()
        return ended

    def _fits(self) -> bool:
        """Whether somebody waits, and the KV cache has room for it."""
        if not self.waiting:
            return False
        if self._session.single:
            return True
        request = self.waiting[0]
        pages = self._session.pages
        return self._session.new_text().needs(request.ids, request.until) <= pages.available

    def _guarded(self, requests: list[Request], work: Callable[[], None]) -> None:
        """An error of the engine ends the requests that it befell."""
        try:
            work()
        except Exception as error:
            for request in requests:
                self._events.append((request, error))
            if requests[0] in self.waiting:
                self.waiting.remove(requests[0])
            self._drop(requests)

    def _drop(self, requests: Iterable[Request]) -> None:
        """These are over."""
        for request in list(requests):
            if request.text is not None:
                self._close(request.text)
                request.text = None
            if request in self.running:
                self.running.remove(request)

    def _close(self, text: Text) -> None:
        if self._session.single:
            self._session.leave(text)
        else:
            self._session.close_text(text)

    def _admit(self) -> None:
        request, session, engine = self.waiting[0], self._session, self._engine
        request.since = time.monotonic()
        if not self.running:
            engine.statistics.begin_answer()
        if session.single:
            request.text = session.begin()
            if request.embeds:
                session.recall(request.text, request.ids, 0)
            request.unread = len(request.ids)
        else:
            request.text = session.new_text()
            known = session.recall(request.text, request.ids, 0 if request.embeds else len(request.ids) - 1)
            request.text.reserve(request.until)
            request.unread = request.stats.prefilled = len(request.ids) - known
        if self._engine.plan.speculates and not request.embeds:
            request.guessing = engine.guessing(request.ids)
        self.running.append(self.waiting.popleft())

    def _read(self, request: Request, tokens: int) -> None:
        session, text = self._session, request.text
        assert text is not None
        if request.embeds:
            self._embed(request, text, tokens)
            return
        with session.alone():
            if session.single:
                # What has a core is read in one go, and scored.
                logits, request.stats.prefilled = session.prefill(text, request.ids)
                request.unread = 0
            else:
                at = len(request.ids) - request.unread
                session.read(text, request.ids[at : at + tokens], want_logits=tokens == request.unread)
                request.unread -= tokens
                logits = session.runtime.logits[0]
            if request.unread == 0:
                now = time.monotonic()
                request.stats.prefill_s, request.since = now - request.since, now
                self._choose(request, logits)

    def _embed(self, request: Request, text: Text, tokens: int) -> None:
        """The next tokens' hidden states."""
        with self._session.alone():
            self._session.read(text, request.ids[len(text) :][:tokens], want_logits=False)
            self._events.append((request, self._session.runtime.hidden(tokens)))
        request.unread -= tokens
        if request.unread == 0:
            self._events.append((request, None))
            self._drop([request])

    def _decode(self, batch: list[Request]) -> None:
        session = self._session
        with session.alone():
            if len(batch) == 1 and batch[0].guessing is not None and batch[0].text is not None:
                self._guess(batch[0], batch[0].guessing, batch[0].text)
            else:
                rows = session.decode([(each.text, [each.reply.token]) for each in batch if each.text is not None])
                for request, logits in zip(batch, rows, strict=True):
                    if request.guessing is not None:
                        request.guessing.passed(request.reply.token)
                    self._choose(request, logits[0])
        self._engine.statistics.add_token()

    def _guess(self, request: Request, guessing: Speculation, text: Text) -> None:
        """A token for one request, perhaps with guesses behind it."""
        logits = guessing.step(text, request.reply.token, request.reply.most - request.reply.count)
        request.stats.drafted, request.stats.accepted = guessing.drafted, guessing.accepted
        self._choose(request, logits)

    def _choose(self, request: Request, logits: Floats) -> None:
        """Its next token."""
        reply, stats = request.reply, request.stats
        request.served = self._tokens = self._tokens + 1
        try:
            piece = reply.choose(logits)
        except Exception as error:
            self._events.append((request, error))
            self._drop([request])
            return
        stats.new_tokens, stats.finish_reason = reply.count, reply.finish_reason or None
        stats.decode_s = time.monotonic() - request.since
        if piece is not None:
            self._events.append((request, Token(*piece)))
        if reply.finish_reason:
            self._events.append((request, None))
            self._drop([request])
