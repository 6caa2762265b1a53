"""The engine for asyncio: one thread computes, callers queue and read what comes.

    async with await AsyncEngine.load("smollm2-135m") as engine:
        async for token in engine.generate("The lighthouse keeper", max_new_tokens=32):
            print(token.text, end="")

The interface that callers build on:

    AsyncEngine(engine, queue=64)     takes over a loaded Engine, and closes it; `load` loads one
    .generate(prompt, ...)            an `Answer`, queued at once; UsageError for a wrong request, BusyError when full
    .waiting, .running                requests in the queue, and those that are being computed
    .after_pass                       called on the engine's thread with the tokens that each pass brought
    .call(function)                   a coroutine: function(engine) on the engine's thread, between two passes
    .close()                          ends what runs and waits; their readers get UsageError. May be called twice.

    Answer                            an async iterator of `Token`s; an error of the engine is raised where it is read
    .stats                            `Stats` of this answer alone; complete when the iterator has ended
    .aclose(), or dropping it         cancels: nothing more is computed for it

An answer belongs to the event loop in which it was asked for. What is not read yet waits in memory, at most
`max_new_tokens` tokens. Requests are computed in the order in which they came.
"""

import asyncio
import queue
import threading
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from concurrent.futures import Future
from types import TracebackType
from typing import Any, Self, TypeVar

from warmfront.coordinator.engine.engine import Engine
from warmfront.coordinator.engine.stats import Stats, Token
from warmfront.coordinator.models.default_model import DEFAULT_MODEL
from warmfront.coordinator.text.constraint import Constraint
from warmfront.shared.config import Sampling
from warmfront.shared.errors import BusyError, UsageError

__all__ = ["Answer", "AsyncEngine"]

QUEUE = 64  # requests that may wait
_CLOSED = "this engine is closed: load the model again"
Result = TypeVar("Result")


class _Request:
    """What the engine's thread knows of an answer; it does not hold the `Answer`, whose end is the reader's."""

    def __init__(self, start: Callable[[], Iterator[Token]]) -> None:
        self.start, self.stats, self.cancelled = start, Stats(), False
        self._loop = asyncio.get_running_loop()
        # Tokens; None at the end; an error instead.
        self.events: asyncio.Queue[Token | Exception | None] = asyncio.Queue()

    def put(self, event: Token | Exception | None) -> None:
        """From the engine's thread: give the reader a token, the end, or an error."""
        try:
            self._loop.call_soon_threadsafe(self.events.put_nowait, event)
        except RuntimeError:  # the loop was closed: nobody reads
            self.cancelled = True


class Answer(AsyncIterator[Token]):
    """The tokens of one request, as they are computed."""

    def __init__(self, request: _Request) -> None:
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
        self.running = 0
        self._most, self._work, self._closed = queue, _Work(), False
        self._queued: list[_Request] = []
        self._lock = threading.Lock()  # of the counts, and of what is put behind the end
        self._thread = threading.Thread(target=self._serve, name="warmfront-engine", daemon=True)
        self._thread.start()

    @classmethod
    async def load(cls, model: str = DEFAULT_MODEL, *, queue: int = QUEUE, **options: Any) -> Self:
        """Load a model as `Engine.load` does, with its options, while the event loop goes on."""
        return cls(await asyncio.to_thread(Engine.load, model, **options), queue=queue)

    def generate(
        self,
        prompt: str | Sequence[int],
        *,
        max_new_tokens: int = 128,
        sampling: Sampling | None = None,
        stop: str | Sequence[str] = (),
        ignore_eos: bool = False,
        logprobs: int | None = None,
        constraint: Constraint | None = None,
    ) -> Answer:
        """Queue a request; the arguments are those of `Engine.generate`.

        Raises UsageError for a prompt that does not fit and BusyError if as many requests as may are waiting.
        """
        ids, engine = self.engine.prompt_ids(prompt), self.engine
        options: dict[str, Any] = {"max_new_tokens": max_new_tokens, "sampling": sampling, "stop": stop}
        options |= {"ignore_eos": ignore_eos, "logprobs": logprobs, "constraint": constraint}
        request = _Request(lambda: engine.generate(ids, **options))
        request.stats.prompt_tokens = len(ids)
        with self._lock:
            self._check_open()
            if self.waiting >= self._most:
                raise BusyError(f"{self._most} requests are waiting already: try again later")
            self._queued.append(request)
            self._work.put(request)
        return Answer(request)

    @property
    def waiting(self) -> int:
        """Requests in the queue, without those that were cancelled meanwhile."""
        return sum(not request.cancelled for request in self._queued)

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
        """The engine's thread."""
        while (work := self._work.get()) is not None:
            if not isinstance(work, _Request):
                work()
                continue
            with self._lock:
                self._queued.remove(work)
            if not work.cancelled:
                self.running = 1
                self._answer(work)
                self.running = 0

    def _answer(self, request: _Request) -> None:
        """Compute one request to its end, or until it is cancelled."""
        try:
            for token in request.start():
                request.stats = self.engine.stats
                request.put(token)
                if self.after_pass is not None:
                    self.after_pass(1)
                self._check_open()
                if request.cancelled:
                    return
            request.put(None)
        except Exception as error:
            request.put(error)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await asyncio.to_thread(self.close)


# What the engine's thread is asked to do: a request, a function, or None to end.
_Work = queue.SimpleQueue[_Request | Callable[[], None] | None]
