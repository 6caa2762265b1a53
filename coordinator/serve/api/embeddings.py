"""/v1/embeddings: what the model makes of a text, as a vector of length 1 (OpenAI's are so: products are cosines).

`pooling` says of what: the mean of the hidden states of all tokens, or the last token's. They are those behind the last
layer and its norm, which the head reads. A model that was trained to write is no match for one trained to embed.
"""

import base64
import contextlib
from typing import Any

import numpy as np
import numpy.typing as npt
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from warmfront.coordinator.serve.api.completions import prompts_of
from warmfront.coordinator.serve.errors import ApiError, invalid
from warmfront.coordinator.serve.schema import EmbeddingRequest
from warmfront.coordinator.serve.service import Service
from warmfront.coordinator.serve.transport import read, while_connected

__all__ = ["embeddings"]

Floats = npt.NDArray[np.float32]


async def embeddings(service: Service, request: Request) -> Response:
    """The vector of each input."""
    limits = service.limits
    wanted = await read(request, EmbeddingRequest, limits.body_bytes, limits.client_s)
    service.check_model(wanted.model)
    size = service.engine.engine.model.spec.hidden
    if wanted.dimensions is not None and wanted.dimensions != size:
        raise invalid(f"this model's vectors have {size} dimensions, no other number", "dimensions")
    return JSONResponse(await while_connected(request, _whole(service, wanted), limits.answer_s))


async def _whole(service: Service, wanted: EmbeddingRequest) -> dict[str, Any]:
    """The response. One input at a time waits in the engine's queue, which is for others too."""
    texts = [await service.text_ids(given) for given in prompts_of(wanted.input)]
    vectors = [await _vector(service, ids, wanted.pooling or "mean") for ids in texts]
    data = [
        {"object": "embedding", "index": index, "embedding": _encoded(vector, wanted.encoding_format)}
        for index, vector in enumerate(vectors)
    ]
    tokens = sum(map(len, texts))
    service.metrics.embedded(tokens)
    usage = {"prompt_tokens": tokens, "total_tokens": tokens}
    return {"object": "list", "data": data, "model": service.model, "usage": usage}


async def _vector(service: Service, ids: list[int], pooling: str) -> Floats:
    """Float32 [hidden]. Raises ApiError where the model's numbers are not finite."""
    pooled = np.zeros(service.engine.engine.model.spec.hidden, np.float64)
    async with contextlib.aclosing(service.engine.hidden_states(ids)) as states:  # type: ignore[type-var]
        async for some in states:
            pooled = some[-1].astype(np.float64) if pooling == "last" else pooled + some.sum(0, dtype=np.float64)
    length = np.linalg.norm(pooled)
    if not np.isfinite(length):
        raise ApiError(500, "the model's hidden states are not finite", code="engine_error")
    return (pooled / max(length, np.finfo(np.float64).tiny)).astype(np.float32)


def _encoded(vector: Floats, form: str | None) -> list[float] | str:
    """As a list, or the bytes of its float32, little-endian, in base64."""
    return base64.b64encode(vector.astype("<f4").tobytes()).decode() if form == "base64" else vector.tolist()
