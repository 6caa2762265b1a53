"""Calls of tools in every form, however the text is cut into pieces.  pytest tests/coordinator/serve/test_tools.py"""

import json
from typing import Any

import pytest

pytest.importorskip("pydantic")
from warmfront.coordinator.serve.tools import Call, CallParser

NAMES = {"get_weather", "add"}
PARIS, SUM = ("get_weather", {"city": "Paris"}), ("add", {"a": 1, "b": [2, "x"]})
FORMS = {
    "hermes": (
        '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Paris"}}\n</tool_call>',
        [PARIS],
    ),
    "two of hermes": (
        '<tool_call>{"name": "get_weather", "arguments": {"city": "Paris"}}</tool_call>\n'
        '<tool_call>{"name": "add", "arguments": {"a": 1, "b": [2, "x"]}}</tool_call>',
        [PARIS, SUM],
    ),
    "a list of hermes": (
        '<tool_call>[{"name": "get_weather", "arguments": {"city": "Paris"}}, '
        '{"name": "add", "arguments": "{\\"a\\": 1, \\"b\\": [2, \\"x\\"]}"}]</tool_call>',
        [PARIS, SUM],
    ),
    "qwen3-coder": (
        "<tool_call>\n<function=add>\n<parameter=a>\n1\n</parameter>\n<parameter=b>\n"
        '[2, "x"]\n</parameter>\n</function>\n</tool_call>',
        [SUM],
    ),
    "qwen3-coder, no marks": ("<function=get_weather><parameter=city>Paris</parameter></function>", [PARIS]),
    "glm": (
        "<tool_call>get_weather\n<arg_key>city</arg_key>\n<arg_value>Paris</arg_value>\n</tool_call>",
        [PARIS],
    ),
    "mistral": ('[TOOL_CALLS] [{"name": "get_weather", "arguments": {"city": "Paris"}}]', [PARIS]),
    "llama 3": ('{"name": "get_weather", "parameters": {"city": "Paris"}}', [PARIS]),
    "llama 3, marked": ('<|python_tag|>{"name": "get_weather", "parameters": {"city": "Paris"}}', [PARIS]),
    "llama 4": ("[get_weather(city='Paris'), add(a=1, b=[2, 'x'])]", [PARIS, SUM]),
}


def parsed(text: str, size: int) -> tuple[str, list[tuple[str, Any]]]:
    """Text and calls of an answer that comes in pieces of `size` letters."""
    parser = CallParser(NAMES)
    found = [each for at in range(0, len(text), size) for each in parser.push(text[at : at + size])]
    found += parser.rest()
    calls = [each for each in found if isinstance(each, Call)]
    assert len({call.id for call in calls}) == len(calls)
    return "".join(each for each in found if isinstance(each, str)), [
        (call.name, json.loads(call.arguments)) for call in calls
    ]


@pytest.mark.parametrize("size", [1, 2, 5, 1000])
@pytest.mark.parametrize("form", FORMS)
def test_every_form_is_known(form: str, size: int) -> None:
    text, calls = FORMS[form]
    left, found = parsed(text, size)
    assert found == calls
    assert left.strip() == ""


@pytest.mark.parametrize("size", [1, 3, 1000])
@pytest.mark.parametrize("form", ["hermes", "glm", "mistral", "qwen3-coder, no marks", "llama 3, marked"])
def test_text_before_a_marked_call_is_text(form: str, size: int) -> None:
    text, calls = FORMS[form]
    assert parsed(f"I will look, if 1 < 2. {text}", size) == ("I will look, if 1 < 2. ", calls)


@pytest.mark.parametrize("size", [1, 4, 1000])
@pytest.mark.parametrize(
    "text",
    [
        "No call here: a < b, <tool, [TOOL and {",
        '{"name": "other", "arguments": {}}',
        '{"city": "Paris"}',
        "[1, 2, 3]",
        "[get_weather('Paris')]",
        "[get_weather(city=open('x'))]",
        '<tool_call>{"name": "get_weather", "arguments": [1]}</tool_call>',
        '<tool_call>{"name": "get_weather", "argu',
        "<tool_call>nothing</tool_call> and more",
        "[" * 3000,
        "",
    ],
)
def test_what_is_no_call_stays_text(text: str, size: int) -> None:
    assert parsed(text, size) == (text, [])


def test_text_is_not_held_back_for_long() -> None:
    parser = CallParser(NAMES)
    assert list(parser.push("Yes <tool")) == ["Yes "]
    assert list(parser.push("box> and")) == ["<toolbox> and"]
    assert list(parser.push('<tool_call>{"name": "add", "arguments": {}}</tool')) == []
    (call,) = parser.push("_call>")
    assert isinstance(call, Call)
    assert call.as_object()["function"] == {"name": "add", "arguments": "{}"}
