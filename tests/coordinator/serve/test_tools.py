"""Calls of tools in every form, however the text is cut into pieces.  pytest tests/coordinator/serve/test_tools.py"""

import json
import time
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
    "mistral, by name": (
        '[TOOL_CALLS]get_weather[ARGS]{"city": "Paris"}[TOOL_CALLS]add[CALL_ID]a1b2[ARGS]{"a": 1, "b": [2, "x"]}',
        [PARIS, SUM],
    ),
    "deepseek v3": (
        '<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>get_weather\n```json\n{"city": "Paris"}\n```'
        '<｜tool▁call▁end｜>\n<｜tool▁call▁begin｜>function<｜tool▁sep｜>add\n```json\n{"a": 1,\n "b": [2, "x"]}\n```'
        "<｜tool▁call▁end｜><｜tool▁calls▁end｜>",
        [PARIS, SUM],
    ),
    "deepseek v3.1": (
        '<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>get_weather<｜tool▁sep｜>{"city": "Paris"}<｜tool▁call▁end｜>'
        '<｜tool▁call▁begin｜>add<｜tool▁sep｜>{"a": 1, "b": [2, "x"]}<｜tool▁call▁end｜><｜tool▁calls▁end｜>',
        [PARIS, SUM],
    ),
    "deepseek, not around, no ends": (
        '<｜tool▁call▁begin｜>function<｜tool▁sep｜>get_weather\n```json\n{"city": "Paris"}\n```',
        [PARIS],
    ),
    "deepseek, no ends": (
        '<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>get_weather<｜tool▁sep｜>{"city": "Paris"}',
        [PARIS],
    ),
    "half a pair of surrogates": (
        '{"name": "get_weather", "arguments": {"city": "\\ud83c"}}',
        [("get_weather", {"city": "\ud83c"})],
    ),
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
@pytest.mark.parametrize("form", [form for form in FORMS if FORMS[form][0][0] in "<[" and form != "llama 4"])
def test_text_before_a_marked_call_is_text(form: str, size: int) -> None:
    text, calls = FORMS[form]
    left, found = parsed(f"I will look, if 1 < 2. {text}", size)
    assert (left.rstrip("\n"), found) == ("I will look, if 1 < 2. ", calls)


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
        '{"name": "add", "arguments": {"a": 1e999}}',
        '{"name": "add", "arguments": {"a": NaN}}',
        "<function=add><parameter=a>1",
        "<tool_call>add<arg_key>a</arg_key><arg_value>1</tool_call>",
        "[TOOL_CALLS]get_weather[ARGS]{",
        "[TOOL_CALLS][ARGS]{}",
        '<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>get_weather\n```json\n{"city": "Par',
        "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>add<｜tool▁sep｜>{'a'}<｜tool▁call▁end｜><｜tool▁calls▁end｜> So.",
        "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>other<｜tool▁sep｜>{}<｜tool▁call▁end｜><｜tool▁calls▁end｜>",
        f"<｜tool▁call▁begin｜>{'x' * 3000}<｜tool▁sep｜>{{}}<｜tool▁call▁end｜>",
        '<｜tool▁calls▁begin｜>get_weather<｜tool▁sep｜>{"city": "Paris"}<｜tool▁calls▁end｜>',
        "<｜tool▁calls▁begin｜>" + "<｜tool▁call▁begin｜>" * 300,
        "",
    ],
)
def test_what_is_no_call_stays_text(text: str, size: int) -> None:
    assert parsed(text, size) == (text, [])


def test_hostile_text_costs_no_time() -> None:
    """Thirty thousand tokens that could each begin a part of a call: a fraction of a second, not minutes."""
    began = time.process_time()
    for part in (
        "<arg_key>",
        "<arg_key></arg_key>",
        "<function=add>",
        "<parameter=a>",
        "<｜tool▁call▁begin｜>",
        "[ARGS]",
    ):
        for text in (f"<tool_call>x{part * 20_000}</tool_call>", f"[TOOL_CALLS]{part * 20_000}"):
            assert parsed(text, 100_000) == (text, [])
    assert time.process_time() - began < 3


def test_a_message_for_a_tool_is_a_call() -> None:
    """As harmony tells it apart: any other recipient and what is no object of JSON is none."""
    parser = CallParser(NAMES)
    call = parser.message("functions.add", '{"a": 1}')
    assert call is not None
    assert call[1:] == ("add", '{"a": 1}')
    assert parser.message("add", "") is not None
    for recipient, text in (("functions.other", "{}"), ("functions.add", '{"a": '), ("functions.add", "[1]")):
        assert parser.message(recipient, text) is None


def test_text_is_not_held_back_for_long() -> None:
    parser = CallParser(NAMES)
    assert list(parser.push("Yes <tool")) == ["Yes "]
    assert list(parser.push("box> and")) == ["<toolbox> and"]
    assert list(parser.push('<tool_call>{"name": "add", "arguments": {}}</tool')) == []
    (call,) = parser.push("_call>")
    assert isinstance(call, Call)
    assert call.as_object()["function"] == {"name": "add", "arguments": "{}"}
