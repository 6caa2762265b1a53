"""`warmfront chat`: reads a line, renders the conversation with the model's template, streams the answer."""

import io
import os
import sys
from itertools import chain

import click

from warmfront.coordinator.cli.report import fault_of, rates
from warmfront.coordinator.cli.terminal import say
from warmfront.coordinator.engine.engine import Engine
from warmfront.coordinator.text.parts import Parts
from warmfront.shared.config import Sampling
from warmfront.shared.errors import UsageError

__all__ = ["converse", "opening", "use_template"]

Messages = list[dict[str, str]]


def opening(system: str | None) -> Messages:
    """The conversation before the user's first turn."""
    return [{"role": "system", "content": system}] if system else []


def use_template(engine: Engine, template: str | None) -> None:
    """Chat with the user's `template`; without one say so if the model has none either."""
    engine.tokenizer.chat_template = template
    if template is None and engine.tokenizer.present and not engine.tokenizer.has_chat_template:
        form = "as ChatML" if engine.tokenizer.knows_turns else "in a written dialogue"
        say(f"{engine.model.spec.name} has no chat template: it is asked {form}; --chat-template FILE gives another")


def converse(
    engine: Engine,
    sampling: Sampling,
    stop: tuple[str, ...],
    *,
    system: str | None,
    max_new_tokens: int | None,
    stats: bool,
) -> None:
    """Talk until the end of input; an answer has at most `max_new_tokens`. Ctrl-C stops it, or drops a typed line.

    The KV cache keeps the conversation: only the new tokens of each turn are computed.
    """
    messages = opening(system)
    engine.tokenizer.chat_ids([*messages, {"role": "user", "content": ""}])  # fails now if the template does
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
            answer = _answer(engine, messages, sampling, stop, max_new_tokens or engine.plan.context)
        except UsageError as error:  # the conversation no longer fits the context
            click.echo(f"warmfront: {error}", err=True)
            messages.pop()
            continue
        messages.append({"role": "assistant", "content": answer})
        if fault := fault_of(engine):
            say(fault)
        if stats:
            click.echo(rates(engine), err=True)


def _read() -> str | None:
    """The next line; None at the end of the input, or if stdin is closed."""
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


def _answer(engine: Engine, messages: Messages, sampling: Sampling, stop: tuple[str, ...], max_new_tokens: int) -> str:
    """Print the answer as it comes, reasoning dimmed; returns it, or what there is of it after Ctrl-C."""
    pieces: list[str] = []
    try:
        prompt = engine.tokenizer.chat_ids(messages)
        stop += engine.tokenizer.chat_stops
        parts = Parts(engine.tokenizer, prompt)
        tokens, reasons = engine.generate(prompt, max_new_tokens=max_new_tokens, sampling=sampling, stop=stop), False
        for part in chain(chain.from_iterable(parts.push(token.id, token.text) for token in tokens), parts.rest()):
            if parts.in_channels and reasons and not part.is_reasoning:
                click.echo("\n")  # other models write it themselves
            reasons = part.is_reasoning
            _show(part.text, reasons)
            # Templates take reasoning as the model wrote it, with its tags; harmony's want it left out.
            pieces.append("" if reasons and parts.in_channels else part.text)
    except KeyboardInterrupt:
        pass
    click.echo()
    return "".join(pieces)


def _show(text: str, dim: bool) -> None:
    """Print a piece; click leaves out the codes where stdout is no terminal."""
    dim = dim and bool(text) and os.environ.get("TERM") != "dumb"
    click.echo(click.style(text, dim=True) if dim else text, nl=False)


def _prepare_input() -> None:
    """Line editing on a terminal; bytes that are not text must not end the chat."""
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="replace")
    if sys.stdin is not None and sys.stdin.isatty():
        import readline  # noqa: F401  input() uses it once it is imported
