"""Calls of tools in what a model writes, in the forms that models were trained on.

    Hermes, Qwen, SmolLM   <tool_call>{"name": ..., "arguments": {...}}</tool_call>, or a list of such objects
    Qwen3-Coder            <tool_call><function=NAME><parameter=KEY>VALUE</parameter>...</function></tool_call>
    GLM                    <tool_call>NAME<arg_key>KEY</arg_key><arg_value>VALUE</arg_value>...</tool_call>
    Mistral                [TOOL_CALLS] [{"name": ..., "arguments": {...}}, ...]; [TOOL_CALLS]NAME[ARGS]{...} each
    Llama 3                {"name": ..., "parameters": {...}}, also behind <|python_tag|>
    Llama 4, LFM2          [NAME(KEY=VALUE, ...), ...]
    DeepSeek V3, R1        <｜tool▁calls▁begin｜>CALL, perhaps more of them, <｜tool▁calls▁end｜>. A call is
                           <｜tool▁call▁begin｜>function<｜tool▁sep｜>NAME, a fence of json, <｜tool▁call▁end｜>
    DeepSeek V3.1          the same with NAME<｜tool▁sep｜>{...} in each call
    gpt-oss                a message of its own for functions.NAME, which `text/harmony.py` finds

The markers are special tokens in some vocabularies, and become text for this (`MARKS`). Where they are left out, an
answer that begins with { or [ is held back until its end, when it is known whether it is a call. What names no tool of
the request is text.
"""

import ast
import json
import re
import uuid
from collections.abc import Collection, Iterator
from typing import Any, NamedTuple

from warmfront.coordinator.text.stop_strings import overlap

__all__ = ["MARKS", "Call", "CallParser"]

# What begins calls, and what ends them.
_BLOCKS = {"<tool_call>": "</tool_call>", "<｜tool▁calls▁begin｜>": "<｜tool▁calls▁end｜>"}
_BEGIN, _SEPARATOR, _END = "<｜tool▁call▁begin｜>", "<｜tool▁sep｜>", "<｜tool▁call▁end｜>"
_CALLS, _NUMBER, _ARGS = "[TOOL_CALLS]", "[CALL_ID]", "[ARGS]"
# What begins a call that lasts to the end of the answer.
_BARE = (_CALLS, "<|python_tag|>", "<function=", _BEGIN)
MARKS = (*_BLOCKS, *_BLOCKS.values(), _BEGIN, _SEPARATOR, _END, _CALLS, _NUMBER, _ARGS, "<|python_tag|>")
_FENCE = "```"
_FUNCTION = re.compile(r"<function=([^>\s]+)>(.*?)</function>\s*", re.DOTALL)
_PARAMETER = re.compile(r"<parameter=([^>\s]+)>\n?(.*?)\n?(?:</parameter>|\Z)", re.DOTALL)


class Call(NamedTuple):
    """One call; `arguments` is a JSON object in a text."""

    id: str
    name: str
    arguments: str

    def as_object(self) -> dict[str, Any]:
        """As OpenAI's API has it."""
        return {"id": self.id, "type": "function", "function": {"name": self.name, "arguments": self.arguments}}


class CallParser:
    """Divides the pieces of an answer into text and calls of the tools `names`."""

    def __init__(self, names: Collection[str]) -> None:
        self._names = names
        self._held = ""
        self._began = False  # whether anything but white space has been seen
        self._whole = False  # all that comes is held back to the end

    def push(self, piece: str) -> Iterator[str | Call]:
        """What is certain after `piece`."""
        self._held += piece
        if not self._began and (start := self._held.lstrip()):
            self._began, self._whole = True, start[0] in "{["
        while self._held and not self._whole:
            found = [(at, mark) for mark in (*_BLOCKS, *_BARE) if (at := self._held.find(mark)) >= 0]
            if not found:
                keep = max(overlap(self._held, mark) for mark in (*_BLOCKS, *_BARE))
                yield from self._text(len(self._held) - keep)
                return
            at, mark = min(found)
            yield from self._text(at)
            if mark in _BARE:
                self._whole = True
                return
            end = self._held.find(_BLOCKS[mark])
            if end < 0:
                return
            end += len(_BLOCKS[mark])
            block, self._held = self._held[:end], self._held[end:]
            yield from self._calls_of(block)

    def rest(self) -> Iterator[str | Call]:
        """What was held back, at the end of the answer."""
        held, self._held = self._held, ""
        if held:
            yield from self._calls_of(held)

    def message(self, recipient: str, text: str) -> Call | None:
        """The call that a message of arguments for `recipient` is."""
        return self._made(recipient.removeprefix("functions."), _loaded(text or "{}"))

    def _text(self, upto: int) -> Iterator[str]:
        text, self._held = self._held[:upto], self._held[upto:]
        if text:
            yield text

    def _calls_of(self, block: str) -> Iterator[str | Call]:
        """The calls that a block of text is, or the text."""
        inner = block.strip()
        for begin, end in _BLOCKS.items():
            inner = inner.removeprefix(begin).removesuffix(end).strip()
        calls = [self._made(*call) for call in _parse(inner.removeprefix("<|python_tag|>").strip())]
        found = [call for call in calls if call is not None]
        yield from found if found and len(found) == len(calls) else [block]

    def _made(self, name: str, arguments: Any) -> Call | None:
        """A call of that name, if there is such a tool and the arguments are an object of JSON."""
        if name not in self._names or not isinstance(arguments, dict):
            return None
        try:
            text = json.dumps(arguments, ensure_ascii=False, allow_nan=False)
        except ValueError:
            return None
        if not text.isprintable() and any("\ud800" <= letter <= "\udfff" for letter in text):
            text = json.dumps(arguments)  # half a pair of surrogates, which UTF-8 has no bytes for
        return Call(f"call_{uuid.uuid4().hex[:24]}", name, text)


def _loaded(text: str) -> Any:
    """What a text of JSON says; None for any other."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _parse(text: str) -> list[tuple[str, Any]]:
    """Names and arguments of the calls that `text` consists of; none, or wrong ones, if it is anything else."""
    if text.startswith(_BEGIN):
        return [_of_deepseek(call) for call in text.split(_BEGIN)[1:]]
    if text.startswith(_CALLS) and _ARGS in text:
        return [_of_mistral(call) for call in text.split(_CALLS)[1:]]
    found = _loaded(text.removeprefix(_CALLS))
    if found is None:
        return _functions(text) or _arguments(text) or _python(text)
    calls = [_call(each) for each in (found if isinstance(found, list) else [found])]
    return [call for call in calls if call is not None] if None not in calls else []


def _call(found: Any) -> tuple[str, dict[str, Any]] | None:
    """The call that a JSON object describes."""
    if not isinstance(found, dict) or not isinstance(found.get("name"), str):
        return None
    arguments = found.get("arguments", found.get("parameters", {}))
    if isinstance(arguments, str):
        arguments = _loaded(arguments)
    return (found["name"], arguments) if isinstance(arguments, dict) else None


def _of_deepseek(call: str) -> tuple[str, Any]:
    before, _, behind = call.strip().removesuffix(_END).partition(_SEPARATOR)
    name, fence, arguments = behind.partition(f"\n{_FENCE}json\n")
    if not fence:
        name, arguments = before, behind
    return name.strip(), _loaded(arguments.strip().removesuffix(_FENCE))


def _of_mistral(call: str) -> tuple[str, Any]:
    name, _, arguments = call.partition(_ARGS)
    return name.partition(_NUMBER)[0].strip(), _loaded(arguments)


def _value(text: str) -> Any:
    """A value that is JSON, else the text itself."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text


def _functions(text: str) -> list[tuple[str, dict[str, Any]]]:
    found, at = [], 0
    while call := _FUNCTION.match(text, at):
        found.append((call[1], {key: _value(value) for key, value in _PARAMETER.findall(call[2])}))
        at = call.end()
    return found if at == len(text) else []


def _arguments(text: str) -> list[tuple[str, dict[str, Any]]]:
    name, *pairs = text.split("<arg_key>")
    arguments = {}
    for pair in pairs:
        key, _, value = pair.partition("</arg_key>")
        value, end, rest = value.strip().partition("</arg_value>")
        if not value.startswith("<arg_value>") or not end or rest:
            return []
        arguments[key.strip()] = _value(value.removeprefix("<arg_value>"))
    return [(name.strip(), arguments)] if arguments else []


def _python(text: str) -> list[tuple[str, dict[str, Any]]]:
    """Calls as Python writes them, with literal values; nothing is evaluated."""
    try:
        tree = ast.parse(text, mode="eval").body
        calls = tree.elts if isinstance(tree, ast.List) else [tree]
        found = []
        for call in calls:
            if not isinstance(call, ast.Call) or call.args:
                return []
            arguments = {word.arg: ast.literal_eval(word.value) for word in call.keywords if word.arg is not None}
            json.dumps(arguments)
            found.append((ast.unparse(call.func), arguments))
    except (SyntaxError, ValueError, TypeError, MemoryError, RecursionError):
        return []
    return found
