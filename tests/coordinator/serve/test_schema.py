"""What requests may say.  pytest tests/coordinator/serve/test_schema.py"""

import json

import pytest
from pydantic import BaseModel, ValidationError

from warmfront.coordinator.serve.schema import (
    ChatRequest,
    CompletionRequest,
    EmbeddingRequest,
    StreamOptions,
    TemplateRequest,
    TokenizeRequest,
)

MESSAGES = [{"role": "user", "content": "The sea"}]
LEAST = [
    (CompletionRequest, {"prompt": "The sea"}),
    (ChatRequest, {"messages": MESSAGES}),
    (EmbeddingRequest, {"input": "The sea"}),
    (TemplateRequest, {"messages": MESSAGES}),
    (TokenizeRequest, {"content": "The sea"}),
    (StreamOptions, {}),
]


@pytest.mark.parametrize(("kind", "least"), LEAST)
def test_a_null_is_a_field_that_was_left_out(kind: type[BaseModel], least: dict[str, object]) -> None:
    expected = kind.model_validate_json(json.dumps(least))
    optional = [name for name, field in kind.model_fields.items() if not field.is_required()]
    assert optional
    for nulls in (*([name] for name in optional), optional):
        assert kind.model_validate_json(json.dumps(least | dict.fromkeys(nulls))) == expected


@pytest.mark.parametrize(
    ("stop", "meant"), [("a", ["a"]), (["a", "b"], ["a", "b"]), ([], []), (["x"] * 32, ["x"] * 32)]
)
def test_stops(stop: object, meant: list[str]) -> None:
    assert CompletionRequest(prompt="x", stop=stop).stop == meant  # type: ignore[arg-type]


@pytest.mark.parametrize("stop", [["x"] * 33, 1, [1], {"a": 1}, [None]])
def test_what_is_no_stop(stop: object) -> None:
    with pytest.raises(ValidationError):
        CompletionRequest(prompt="x", stop=stop)  # type: ignore[arg-type]
