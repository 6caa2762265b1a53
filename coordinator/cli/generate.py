"""`warmfront generate`: one answer, as text while it comes or as one JSON object.

Nothing heavy is imported at the top: a wrong request is refused before numpy and numba are loaded.
"""

import contextlib
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from warmfront.coordinator.cli.options import split_options
from warmfront.coordinator.cli.prompt import read_prompt, read_template
from warmfront.coordinator.cli.terminal import Bars, say
from warmfront.shared.config import EngineConfig
from warmfront.shared.errors import UsageError
from warmfront.shared.machine.process import hold_interrupts

__all__ = ["generate"]


def generate(
    *,
    prompt: str | None,
    prompt_ids: Sequence[int] | None,
    file: Path | None,
    as_chat: bool,
    system: str | None,
    chat_template: Path | None,
    max_new_tokens: int,
    ignore_eos: bool,
    stats: bool,
    as_json: bool,
    logprobs: int | None,
    trace: str | None,
    watch: bool,
    **options: Any,
) -> None:
    """Answer the prompt that `read_prompt` finds. `options`: those of `engine_options` and `sampling_options`.

    Raises UsageError for options that do not go together, else what `Engine.load` and `Engine.generate` raise.
    """
    if watch and (sys.stderr is None or not sys.stderr.isatty()):
        raise UsageError("--watch draws on a terminal, and stderr is not one: leave it out")
    if logprobs is not None and not as_json:
        raise UsageError("--logprobs adds to the JSON object: pass --json too")
    if as_chat and prompt_ids is not None:
        raise UsageError("--chat makes a turn of a text: give -p TEXT instead of --prompt-ids")
    if system is not None and not as_chat:
        raise UsageError("--system is for a chat: pass --chat too")
    if chat_template is not None and not as_chat:
        raise UsageError("--chat-template is for a chat: pass --chat too")
    model, overrides, sampling, stop = split_options(options)
    overrides |= {"measure": stats, "trace": trace}
    EngineConfig(**overrides)
    given, template = read_prompt(prompt, prompt_ids, file), read_template(chat_template)

    with hold_interrupts():
        from warmfront.coordinator.cli.chat import opening, use_template
        from warmfront.coordinator.cli.report import as_object, as_text, fault_of
        from warmfront.coordinator.cli.watch import Watch
        from warmfront.coordinator.engine.engine import Engine

    with Bars() as bars, Engine.load(model, **overrides, say=say, progress=bars.show) as engine:
        bars.close()
        if as_chat and isinstance(given, str):
            use_template(engine, template)
            turn = {"role": "user", "content": given.removesuffix("\n")}
            given = engine.tokenizer.chat_ids([*opening(system), turn])
            stop += engine.tokenizer.chat_stops
        ids = engine.prompt_ids(given)
        answer = engine.generate(
            ids,
            max_new_tokens=max_new_tokens,
            sampling=sampling,
            stop=stop,
            ignore_eos=ignore_eos,
            logprobs=logprobs,
        )
        tokens = []
        with Watch(engine) if watch else contextlib.nullcontext() as display:
            for token in answer:
                tokens.append(token)
                if display is not None:
                    display.show(token.text)
                elif not as_json:
                    click.echo(token.text, nl=False)
        if as_json:
            click.echo(json.dumps(as_object(engine, model, ids, tokens)))
        else:  # what was drawn is not in the scrollback
            click.echo("".join(token.text for token in tokens) if watch else "")
        if fault := fault_of(engine):
            say(fault)
        if stats:
            click.echo(as_text(engine), err=True)
