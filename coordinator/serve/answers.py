"""One answer of a request: its tokens from the engine become text, reasoning and calls of tools."""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from warmfront.coordinator.engine.batching.async_engine import Answer
from warmfront.coordinator.engine.stats import Token
from warmfront.coordinator.serve.metrics import Metrics
from warmfront.coordinator.serve.tools import Call, CallParser
from warmfront.coordinator.text.harmony import Part
from warmfront.coordinator.text.parts import Parts
from warmfront.coordinator.text.tokenizer import Tokenizer

__all__ = ["Choice", "Piece", "chat_logprobs", "merged", "usage"]

_TAGS = ("<think>", "</think>")


@dataclass(slots=True)
class Piece:
    """What a token, or the end of the answer, has brought."""

    text: str = ""
    reasoning: str = ""
    calls: list[Call] = field(default_factory=list)
    token: Token | None = None


class Choice:
    """An answer under way; `pieces` is to be read once, and closed."""

    def __init__(
        self,
        index: int,
        answer: Answer,
        metrics: Metrics,
        parts: Parts | None = None,
        parser: CallParser | None = None,
    ) -> None:
        self.index, self.answer = index, answer
        self._metrics, self._asked_at = metrics, time.monotonic()
        self._parts, self._parser = parts, parser
        self.called = 0

    @property
    def finish_reason(self) -> str:
        """Of an answer that has ended."""
        return "tool_calls" if self.called else self.answer.stats.finish_reason or "stop"

    async def pieces(self) -> AsyncIterator[Piece]:
        """What the answer brings, token by token, and at its end."""
        last_at = 0.0
        try:
            async for token in self.answer:
                at = time.monotonic()
                if last_at:
                    self._metrics.gap(at - last_at)
                else:
                    self._metrics.first_token(at - self._asked_at)
                last_at = at
                piece = Piece(token=token)
                if self._parts is None:
                    piece.text = token.text
                else:
                    self._divide(self._parts.push(token.id, token.text), piece)
                yield piece
            last = Piece()
            if self._parts is not None:
                self._divide(self._parts.rest(), last)
            if self._parser is not None:
                self._add(self._parser.rest(), last)
            if last.text or last.reasoning or last.calls:
                yield last
        finally:
            await self.answer.aclose()
            self._metrics.answered(self.answer.stats, time.monotonic() - self._asked_at)

    def _divide(self, parts: Iterator[Part], piece: Piece) -> None:
        for part in parts:
            call = self._parser.message(part.recipient, part.text) if self._parser and part.recipient else None
            if call is not None:
                self._add(iter([call]), piece)
            elif part.is_reasoning:
                text = part.text
                for tag in _TAGS:
                    text = text.replace(tag, "")
                piece.reasoning += text
            elif self._parser is None or part.recipient:
                piece.text += part.text
            else:
                self._add(self._parser.push(part.text), piece)

    def _add(self, found: Iterator[str | Call], piece: Piece) -> None:
        for each in found:
            if isinstance(each, Call):
                self.called += 1
                piece.calls.append(each)
            else:
                piece.text += each


async def merged(choices: Sequence[Choice]) -> AsyncIterator[tuple[Choice, Piece | None]]:
    """The pieces of several answers as they come, each with its choice; None behind the last of each."""
    if len(choices) == 1:  # as nearly always: no tasks and no queue
        async with contextlib.aclosing(choices[0].pieces()) as pieces:  # type: ignore[type-var]
            async for piece in pieces:
                yield choices[0], piece
        yield choices[0], None
        return
    events: asyncio.Queue[tuple[Choice, Piece | Exception | None]] = asyncio.Queue()

    async def follow(choice: Choice) -> None:
        try:
            async for piece in choice.pieces():
                events.put_nowait((choice, piece))
            events.put_nowait((choice, None))
        except Exception as error:
            events.put_nowait((choice, error))

    tasks, left = [asyncio.create_task(follow(choice)) for choice in choices], len(choices)
    try:
        while left:
            choice, event = await events.get()
            if isinstance(event, Exception):
                raise event
            left -= event is None
            yield choice, event
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def usage(prompts: Sequence[int], choices: Sequence[Choice]) -> dict[str, Any]:
    """What a request has cost; `prompts`: tokens of each prompt."""
    completion, prompt = sum(choice.answer.stats.new_tokens for choice in choices), sum(prompts)
    cached = sum(max(0, choice.answer.stats.prompt_tokens - choice.answer.stats.prefilled) for choice in choices)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": min(cached, prompt)},
    }


def chat_logprobs(tokenizer: Tokenizer, token: Token) -> dict[str, Any]:
    """The entry of a token in `logprobs.content`."""
    top = [_entry(tokenizer, each, logprob) for each, logprob in token.top]
    return _entry(tokenizer, token.id, token.logprob) | {"top_logprobs": top}


def _entry(tokenizer: Tokenizer, token: int, logprob: float | None) -> dict[str, Any]:
    spelled = tokenizer.bytes_of(token)
    return {"token": spelled.decode(errors="replace"), "logprob": logprob, "bytes": list(spelled)}


def now() -> int:
    """Seconds since 1970, as OpenAI's API has them."""
    return int(time.time())
