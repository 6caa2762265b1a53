"""/v1/completions."""

import contextlib
import uuid
from collections.abc import AsyncIterator, Sequence
from typing import Any, cast

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from warmfront.coordinator.engine.stats import Token
from warmfront.coordinator.serve.answers import Choice, merged, now, usage
from warmfront.coordinator.serve.errors import invalid
from warmfront.coordinator.serve.schema import CompletionRequest
from warmfront.coordinator.serve.service import Service
from warmfront.coordinator.serve.transport import Events, as_event, read, while_connected
from warmfront.coordinator.text.tokenizer import Tokenizer

__all__ = ["completions", "prompts_of"]

_DEFAULT_TOKENS = 16  # as OpenAI's API has it
_MAX_ANSWERS = 128


def prompts_of(given: str | Sequence[Any]) -> list[str | list[int]]:
    """The prompts of a request, which may give one or several, as texts or as token ids."""
    if isinstance(given, str) or isinstance(given[0], int):
        return [cast("str | list[int]", given)]
    return list(given)


async def completions(service: Service, request: Request) -> Response:
    """Continue one or several texts, whole or as they come."""
    limits = service.limits
    wanted = await read(request, CompletionRequest, limits.body_bytes, limits.client_s)
    service.check_model(wanted.model)
    prompts, choices = await _begin(service, wanted)
    head = {"id": f"cmpl-{uuid.uuid4().hex}", "object": "text_completion", "created": now(), "model": service.model}
    if wanted.stream:
        return Events(_events(service, wanted, head, prompts, choices), limits.answer_s)
    return JSONResponse(
        await while_connected(request, _whole(service, wanted, head, prompts, choices), limits.answer_s)
    )


async def _begin(service: Service, wanted: CompletionRequest) -> tuple[list[list[int]], list[Choice]]:
    """The prompts, and their answers, which are queued."""
    given, count = prompts_of(wanted.prompt), wanted.n or 1
    if wanted.echo and wanted.logprobs is not None:
        raise invalid("echo with logprobs: the log probabilities of a prompt are not computed here", "echo")
    if len(given) * count > _MAX_ANSWERS:
        raise invalid(f"{len(given)} prompts with {count} answers each: at most {_MAX_ANSWERS} in all", "n")
    grammar = await service.aside(service.grammars.wanted, wanted)
    prompts = [await service.text_ids(prompt) for prompt in given]
    choices: list[Choice] = []
    for ids in prompts:
        for index in range(count):
            answer = service.generate(
                ids,
                max_new_tokens=service.most_tokens(wanted.max_tokens, len(ids), _DEFAULT_TOKENS),
                sampling=service.sampling_of(wanted, index),
                stop=(*(wanted.stop or ()), *service.stop),
                ignore_eos=bool(wanted.ignore_eos),
                logprobs=wanted.logprobs,
                constraint=await service.constraint(grammar),
            )
            choices.append(Choice(len(choices), answer, service.metrics))
    return prompts, choices


async def _whole(
    service: Service,
    wanted: CompletionRequest,
    head: dict[str, Any],
    prompts: list[list[int]],
    choices: list[Choice],
) -> dict[str, Any]:
    """The response of a request that wants all at once."""
    tokenizer, echoes = service.engine.engine.tokenizer, _echoes(wanted)
    texts = [echoes[choice.index // (wanted.n or 1)] for choice in choices]
    tokens: list[list[Token]] = [[] for _ in choices]
    async with contextlib.aclosing(merged(choices)) as pieces:  # type: ignore[type-var]
        async for choice, piece in pieces:
            if piece is not None:
                texts[choice.index] += piece.text
                tokens[choice.index] += [piece.token] if piece.token is not None else []
    found = [
        {
            "index": choice.index,
            "text": texts[choice.index],
            "logprobs": _logprobs(tokenizer, tokens[choice.index], 0) if wanted.logprobs is not None else None,
            "finish_reason": choice.finish_reason,
        }
        for choice in choices
    ]
    return head | {"choices": found, "usage": usage([len(ids) for ids in prompts], choices)}


def _echoes(wanted: CompletionRequest) -> list[str]:
    """What is before each prompt's answers."""
    given = prompts_of(wanted.prompt)
    return [prompt if wanted.echo and isinstance(prompt, str) else "" for prompt in given]


async def _events(
    service: Service,
    wanted: CompletionRequest,
    head: dict[str, Any],
    prompts: list[list[int]],
    choices: list[Choice],
) -> AsyncIterator[bytes]:
    """The events of a request that streams."""
    with_usage = wanted.stream_options is not None and wanted.stream_options.include_usage
    nothing = {"usage": None} if with_usage else {}
    tokenizer, echoes, lengths = service.engine.engine.tokenizer, _echoes(wanted), [0] * len(choices)

    def chunk(choice: Choice, text: str, reason: str | None, logprobs: Any = None) -> bytes:
        found = {"index": choice.index, "text": text, "logprobs": logprobs, "finish_reason": reason}
        return as_event(head | {"choices": [found]} | nothing)

    async with contextlib.aclosing(merged(choices)) as pieces:  # type: ignore[type-var]
        for choice in choices:
            if echo := echoes[choice.index // (wanted.n or 1)]:
                yield chunk(choice, echo, None)
        async for choice, piece in pieces:
            if piece is None:
                yield chunk(choice, "", choice.finish_reason)
                continue
            logprobs = None
            if wanted.logprobs is not None and piece.token is not None:
                logprobs = _logprobs(tokenizer, [piece.token], lengths[choice.index])
            lengths[choice.index] += len(piece.text)
            if piece.text or logprobs:
                yield chunk(choice, piece.text, None, logprobs)
    if with_usage:
        yield as_event(head | {"choices": [], "usage": usage([len(ids) for ids in prompts], choices)})
    yield b"data: [DONE]\n\n"


def _logprobs(tokenizer: Tokenizer, tokens: Sequence[Token], at: int) -> dict[str, Any]:
    """The lists of `logprobs`; `at`: where in the answer's text the first token begins."""
    offsets = []
    for token in tokens:
        offsets.append(at)
        at += len(token.text)
    return {
        "tokens": [tokenizer.decode([token.id]) for token in tokens],
        "token_logprobs": [token.logprob for token in tokens],
        "top_logprobs": [{tokenizer.decode([each]): logprob for each, logprob in token.top} for token in tokens],
        "text_offset": offsets,
    }
