"""The engine for asyncio: one thread computes, callers queue and read what comes.

    async with await AsyncEngine.load("smollm2-135m") as engine:
        async for token in engine.generate("The lighthouse keeper", max_new_tokens=32):
            print(token.text, end="")

The interface that callers build on:

    AsyncEngine(engine, queue=64)     takes over a loaded Engine, and closes it; `load` loads one
    .generate(prompt, ...)            an `Answer`, queued at once; UsageError for a wrong request, BusyError when full
    .hidden_states(prompt)            an async iterator of float32 [tokens, hidden], behind the last layer and its norm,
                                      of all of the prompt's tokens, some at a time; queued when the first is asked for
    .waiting, .running                requests in the queue, and those that are being computed
    .failure                          the error after which nothing is computed any more, or None
    .after_pass                       called on the engine's thread with the tokens that each pass brought
    .call(function)                   a coroutine: function(engine) on the engine's thread, between two passes
    .close()                          ends what runs and waits; their readers get UsageError. May be called twice.

    Answer                            an async iterator of `Token`s; an error of the engine is raised where it is read
    .stats                            `Stats` of this answer alone; complete when the iterator has ended
    .aclose(), or dropping it         cancels: nothing more is computed for it

An answer belongs to the event loop in which it was asked for. What is not read yet waits in memory, at most
`max_new_tokens` tokens. Requests begin in the order in which they came, and are computed side by side
(`batching/batcher.py`) as far as the KV cache holds them: load the model with `parallel`.
"""

import asyncio
import queue
import threading
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import Future
from types import TracebackType
from typing import Any, Self, TypeVar

import numpy as np

from warmfront.coordinator.engine.batching.batcher import Batcher, Event, Floats, Request
from warmfront.coordinator.engine.engine import Engine
from warmfront.coordinator.engine.stats import Stats, Token
from warmfront.coordinator.models.default_model import DEFAULT_MODEL
from warmfront.coordinator.text.reply import Wishes
from warmfront.shared.errors import BusyError, UsageError

__all__ = ["Answer", "AsyncEngine"]

QUEUE = 64  # requests that may wait
_CLOSED = "this engine is closed: load the model again"
Result = TypeVar("Result")


class _Asked(Request):
    """A request of an event loop; it does not hold the `Answer`, whose end is the reader's."""

    def __init__(self, engine: Engine, ids: list[int], wishes: Wishes, *, embeds: bool = False) -> None:
        super().__init__(engine, ids, wishes, embeds=embeds)
        self.loop = asyncio.get_running_loop()
        self.events: asyncio.Queue[Event] = asyncio.Queue()


def _put(events: Sequence[tuple[_Asked, Event]]) -> None:
    for request, event in events:
        request.events.put_nowait(event)


class Answer(AsyncIterator[Token]):
    """The tokens of one request, as they are computed."""

    def __init__(self, request: _Asked) -> None:
        self._request, self._over = request, False

    @property
    def stats(self) -> Stats:
        """What this answer has cost so far."""
        return self._request.stats

    async def __anext__(self) -> Token:
        if self._over:
            raise StopAsyncIteration
        event = await self._request.events.get()
        if isinstance(event, Token):
            return event
        assert not isinstance(event, np.ndarray)
        self._over = True
        if event is None:
            raise StopAsyncIteration
        raise event

    async def aclose(self) -> None:
        """Cancel: the engine ends it before its next pass."""
        self._request.cancelled = self._over = True

    def __del__(self) -> None:
        self._request.cancelled = True


class AsyncEngine:
    """Computes requests from asyncio on a thread of its own; see the module's text."""

    def __init__(self, engine: Engine, *, queue: int = QUEUE) -> None:
        self.engine = engine
        self.after_pass: Callable[[int], None] | None = None
        self._most, self._work, self._closed = queue, _Work(), False
        self._queued: list[_Asked] = []  # not given to the batcher yet
        self._batcher = Batcher(engine)
        self._failure: Exception | None = None
        self._lock = threading.Lock()  # of what is queued, and of what is put behind the end
        self._thread = threading.Thread(target=self._serve, name="warmfront-engine", daemon=True)
        self._thread.start()

    @classmethod
    async def load(cls, model: str = DEFAULT_MODEL, *, queue: int = QUEUE, **options: Any) -> Self:
        """Load a model as `Engine.load` does, with its options, while the event loop goes on."""
        return cls(await asyncio.to_thread(Engine.load, model, **options), queue=queue)

    def generate(self, prompt: str | Sequence[int], **wishes: Any) -> Answer:
        """Queue a request; `wishes` are the keywords of `Engine.generate`, the fields of `Wishes`.

        Raises UsageError for a prompt that does not fit and BusyError if as many requests as may are waiting.
        """
        return Answer(self._queue(_Asked(self.engine, self.engine.prompt_ids(prompt), Wishes(**wishes))))

    async def hidden_states(self, prompt: str | Sequence[int]) -> AsyncIterator[Floats]:
        """Yield what the model makes of `prompt`: float32 [tokens, hidden], some tokens at a time, in their order.

        Prompts are computed densely, whatever the selector. Raises as `generate` does; closing it cancels.
        """
        ids = self.engine.prompt_ids(prompt)
        request = self._queue(_Asked(self.engine, ids, Wishes(max_new_tokens=1), embeds=True))
        try:
            while (event := await request.events.get()) is not None:
                if isinstance(event, Exception):
                    raise event
                assert isinstance(event, np.ndarray)
                yield event
        finally:
            request.cancelled = True

    def _queue(self, request: _Asked) -> _Asked:
        with self._lock:
            self._check_open()
            if self.waiting >= self._most:
                raise BusyError(f"{self._most} requests are waiting already: try again later")
            self._queued.append(request)
            self._work.put(request)
        return request

    @property
    def waiting(self) -> int:
        """Requests that are not computed yet, without those that were cancelled meanwhile."""
        return sum(not request.cancelled for request in (*self._queued, *list(self._batcher.waiting)))

    @property
    def running(self) -> int:
        """Requests that are computed."""
        return len(self._batcher.running)

    @property
    def failure(self) -> Exception | None:
        """What has ended the engine without being asked to, if anything has."""
        return self._failure or self.engine.session.runtime.supervisor.error

    async def call(self, function: Callable[[Engine], Result]) -> Result:
        """What `function` gives for the engine, called on its thread, in turn with the requests."""
        future: Future[Result] = Future()

        def work() -> None:
            if future.set_running_or_notify_cancel():
                try:
                    future.set_result(function(self.engine))
                except Exception as error:
                    future.set_exception(error)

        with self._lock:
            self._check_open()
            self._work.put(work)
        return await asyncio.wrap_future(future)

    def _check_open(self) -> None:
        if self._closed:
            raise UsageError(_CLOSED)

    def close(self) -> None:
        """End the answers under way, the thread and the engine."""
        with self._lock:
            if not self._closed:
                self._closed = True
                self._work.put(None)
        self._thread.join()
        self.engine.close()

    def _serve(self) -> None:
        """The engine's thread: whatever ends it ends all requests."""
        try:
            self._work_until_closed()
        except Exception as error:  # that no request is to blame for
            self._failure = error
        with self._lock:
            self._closed = True
            self._batcher.waiting += self._queued
            self._queued.clear()
        self._deliver(self._batcher.end(self._failure or UsageError(_CLOSED)))
        while not self._work.empty():
            work = self._work.get()
            if work is not None and not isinstance(work, _Asked):
                work()

    def _work_until_closed(self) -> None:
        session = self.engine.session
        session.settle()
        idle = False
        while True:
            while idle or not self._work.empty():
                work, idle = self._work.get(), False
                if work is None:
                    return
                if isinstance(work, _Asked):
                    with self._lock:
                        self._queued.remove(work)
                        self._batcher.waiting.append(work)
                else:
                    work()
                    session.settle()
            events = self._batcher.step()
            idle = events is None
            if events:
                self._deliver(events)

    def _deliver(self, events: Sequence[tuple[Request, Event]]) -> None:
        """Give readers their tokens, ends and errors: one call for each event loop."""
        asked = [(request, event) for request, event in events if isinstance(request, _Asked)]
        for loop in {id(request.loop): request.loop for request, _ in asked}.values():
            own = [(request, event) for request, event in asked if request.loop is loop]
            try:
                loop.call_soon_threadsafe(_put, own)
            except RuntimeError:  # the loop was closed: nobody reads
                for request, _ in own:
                    request.cancelled = True
        tokens = sum(isinstance(event, Token) for _, event in events)
        if tokens and self.after_pass is not None:
            self.after_pass(tokens)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await asyncio.to_thread(self.close)


# What the engine's thread is asked to do: a request, a function, or None to end.
_Work = queue.SimpleQueue[_Asked | Callable[[], None] | None]
