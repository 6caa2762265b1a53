"""/tokenize, /detokenize and /apply-template, as llama.cpp's server has them."""

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from warmfront.coordinator.serve.schema import DetokenizeRequest, TemplateRequest, TokenizeRequest
from warmfront.coordinator.serve.service import Service
from warmfront.coordinator.serve.transport import read

__all__ = ["apply_template", "detokenize", "tokenize"]


async def tokenize(service: Service, request: Request) -> Response:
    """The token ids of a text; with `with_pieces` the text of each too."""
    wanted = await read(request, TokenizeRequest, service.limits.body_bytes, service.limits.client_s)
    tokenizer = service.engine.engine.tokenizer
    ids = await service.aside(lambda: tokenizer.encode(wanted.content, with_start=wanted.add_special))
    if not wanted.with_pieces:
        return JSONResponse({"tokens": ids})
    pieces = [{"id": token, "piece": tokenizer.bytes_of(token).decode(errors="replace")} for token in ids]
    return JSONResponse({"tokens": pieces})


async def detokenize(service: Service, request: Request) -> Response:
    """The text of token ids."""
    wanted = await read(request, DetokenizeRequest, service.limits.body_bytes, service.limits.client_s)
    engine = service.engine.engine
    engine.session.check_ids(wanted.tokens)
    return JSONResponse({"content": await service.aside(engine.tokenizer.decode, wanted.tokens)})


async def apply_template(service: Service, request: Request) -> Response:
    """The prompt that the model's chat template makes of a conversation."""
    wanted = await read(request, TemplateRequest, service.limits.body_bytes, service.limits.client_s)
    return JSONResponse({"prompt": await service.chat_text(wanted.messages, wanted.tools)})
