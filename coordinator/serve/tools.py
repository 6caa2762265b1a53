"""Calls of tools in what a model writes, in the forms that models were trained on.

    Hermes, Qwen, SmolLM   <tool_call>{"name": ..., "arguments": {...}}</tool_call>, or a list of such objects
    Qwen3-Coder            <tool_call><function=NAME><parameter=KEY>VALUE</parameter>...</function></tool_call>
    GLM                    <tool_call>NAME<arg_key>KEY</arg_key><arg_value>VALUE</arg_value>...</tool_call>
    Mistral                [TOOL_CALLS] [{"name": ..., "arguments": {...}}, ...]
    Llama 3                {"name": ..., "parameters": {...}}, also behind <|python_tag|>
    Llama 4, LFM2          [NAME(KEY=VALUE, ...), ...]

The markers are special tokens in some vocabularies, which leave no text: an answer that begins with { or [ is held back
until its end, when it is known whether it is a call. What names no tool of the request is text.
"""

import ast
import json
import re
import uuid
from collections.abc import Collection, Iterator
from typing import Any, NamedTuple

from warmfront.coordinator.text.stop_strings import overlap

__all__ = ["Call", "CallParser"]

_OPEN, _CLOSE = "<tool_call>", "</tool_call>"
# What begins a call that lasts to the end of the answer.
_BARE = ("[TOOL_CALLS]", "<|python_tag|>", "<function=")
_FUNCTION = re.compile(r"<function=([^>\s]+)>(.*?)(?:</function>|\Z)", re.DOTALL)
_PARAMETER = re.compile(r"<parameter=([^>\s]+)>\n?(.*?)\n?(?:</parameter>|\Z)", re.DOTALL)
_ARGUMENT = re.compile(r"<arg_key>(.*?)</arg_key>\s*<arg_value>(.*?)</arg_value>", re.DOTALL)


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
            at = self._held.find(_OPEN)
            bare = min((found for mark in _BARE if (found := self._held.find(mark)) >= 0), default=-1)
            if bare >= 0 and (at < 0 or bare < at):
                yield from self._text(bare)
                self._whole = True
            elif at >= 0:
                yield from self._text(at)
                end = self._held.find(_CLOSE)
                if end < 0:
                    return
                block, self._held = self._held[: end + len(_CLOSE)], self._held[end + len(_CLOSE) :]
                yield from self._calls_of(block)
            else:
                keep = max(overlap(self._held, mark) for mark in (_OPEN, *_BARE))
                yield from self._text(len(self._held) - keep)
                return

    def rest(self) -> Iterator[str | Call]:
        """What was held back, at the end of the answer."""
        held, self._held = self._held, ""
        if held:
            yield from self._calls_of(held)

    def _text(self, upto: int) -> Iterator[str]:
        text, self._held = self._held[:upto], self._held[upto:]
        if text:
            yield text

    def _calls_of(self, block: str) -> Iterator[str | Call]:
        """The calls that a block of text is, or the text."""
        inner = block.strip().removeprefix(_OPEN).removesuffix(_CLOSE)
        for mark in _BARE[:2]:
            inner = inner.strip().removeprefix(mark)
        calls = _parse(inner.strip())
        if calls and all(name in self._names for name, _ in calls):
            for name, arguments in calls:
                yield Call(f"call_{uuid.uuid4().hex[:24]}", name, json.dumps(arguments, ensure_ascii=False))
        else:
            yield block


def _parse(text: str) -> list[tuple[str, dict[str, Any]]]:
    """Names and arguments of the calls that `text` consists of; none if it is anything else."""
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return _functions(text) or _arguments(text) or _python(text)
    calls = [_call(each) for each in (found if isinstance(found, list) else [found])]
    return [call for call in calls if call is not None] if None not in calls else []


def _call(found: Any) -> tuple[str, dict[str, Any]] | None:
    """The call that a JSON object describes."""
    if not isinstance(found, dict) or not isinstance(found.get("name"), str):
        return None
    arguments = found.get("arguments", found.get("parameters", {}))
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except (ValueError, RecursionError):
            return None
    return (found["name"], arguments) if isinstance(arguments, dict) else None


def _value(text: str) -> Any:
    """A value that is JSON, else the text itself."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text


def _functions(text: str) -> list[tuple[str, dict[str, Any]]]:
    return [
        (name, {key: _value(value) for key, value in _PARAMETER.findall(body)})
        for name, body in _FUNCTION.findall(text)
    ]


def _arguments(text: str) -> list[tuple[str, dict[str, Any]]]:
    pairs = _ARGUMENT.findall(text)
    name = text.partition("<arg_key>")[0].strip()
    return [(name, {key.strip(): _value(value) for key, value in pairs})] if pairs and name else []


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
