"""The process that renders one chat template, as transformers does.

Run as `python -m warmfront.coordinator.text.template_process`.

A template is a program from strangers: Jinja's sandbox keeps it from everything but its input, and the kernel limits
its time and memory, whether it spends them in an endless loop or on an enormous string. stdin is a JSON object
{template, variables, now, cpu_s}, stdout is {text} or {error}.
"""

import json
import resource
import sys
from datetime import datetime
from typing import Any

from jinja2 import nodes
from jinja2.exceptions import TemplateError
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

__all__: list[str] = []

MEMORY = 1 << 30  # bytes of address space
MAX_CHARACTERS = 1 << 26  # of a prompt: far more than any context holds


class Arguments(dict[str, Any]):
    """Arguments of a call: some templates take an object, which others expect as a text of JSON."""

    def __str__(self) -> str:
        return json.dumps(self, ensure_ascii=False)

    def __radd__(self, text: str) -> str:
        return text + str(self)

    def __add__(self, text: str) -> str:
        return str(self) + text


class Absent(str):
    """The text of a message that is calls alone: some templates ask whether it is none, others look into it."""


class Generation(Extension):
    """{% generation %} marks what the model learns in training; in a prompt only its content matters."""

    tags = {"generation"}  # noqa: RUF012  as Jinja declares it

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_content"), [], [], body).set_lineno(line)

    def _content(self, caller: Any) -> Any:
        return caller()


def tojson(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    """Plain JSON: Jinja's own filter escapes for HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def refuse(message: str) -> None:
    raise TemplateError(message)


def render(template: str, variables: dict[str, Any], now: datetime) -> str:
    """The text that the template makes of the variables. A template may raise any exception."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, "jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = tojson
    environment.tests["none"] = lambda value: value is None or isinstance(value, Absent)
    environment.globals["raise_exception"] = refuse
    environment.globals["strftime_now"] = now.strftime
    for message in variables["messages"]:
        if message.get("tool_calls"):
            message["content"] = message.get("content") or Absent()
        for call in message.get("tool_calls", ()):
            if isinstance(call["function"].get("arguments"), dict):
                call["function"]["arguments"] = Arguments(call["function"]["arguments"])
    text = environment.from_string(template).render(**variables)
    if len(text) > MAX_CHARACTERS:
        raise TemplateError(f"it writes {len(text):,} characters")
    return text


def main() -> None:
    request = json.load(sys.stdin.buffer)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    resource.setrlimit(resource.RLIMIT_CPU, (request["cpu_s"],) * 2)
    try:
        answer = {"text": render(request["template"], request["variables"], datetime.fromisoformat(request["now"]))}
    except MemoryError:
        answer = {"error": f"it needs more than {MEMORY >> 20} MiB"}
    except Exception as error:  # a template is code, and fails as code does
        answer = {"error": str(error) or type(error).__name__}
    json.dump(answer, sys.stdout)


if __name__ == "__main__":
    main()
