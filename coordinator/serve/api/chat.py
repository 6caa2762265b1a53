"""/v1/chat/completions."""

import contextlib
import uuid
from collections.abc import AsyncIterator
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from warmfront.coordinator.serve.answers import Choice, Piece, chat_logprobs, merged, now, usage
from warmfront.coordinator.serve.errors import invalid
from warmfront.coordinator.serve.schema import ChatRequest
from warmfront.coordinator.serve.service import Service
from warmfront.coordinator.serve.tools import MARKS, CallParser
from warmfront.coordinator.serve.transport import Events, as_event, read, while_connected
from warmfront.coordinator.text.parts import Parts

__all__ = ["chat_completions"]


async def chat_completions(service: Service, request: Request) -> Response:
    """Answer a conversation, whole or as it comes."""
    limits = service.limits
    wanted = await read(request, ChatRequest, limits.body_bytes, limits.client_s)
    service.check_model(wanted.model)
    ids, choices = await _begin(service, wanted)
    head = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": now(), "model": service.model}
    if wanted.stream:
        return Events(_events(service, wanted, head, ids, choices), limits.answer_s)
    body = await while_connected(request, _whole(service, wanted, head, ids, choices), limits.answer_s)
    return JSONResponse(body)


async def _begin(service: Service, wanted: ChatRequest) -> tuple[list[int], list[Choice]]:
    """The prompt, and its answers, which are queued."""
    engine = service.engine
    if wanted.top_logprobs and not wanted.logprobs:
        raise invalid("top_logprobs needs logprobs: true", "top_logprobs")
    tools = wanted.tools if wanted.tool_choice != "none" else None
    grammar = await service.aside(service.grammars.wanted, wanted)
    ids = await service.chat_ids(wanted.messages, tools)
    most = service.most_tokens(wanted.max_completion_tokens or wanted.max_tokens, len(ids))
    stop = (*(wanted.stop or ()), *service.stop, *engine.engine.tokenizer.chat_stops)
    names = {tool.function.name for tool in tools or ()}
    choices: list[Choice] = []
    for index in range(wanted.n or 1):
        parts = Parts(engine.engine.tokenizer, ids, MARKS if names else ())
        answer = service.generate(
            ids,
            max_new_tokens=most,
            sampling=service.sampling_of(wanted, index),
            stop=stop,
            ignore_eos=bool(wanted.ignore_eos),
            logprobs=(wanted.top_logprobs or 0) if wanted.logprobs else None,
            constraint=await service.constraint(grammar, parts),
        )
        parser = CallParser(names) if names else None
        choices.append(Choice(index, answer, service.metrics, parts, parser))
    return ids, choices


async def _whole(
    service: Service, wanted: ChatRequest, head: dict[str, Any], ids: list[int], choices: list[Choice]
) -> dict[str, Any]:
    """The response of a request that wants all at once."""
    tokenizer = service.engine.engine.tokenizer
    results: list[dict[str, Any]] = [{"text": "", "reasoning": "", "calls": [], "logprobs": []} for _ in choices]
    async with contextlib.aclosing(merged(choices)) as pieces:  # type: ignore[type-var]
        async for choice, piece in pieces:
            if piece is None:
                continue
            result = results[choice.index]
            result["text"] += piece.text
            result["reasoning"] += piece.reasoning
            result["calls"] += [call.as_object() for call in piece.calls]
            if piece.token is not None and wanted.logprobs:
                result["logprobs"].append(chat_logprobs(tokenizer, piece.token))
    found = []
    for choice, result in zip(choices, results, strict=True):
        text = result["text"].strip() if result["calls"] else result["text"]
        message = {"role": "assistant", "content": text or (None if result["calls"] else "")}
        message |= {"reasoning_content": result["reasoning"]} if result["reasoning"] else {}
        message |= {"tool_calls": result["calls"]} if result["calls"] else {}
        logprobs = {"content": result["logprobs"]} if wanted.logprobs else None
        found.append(
            {
                "index": choice.index,
                "message": message,
                "logprobs": logprobs,
                "finish_reason": choice.finish_reason,
            }
        )
    return head | {"object": "chat.completion", "choices": found, "usage": usage([len(ids)], choices)}


async def _events(
    service: Service, wanted: ChatRequest, head: dict[str, Any], ids: list[int], choices: list[Choice]
) -> AsyncIterator[bytes]:
    """The events of a request that streams."""
    head = head | {"object": "chat.completion.chunk"}
    with_usage = wanted.stream_options is not None and wanted.stream_options.include_usage
    nothing = {"usage": None} if with_usage else {}

    def chunk(index: int, delta: dict[str, Any], reason: str | None = None, logprobs: Any = None) -> bytes:
        choice = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": reason}
        return as_event(head | {"choices": [choice]} | nothing)

    tokenizer = service.engine.engine.tokenizer
    async with contextlib.aclosing(merged(choices)) as pieces:  # type: ignore[type-var]
        for choice in choices:
            yield chunk(choice.index, {"role": "assistant", "content": ""})
        async for choice, piece in pieces:
            if piece is None:
                yield chunk(choice.index, {}, choice.finish_reason)
                continue
            logprobs = None
            if wanted.logprobs and piece.token is not None:
                logprobs = {"content": [chat_logprobs(tokenizer, piece.token)]}
            delta = _delta(choice, piece)
            if delta or logprobs:
                yield chunk(choice.index, delta, logprobs=logprobs)
    if with_usage:
        yield as_event(head | {"choices": [], "usage": usage([len(ids)], choices)})
    yield b"data: [DONE]\n\n"


def _delta(choice: Choice, piece: Piece) -> dict[str, Any]:
    """What a piece adds to the message."""
    delta: dict[str, Any] = {}
    if piece.text and not (choice.called and not piece.text.strip()):
        delta["content"] = piece.text
    if piece.reasoning:
        delta["reasoning_content"] = piece.reasoning
    if piece.calls:
        first = choice.called - len(piece.calls)
        delta["tool_calls"] = [{"index": first + i} | call.as_object() for i, call in enumerate(piece.calls)]
    return delta
