"""What all requests share: the engine once it is loaded, the limits, and how text becomes token ids."""

import asyncio
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from warmfront.coordinator.engine.batching.async_engine import Answer, AsyncEngine
from warmfront.coordinator.serve.errors import ApiError
from warmfront.coordinator.serve.front import Live
from warmfront.coordinator.serve.grammar import Grammar, Grammars
from warmfront.coordinator.serve.metrics import Metrics
from warmfront.coordinator.serve.schema import GenerationRequest, Message, Tool
from warmfront.coordinator.text.constraint import Constraint
from warmfront.coordinator.text.parts import Parts
from warmfront.shared.config import Sampling

__all__ = ["Limits", "Service", "template_messages"]

Result = TypeVar("Result")


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What one request may take."""

    body_bytes: int = 8 << 20
    # Of an answer; None: what the context holds.
    max_tokens: int | None = None
    # From the request to the end of its answer.
    answer_s: float = 600.0
    # For the client to send its request, and to take what it is sent.
    client_s: float = 30.0
    # Requests that wait.
    queue: int = 64


@dataclass(slots=True)
class Service:
    """Where the server stands: loading, ready, draining."""

    model: str
    limits: Limits = field(default_factory=Limits)
    # What holds where a request says nothing.
    sampling: Sampling = field(default_factory=lambda: Sampling(temperature=1.0))
    stop: tuple[str, ...] = ()
    created: int = field(default_factory=lambda: int(time.time()))
    draining: bool = False
    metrics: Metrics = field(default_factory=Metrics)
    loaded: AsyncEngine | None = None
    live: Live | None = None
    _grammars: Grammars | None = None

    @property
    def state(self) -> str:
        """One word for /health."""
        if self.draining:
            return "draining"
        return "ok" if self.loaded is not None else "loading"

    @property
    def engine(self) -> AsyncEngine:
        """The engine. Raises ApiError while there is none, or no more requests are taken."""
        if self.draining:
            raise ApiError(503, "the server is shutting down", code="draining")
        if self.loaded is None:
            raise ApiError(503, "the model is loading: try again later", code="loading")
        return self.loaded

    @property
    def grammars(self) -> Grammars:
        """What makes constraints of grammars. Raises ApiError as `engine` does."""
        if self._grammars is None:
            self._grammars = Grammars(self.engine.engine)
        return self._grammars

    def generate(self, ids: Sequence[int], **options: Any) -> Answer:
        """Queue an answer, with the options of `AsyncEngine.generate`."""
        return self.engine.generate(ids, **options)

    async def constraint(self, grammar: Grammar | None, parts: Parts | None = None) -> Constraint | None:
        """What holds one answer to a grammar, if there is one; see `Grammars.constraint`."""
        return None if grammar is None else await self.aside(self.grammars.constraint, grammar, parts)

    def check_model(self, wanted: str | None) -> None:
        """Raise ApiError if a request names another model; its name in any form that clients use will do."""
        if wanted and wanted not in (self.model, "default", "warmfront"):
            raise ApiError(
                404, f"there is no model {wanted!r} here, only {self.model!r}", code="model_not_found", param="model"
            )

    async def aside(self, function: Callable[..., Result], *args: Any) -> Result:
        """Call what takes its time, such as a tokenizer, without holding up the others."""
        return await asyncio.to_thread(function, *args)

    async def text_ids(self, prompt: str | Sequence[int]) -> list[int]:
        """The token ids of a prompt, checked."""
        return await self.aside(self.engine.engine.prompt_ids, prompt)

    async def chat_ids(self, messages: Sequence[Message], tools: Sequence[Tool] | None) -> list[int]:
        """The token ids of a conversation in the model's chat template, checked."""
        engine = self.engine.engine
        ids = await self.aside(engine.tokenizer.chat_ids, template_messages(messages), _template_tools(tools))
        return await self.aside(engine.prompt_ids, ids)

    async def chat_text(self, messages: Sequence[Message], tools: Sequence[Tool] | None) -> str:
        """The prompt of a conversation as text."""
        render = self.engine.engine.tokenizer.render_chat
        return await self.aside(render, template_messages(messages), _template_tools(tools))

    def sampling_of(self, request: GenerationRequest, choice: int) -> Sampling:
        """How the tokens of one of a request's choices are drawn: with a seed each choice has its own."""
        asked: dict[str, Any] = {
            name: value
            for name in ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
            if (value := getattr(request, name)) is not None
        }
        if asked.get("top_k") == -1:  # as some clients say that it is off
            asked["top_k"] = 0
        seed = self.sampling.seed if request.seed is None else request.seed
        settings = {name: getattr(self.sampling, name) for name in Sampling.__dataclass_fields__}
        return Sampling(**(settings | asked | {"seed": None if seed is None else (seed + choice) % 2**64}))

    def most_tokens(self, asked: int | None, prompt: int, default: int | None = None) -> int:
        """How many tokens an answer may have."""
        room = self.engine.engine.plan.context - prompt
        limits = [room, asked or default or room, self.limits.max_tokens or room]
        return max(1, min(limits))


def _template_tools(tools: Sequence[Tool] | None) -> list[dict[str, Any]] | None:
    return [tool.model_dump(exclude_none=True) for tool in tools] if tools else None


def template_messages(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """The messages as chat templates take them: contents are text, arguments of calls are objects.

    Raises ApiError for parts that are not text.
    """
    return [_template_message(message) for message in messages]


def _template_message(message: Message) -> dict[str, Any]:
    plain: dict[str, Any] = message.model_dump(exclude_none=True, exclude={"content", "tool_calls"})
    if message.role == "developer":
        plain["role"] = "system"
    if message.reasoning_content and not message.content:
        plain["thinking"] = message.reasoning_content  # as harmony's templates call what led to a call of a tool
    if isinstance(message.content, list):
        for part in message.content:
            if part.type != "text" or part.text is None:
                raise ApiError(400, f"this model reads text only, and a message has a part {part.type!r}")
        plain["content"] = "".join(part.text or "" for part in message.content)
    else:
        plain["content"] = message.content or ""
    if message.tool_calls:
        plain["tool_calls"] = [
            {"id": call.id, "type": "function", "function": {"name": call.function.name, "arguments": _arguments(call)}}
            for call in message.tool_calls
        ]
    return plain


def _arguments(call: Any) -> Mapping[str, Any]:
    """The arguments of a call, which clients send as JSON in a text. Raises ApiError where they are no object."""
    arguments = call.function.arguments
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments or "{}")
        except (ValueError, RecursionError):
            arguments = None
    if not isinstance(arguments, dict):
        raise ApiError(400, "the arguments of a tool call must be a JSON object", param="messages")
    return arguments
