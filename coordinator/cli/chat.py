"""The chat loop: reads a line, renders the conversation by the model's template, streams the answer."""

import io
import sys

import click

from warmfront.coordinator.cli.report import rates
from warmfront.coordinator.engine.engine import Engine
from warmfront.shared.config import Sampling
from warmfront.shared.errors import UsageError

__all__ = ["converse", "opening"]

Messages = list[dict[str, str]]


def opening(system: str | None) -> Messages:
    """The conversation before the user's first turn."""
    return [{"role": "system", "content": system}] if system else []


def converse(
    engine: Engine, sampling: Sampling, stop: tuple[str, ...], system: str | None, most: int | None, stats: bool
) -> None:
    """Talk until end of input, at most `most` tokens an answer. Ctrl-C stops an answer, or drops the line being typed.

    The KV cache keeps the conversation: of each turn only what is new is computed.
    """
    messages = opening(system)
    engine.tokenizer.render_chat([*messages, {"role": "user", "content": ""}])  # fails now if there is no template
    _prepare_input()
    while True:
        try:
            line = _read()
        except KeyboardInterrupt:
            click.echo()
            continue
        if line is None:
            return
        if not line.strip():
            continue
        messages.append({"role": "user", "content": line})
        try:
            answer = _answer(engine, messages, sampling, stop, most or engine.plan.context)
        except UsageError as error:  # the conversation has outgrown the context
            click.echo(f"warmfront: {error}", err=True)
            messages.pop()
            continue
        messages.append({"role": "assistant", "content": answer})
        if stats:
            click.echo(rates(engine), err=True)


def _read() -> str | None:
    """The next line; None at the end of the input, or if it is closed."""
    if sys.stdin is None:
        return None
    if not sys.stdin.isatty() or sys.stdout is None or sys.stderr is None:
        line = sys.stdin.readline()
        return line.removesuffix("\n") if line else None
    try:
        return input("> ")
    except EOFError:
        click.echo()
        return None


def _answer(engine: Engine, messages: Messages, sampling: Sampling, stop: tuple[str, ...], most: int) -> str:
    pieces: list[str] = []
    try:
        prompt = engine.tokenizer.chat_ids(messages)
        for token in engine.generate(prompt, max_new_tokens=most, sampling=sampling, stop=stop):
            pieces.append(token.text)
            click.echo(token.text, nl=False)
    except KeyboardInterrupt:
        pass
    click.echo()
    return "".join(pieces)


def _prepare_input() -> None:
    """Editing on a terminal; bytes that are no text must not end the talk."""
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="replace")
    if sys.stdin is not None and sys.stdin.isatty():
        import readline  # noqa: F401  input() uses it once it is imported
