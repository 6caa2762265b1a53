"""What clients send: the fields of OpenAI's API that mean something here, others are ignored, and what servers of the
same API have beside them (top_k, min_p, repetition_penalty, ignore_eos, grammar).

    CompletionRequest  ChatRequest      /v1/completions, /v1/chat/completions
    EmbeddingRequest                    /v1/embeddings
    TokenizeRequest  DetokenizeRequest  TemplateRequest
"""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

__all__ = [
    "ChatRequest",
    "CompletionRequest",
    "DetokenizeRequest",
    "EmbeddingRequest",
    "GenerationRequest",
    "Message",
    "ResponseFormat",
    "TemplateRequest",
    "TokenizeRequest",
    "Tool",
]

MAX_CHOICES = 16
MAX_TOP = 20  # as OpenAI has it
_STOPS = 32

TokenIds = Annotated[list[Annotated[int, Field(ge=0, lt=2**31)]], Field(min_length=1)]


def _listed(value: object) -> object:
    return [value] if isinstance(value, str) else value


class _Request(BaseModel):
    """Unknown fields are ignored, and a null is a field that was left out."""

    model_config = ConfigDict(extra="ignore", allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, data: object) -> object:
        return {name: value for name, value in data.items() if value is not None} if isinstance(data, dict) else data


class StreamOptions(_Request):
    include_usage: bool = False


class GenerationRequest(_Request):
    """What both kinds of completions have in common."""

    model: str | None = None
    max_tokens: int | None = Field(None, ge=1)
    temperature: float | None = Field(None, ge=0, le=100)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=-1, lt=2**31)
    min_p: float | None = Field(None, ge=0, le=1)
    repetition_penalty: float | None = Field(None, ge=0.01, le=100)
    seed: int | None = Field(None, ge=-(2**63), lt=2**64)
    n: int | None = Field(None, ge=1, le=MAX_CHOICES)
    stop: Annotated[Annotated[list[str], Field(max_length=_STOPS)] | None, BeforeValidator(_listed)] = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    ignore_eos: bool | None = None
    grammar: str | None = None


class CompletionRequest(GenerationRequest):
    prompt: str | TokenIds | Annotated[list[str | TokenIds], Field(min_length=1, max_length=64)]
    logprobs: int | None = Field(None, ge=0, le=MAX_TOP)
    echo: bool | None = None


class Function(_Request):
    name: str = Field(pattern=r"^[A-Za-z0-9_.:-]{1,128}$")
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(_Request):
    type: Literal["function"] = "function"
    function: Function


class FunctionName(_Request):
    name: str


class NamedTool(_Request):
    type: Literal["function"] = "function"
    function: FunctionName


class Part(_Request):
    type: str
    text: str | None = None


class Call(_Request):
    name: str
    arguments: str | dict[str, Any] | None = None


class ToolCall(_Request):
    id: str | None = None
    type: Literal["function"] = "function"
    function: Call


class Message(_Request):
    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: str | list[Part] | None = None
    name: str | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None
    reasoning_content: str | None = None


class JsonSchema(_Request):
    name: str | None = None
    schema_: dict[str, Any] | bool | None = Field(None, alias="schema")
    strict: bool | None = None


class ResponseFormat(_Request):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None


class ChatRequest(GenerationRequest):
    messages: list[Message] = Field(min_length=1, max_length=4096)
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=MAX_TOP)
    tools: list[Tool] | None = Field(None, max_length=256)
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: bool | None = None
    response_format: ResponseFormat | None = None


class EmbeddingRequest(_Request):
    model: str | None = None
    input: str | TokenIds | Annotated[list[str | TokenIds], Field(min_length=1, max_length=2048)]
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: int | None = Field(None, ge=1)
    pooling: Literal["mean", "last"] | None = None


class TokenizeRequest(_Request):
    content: str
    add_special: bool = False
    with_pieces: bool = False


class DetokenizeRequest(_Request):
    tokens: list[Annotated[int, Field(ge=0, lt=2**31)]]


class TemplateRequest(_Request):
    messages: list[Message] = Field(min_length=1, max_length=4096)
    tools: list[Tool] | None = Field(None, max_length=256)
