"""The chat loop: reads a line, renders the conversation by the model's template, streams the answer."""

import io
import sys

import click

from warmfront.coordinator.engine import Engine
from warmfront.coordinator.report import rates
from warmfront.shared.config import Sampling
from warmfront.shared.errors import UsageError

__all__ = ["converse"]


def converse(engine: Engine, sampling: Sampling, stop: tuple[str, ...], system: str | None, stats: bool) -> None:
    """Talk until end of input. Ctrl-C stops an answer, or drops the line being typed.

    The KV cache keeps the conversation: of each turn only what is new is computed.
    """
    messages = [{"role": "system", "content": system}] if system else []
    engine.tokenizer.render_chat([*messages, {"role": "user", "content": ""}])  # fails now if there is no template
    _prepare_input()
    while True:
        try:
            line = input("> " if sys.stdin.isatty() else "")
        except KeyboardInterrupt:
            click.echo()
            continue
        except EOFError:
            if sys.stdin.isatty():
                click.echo()
            return
        if not line.strip():
            continue
        messages.append({"role": "user", "content": line})
        try:
            answer = _answer(engine, messages, sampling, stop)
        except UsageError as error:  # the conversation has outgrown the context
            click.echo(f"warmfront: {error}", err=True)
            messages.pop()
            continue
        messages.append({"role": "assistant", "content": answer})
        if stats:
            click.echo(rates(engine), err=True)


def _answer(engine: Engine, messages: list[dict[str, str]], sampling: Sampling, stop: tuple[str, ...]) -> str:
    pieces: list[str] = []
    prompt = engine.tokenizer.render_chat(messages)
    try:
        for token in engine.generate(prompt, max_new_tokens=engine.context, sampling=sampling, stop=stop):
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
    if sys.stdin.isatty():
        import readline  # noqa: F401  input() uses it once it is imported
