"""The commands that measure a model on this machine: `warmfront bench`, `eval`, `tune`.

Here are the declarations; what they do is in `measure`, which is imported when they run: the help must come at once.
"""

import json
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from warmfront.coordinator.cli.options import (
    Names,
    Numbers,
    activation_option,
    dtype_option,
    run_options,
    selector_option,
)
from warmfront.coordinator.cli.terminal import Bars, say
from warmfront.coordinator.extras import require
from warmfront.shared.config import SELECTORS, EngineConfig
from warmfront.shared.errors import UsageError
from warmfront.shared.files import check_writable
from warmfront.shared.machine.process import hold_interrupts

__all__ = ["bench", "tune"]

_WIDE = 1000  # columns where stdout is not a terminal


@click.command()
@click.argument("model", default="smollm2-135m")
@click.option(
    "--selectors", type=Names(SELECTORS), default="auto", show_default=True, help="Such as lowrank,exact,all."
)
@click.option("--contexts", type=Numbers(), default="16,512", show_default=True, help="Tokens of the prompts.")
@click.option("-n", "--tokens", type=click.IntRange(2), default=64, show_default=True, help="Tokens to decode.")
@click.option("--rounds", type=click.IntRange(1), default=5, show_default=True)
@run_options
def bench(model: str, selectors: list[str], contexts: list[int], tokens: int, rounds: int, **overrides: Any) -> None:
    """Measure the prefill and decode speed of MODEL.

    Against what memory bandwidth allows; the last line is JSON.
    """
    EngineConfig(**overrides)
    if min(contexts) < 2:
        raise UsageError(f"a prompt of {min(contexts)} tokens: give 2 or more")

    with hold_interrupts():
        from warmfront.coordinator.measure.bench import measure, render

    with Bars() as bars:
        result = measure(model, overrides, selectors, contexts, tokens, rounds, say, bars.show)
        bars.close()
    for line in render(result, shutil.get_terminal_size((_WIDE, 0)).columns):
        click.echo(line)
    click.echo(json.dumps(result))


@click.command()
@click.argument("model", default="smollm2-135m")
@dtype_option
@activation_option
@selector_option
@click.option("--exhaustive", is_flag=True, help="Measure every setting to the end instead of dropping the slow ones.")
@click.option("--kernels", is_flag=True, help="Instead, without MODEL: how far ahead to fetch rows of weights here.")
@click.option("--plot", type=click.Path(path_type=Path, dir_okay=False), help="Draw tok/s by workers, as a PNG.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def tune(model: str, exhaustive: bool, kernels: bool, plot: Path | None, as_json: bool, **overrides: Any) -> None:
    """Find the threads that decode MODEL fastest on this machine.

    Workers, threads and spins, which are kept for later runs; Ctrl-C keeps the best so far.
    """
    if kernels:
        _tune_kernels(as_json)
        return
    EngineConfig(**overrides)
    if plot:
        check_writable(plot)
        require("matplotlib", "--plot")

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
