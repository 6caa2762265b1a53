"""The commands that measure a model on this machine: `warmfront bench`, `eval`, `tune`.

Here are the declarations; what they do is in `measure`, which is imported when they run: the help must come at once.
"""

import json
import shutil
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from warmfront.coordinator.cli.options import (
    Numbers,
    Sizes,
    activation_option,
    dtype_option,
    plot_option,
    predictor_option,
    run_options,
    selector_option,
)
from warmfront.coordinator.cli.terminal import Bars, say
from warmfront.shared.config import EngineConfig
from warmfront.shared.errors import UsageError
from warmfront.shared.machine.process import hold_interrupts

__all__ = ["bench", "evaluate", "tune"]

_WIDE = 1000  # columns where stdout is not a terminal


@click.command()
@click.argument("model", default="smollm2-135m")
@click.option(
    "--selectors",
    default="auto",
    show_default=True,
    help="Such as all,lowbit:0.98,core:0.4: lowbit of that recall, core of that share.",
)
@click.option("--contexts", type=Numbers(), default="16,512", show_default=True, help="Tokens of the prompts.")
@click.option("-n", "--tokens", type=click.IntRange(2), default=64, show_default=True, help="Tokens to decode.")
@click.option("--rounds", type=click.IntRange(1), default=5, show_default=True)
@click.option("--sweep", "sweeps", is_flag=True, help="Selectors in turns, behind the first of --contexts; memory too.")
@click.option(
    "--vram-budgets", "budgets", type=Sizes(), help="With --sweep: limits of the GPU's memory: 0 (none),500MB,2GB."
)
@plot_option("With --sweep: draw it too")
@run_options
def bench(
    model: str,
    selectors: str,
    contexts: list[int],
    tokens: int,
    rounds: int,
    sweeps: bool,
    budgets: list[int] | None,
    plot: Path | None,
    **overrides: Any,
) -> None:
    """Measure the prefill and decode speed of MODEL.

    Against what memory bandwidth allows; the last line is JSON.
    """
    EngineConfig(**overrides)
    if min(contexts) < 2:
        raise UsageError(f"a prompt of {min(contexts)} tokens: give 2 or more")
    wishes = selectors.split(",")
    if sweeps:
        _sweep(model, overrides, wishes, budgets or [None], (contexts[0], tokens), rounds, plot)
        return
    if budgets or plot:
        raise UsageError(f"{'--vram-budgets' if budgets else '--plot'} is for --sweep: add that, or leave it out")

    with hold_interrupts():
        from warmfront.coordinator.measure.bench import measure, render

    with Bars() as bars:
        result = measure(model, overrides, wishes, contexts, tokens, rounds, say, bars.show)
        bars.close()
    for line in render(result, shutil.get_terminal_size((_WIDE, 0)).columns):
        click.echo(line)
    click.echo(json.dumps(result))


def _sweep(
    model: str,
    overrides: dict[str, Any],
    wishes: list[str],
    budgets: Sequence[int | None],
    lengths: tuple[int, int],
    rounds: int,
    plot: Path | None,
) -> None:
    with hold_interrupts():
        from warmfront.coordinator.measure.sweep import draw, render, sweep

    with Bars() as bars:
        result = sweep(model, overrides, wishes, budgets, lengths, rounds, say, bars.show)
        bars.close()
    if plot:
        draw(result, plot)
    for line in render(result):
        click.echo(line)
    click.echo(json.dumps(result))


@click.command("eval")
@click.argument("model", default="smollm2-135m")
@click.option(
    "--text",
    "texts",
    type=click.Path(path_type=Path),
    multiple=True,
    help="A file of text in UTF-8; may be repeated.  [default: a built-in one]",
)
@click.option(
    "--selector",
    "selectors",
    default="auto",
    show_default=True,
    help="Such as exact,lowbit:0.98,core:0.4: lowbit of that recall, core of that share.",
)
@click.option("--forced-from", type=click.IntRange(1), default=64, show_default=True, help="Tokens that are prefilled.")
@click.option("--ctx", "context", type=click.IntRange(1), help="Tokens of a piece of text.  [default: 512]")
@click.option("--tokens", type=click.IntRange(1), help="Read the first N tokens only.  [default: all]")
@run_options
@plot_option("Draw it too")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of the table.")
def evaluate(
    model: str,
    texts: tuple[Path, ...],
    selectors: str,
    forced_from: int,
    context: int | None,
    tokens: int | None,
    plot: Path | None,
    as_json: bool,
    **overrides: Any,
) -> None:
    """Measure what selectors of MODEL cost in quality.

    Perplexity, agreement and divergence from the dense model, and which neurons were found, token by token on texts of
    your own. An evaluation that was interrupted goes on with the same command.
    """
    EngineConfig(**overrides)

    with hold_interrupts():
        from warmfront.coordinator.cli.profile import read_texts
        from warmfront.coordinator.measure.evaluate import Span, evaluate
        from warmfront.coordinator.measure.evaluation_report import draw, render

    named = [*zip((file.name for file in texts), read_texts(texts), strict=True)]
    span = Span(context, forced_from, tokens)
    with Bars() as bars:
        try:
            result = evaluate(model, named, selectors.split(","), overrides, span, say, bars.show, bars.count)
        except KeyboardInterrupt:
            bars.close()
            say("interrupted: what was computed is kept, and the same command goes on with it")
            raise
        bars.close()
    if plot:
        draw(result, plot)
    click.echo(json.dumps(result) if as_json else "\n".join(render(result)))


@click.command()
@click.argument("model", default="smollm2-135m")
@dtype_option
@activation_option
@selector_option
@predictor_option
@click.option("--exhaustive", is_flag=True, help="Measure every setting to the end instead of dropping the slow ones.")
@click.option("--kernels", is_flag=True, help="Instead, without MODEL: how far ahead to fetch rows of weights here.")
@plot_option("Draw tok/s by workers")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def tune(model: str, exhaustive: bool, kernels: bool, plot: Path | None, as_json: bool, **overrides: Any) -> None:
    """Find the threads that decode MODEL fastest on this machine.

    Workers, threads and spins, which are kept for later runs; Ctrl-C keeps the best so far.
    """
    if kernels:
        _tune_kernels(as_json)
        return
    EngineConfig(**overrides)

    with hold_interrupts():
        from warmfront.coordinator.measure.tune import draw, render, tune

    with Bars() as bars:
        result = tune(
            model,
            overrides | {"tuning": False},
            exhaustive,
            say=say,
            progress=bars.show,
            remaining=partial(bars.last, "tuning"),
        )
    if plot:
        draw(result, plot)
    click.echo(json.dumps(result) if as_json else "\n".join(render(result)))
    if result["interrupted"]:
        raise click.Abort


def _tune_kernels(as_json: bool) -> None:
    context = click.get_current_context()
    given = [name for name in context.params if context.get_parameter_source(name) == ParameterSource.COMMANDLINE]
    if others := set(given) - {"kernels", "as_json"}:
        raise UsageError(f"--kernels measures this machine for every model: leave {min(others)} out")
    with hold_interrupts():
        from warmfront.coordinator.measure.fetch_table import describe, render

    facts = describe(say)
    click.echo(json.dumps(facts) if as_json else "\n".join(render(facts)))
