"""The command line: `warmfront generate`, `chat`, `profile`, `plan`, `topology`, `info`, `pull`, `models`; `cache`,
what measures a model and `train-predictor` are in modules of their own.

Text goes to stdout as it is made; progress, notes and statistics go to stderr. The exit code is 2 for a wrong request,
1 for a failure at run time, 130 after Ctrl-C; an error is one line. Here are the declarations; what a command does is
in the module of its name, which is imported when the command runs: the help must come at once.
"""

import contextlib
import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any, NoReturn

import click

from warmfront.coordinator.cli.cache import cache
from warmfront.coordinator.cli.converting.command import convert
from warmfront.coordinator.cli.measuring import bench, evaluate, tune
from warmfront.coordinator.cli.options import (
    activation_option,
    chat_template_option,
    dtype_option,
    engine_options,
    load_options,
    plot_option,
    prompt_options,
    sampling_options,
    selector_option,
    split_options,
    text_option,
)
from warmfront.coordinator.cli.prompt import read_template
from warmfront.coordinator.cli.serving.command import serve
from warmfront.coordinator.cli.terminal import Bars, prepare_output, say
from warmfront.coordinator.cli.training.command import train_predictor
from warmfront.coordinator.extras import require
from warmfront.shared.config import EngineConfig
from warmfront.shared.errors import ResourceError, UsageError, WarmfrontError
from warmfront.shared.files import check_writable
from warmfront.shared.machine.process import (
    collect_seldom,
    ensure_address_space,
    ensure_files,
    hold_interrupts,
    leave,
    open_standard_files,
)

__all__ = ["cli", "main"]

DEFAULT_NEW_TOKENS = 128
FILES = 48  # that this process has open at once, without those of the workers
ADDRESS_SPACE_MB = 1000  # of Python, numba and numpy before a model is loaded


@click.group(context_settings={"help_option_names": ["-h", "--help"]}, no_args_is_help=False)
@click.version_option(package_name="warmfront")
def cli() -> None:
    """Run language models that do not fit the GPU: hot neurons there, cold neurons on the CPU."""
    ensure_files(FILES)
    ensure_address_space(ADDRESS_SPACE_MB)
    try:
        os.getcwd()
    except FileNotFoundError:
        raise ResourceError("the working directory is gone: change to one that is there") from None


@cli.command()
@prompt_options
@click.option("-n", "--max-new-tokens", type=click.IntRange(1), default=DEFAULT_NEW_TOKENS, show_default=True)
@click.option("--ignore-eos", is_flag=True, help="Go on after the end of the answer.")
@engine_options
@sampling_options
@click.option("--stats", is_flag=True, help="Times, rates and each worker's share, on stderr.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of the text.")
@click.option("--logprobs", type=click.IntRange(0), help="With --json: the N most probable tokens at each step.")
@click.option(
    "--trace", type=click.Path(dir_okay=False), help="Write a Chrome trace of what each process did, by layers."
)
@click.option("--watch", is_flag=True, help="Draw which worker computes what, as it changes.")
def generate(**options: Any) -> None:
    """Continue a prompt."""
    from warmfront.coordinator.cli.generate import generate

    generate(**options)


@cli.command()
@engine_options
@sampling_options
@click.option(
    "-n", "--max-new-tokens", type=click.IntRange(1), help="Tokens of an answer [default: what the context holds]"
)
@click.option("--system", help="A system prompt.")
@chat_template_option
@click.option("--stats", is_flag=True, help="Times and rates after each answer, on stderr.")
def chat(
    max_new_tokens: int | None, system: str | None, chat_template: Path | None, stats: bool, **options: Any
) -> None:
    """Talk with a model; Ctrl-C stops an answer, Ctrl-D ends."""
    model, overrides, sampling, stop = split_options(options)
    EngineConfig(**overrides)
    template = read_template(chat_template)

    with hold_interrupts():
        from warmfront.coordinator.cli.chat import converse, use_template
        from warmfront.coordinator.engine.engine import Engine

    with Bars() as bars, Engine.load(model, **overrides, say=say, progress=bars.show) as engine:
        bars.close()
        use_template(engine, template)
        converse(engine, sampling, stop, system=system, max_new_tokens=max_new_tokens, stats=stats)


@cli.command()
@click.argument("model")
@text_option
@dtype_option
@activation_option
@click.option("--tokens", type=click.IntRange(1), help="Count on the first N tokens only.  [default: on all]")
@click.option(
    "--order",
    type=click.Path(exists=True, path_type=Path),
    help="SparkInfer's split file or PowerInfer's folder of activation_0.pt, ...: order the neurons by that.",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def profile(
    model: str,
    texts: tuple[Path, ...],
    dtype: str,
    activation: str,
    tokens: int | None,
    order: Path | None,
    as_json: bool,
) -> None:
    """Count which neurons of MODEL fire, and order them by it; of a mixture, which experts are chosen.

    On texts of your own, which should resemble your use.
    """
    config = EngineConfig(dtype=dtype, activation=activation)

    with hold_interrupts():
        from warmfront.coordinator.cli.profile import profile, render

    with Bars() as bars:
        facts = profile(model, texts, config, tokens, order, say, bars.show, bars.count)
    click.echo(json.dumps(facts) if as_json else render(facts))


@cli.command()
@click.argument("model")
@click.option(
    "--text",
    "places",
    type=click.Path(path_type=Path),
    multiple=True,
    required=True,
    help="A file of text in UTF-8, or a folder of .txt and .md files; may be repeated.",
)
@load_options
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def cluster(model: str, places: tuple[Path, ...], as_json: bool, **overrides: Any) -> None:
    """Find kinds of text by the neurons that they use.

    For the selector core: a prompt that is too short to tell its neurons is given those of the kind it is nearest to.
    """
    EngineConfig(**overrides)
    require("scikit-learn", "warmfront cluster", "sklearn")

    with hold_interrupts():
        from warmfront.coordinator.cli.profile import read_texts
        from warmfront.coordinator.measure.clustering import cluster_texts, render, texts_in

    texts = read_texts(texts_in(places))
    with Bars() as bars:
        facts = cluster_texts(model, texts, overrides, say, bars.show)
    click.echo(json.dumps(facts) if as_json else render(facts))


@cli.command()
@click.argument("model", default="smollm2-135m")
@selector_option
@load_options
@click.option("--exact", is_flag=True, help="Solve for the optimum too; may take two minutes.")
@click.option("-o", "--out", type=click.Path(path_type=Path, dir_okay=False), help="[default: NAME.plan.json]")
@plot_option("Draw the plan too")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def plan(model: str, exact: bool, out: Path | None, plot: Path | None, as_json: bool, **overrides: Any) -> None:
    """Choose the neurons of MODEL that a GPU begins with.

    By how often they fire and how fast GPU and CPU are, within --vram-budget; writes a file for --plan.
    """
    if overrides["gpu"] == "none":
        raise UsageError("a plan is for a GPU: leave --gpu none out, or pass --gpu host to emulate one")
    if overrides["vram_budget"] is None:
        raise UsageError("a plan for how much GPU memory? pass --vram-budget, such as 6GB")
    EngineConfig(**overrides)
    check_writable(out or Path("plan.json"))
    if exact:
        require("scipy", "--exact")

    with hold_interrupts():
        from warmfront.coordinator.cli.plan import draw, plan, render

    with Bars() as bars:
        figures = plan(model, overrides, exact, out, say, bars.show)
    if plot:
        draw(figures, plot)
    if as_json:
        click.echo(json.dumps(figures))
        return
    for line in render(figures, shutil.get_terminal_size().columns):
        click.echo(line)


@cli.command()
@click.argument("model", default="smollm2-135m")
@dtype_option
@activation_option
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def info(model: str, dtype: str, activation: str, as_json: bool) -> None:
    """Show what MODEL is: architecture, sizes, weight types.

    And whether sparse selectors apply.
    """
    config = EngineConfig(dtype=dtype, activation=activation)

    from warmfront.coordinator.cli.info import describe, render

    with Bars() as bars:
        facts = describe(model, config, say, bars.show)
    click.echo(json.dumps(facts) if as_json else render(facts))


@cli.command()
@click.argument("name")
def pull(name: str) -> None:
    """Fetch a model from the Hugging Face hub, or its newest version.

    NAME is ORG/NAME, ORG/NAME:FILE.gguf or ORG/NAME:Q4_K_M.
    """
    with hold_interrupts():
        from warmfront.coordinator.cli.models import pull

    with Bars() as bars:
        line = pull(name, say, bars.show)
    click.echo(line)


@cli.command()
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def models(as_json: bool) -> None:
    """List the models on this disk.

    Those that have a name, in the hub's cache and in warmfront's, and what is packed.
    """
    with hold_interrupts():
        from warmfront.coordinator.cli.models import describe, render

    facts = describe()
    click.echo(json.dumps(facts) if as_json else "\n".join(render(facts)))


@cli.command()
@click.option("--measure/--no-measure", default=True, show_default=True, help="Measure the memory's read bandwidth.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def topology(measure: bool, as_json: bool) -> None:
    """Show this machine, and what would run where.

    NUMA nodes, cores, memory, limits.
    """
    with hold_interrupts():
        from warmfront.coordinator.cli.topology import describe, render

    facts = describe(measure)
    click.echo(json.dumps(facts) if as_json else "\n".join(render(facts)))


for command in (cache, bench, convert, evaluate, serve, train_predictor, tune):
    cli.add_command(command)


def main() -> NoReturn:
    """Run the command line and exit: the entry point of the console script."""
    open_standard_files()
    collect_seldom()
    code = _run()
    with contextlib.suppress(OSError):  # what is left to print cannot be, which was told
        leave(code)
    os._exit(code)


def _run() -> int:
    """Run the command line; returns the exit code, having said what went wrong."""
    prepare_output()
    try:
        code = cli.main(standalone_mode=False)
        sys.stdout.flush()
        return code if isinstance(code, int) else 0
    except (click.Abort, KeyboardInterrupt):
        return 130
    except click.UsageError as error:
        command = error.ctx.command_path if error.ctx else "warmfront"
        message = error.format_message()
        stop = "" if message.endswith((".", "?")) else "."
        _complain(f"{message}{stop} See `{command} --help`.")
        return error.exit_code
    except click.ClickException as error:
        _complain(error.format_message())
        return error.exit_code
    except WarmfrontError as error:
        _complain(str(error))
        return error.exit_code
    except OSError as error:
        _complain(str(error))
        return 1
    except MemoryError:
        _complain("this process gets no more memory: close other programs, or raise its limit")
        return 1


def _complain(message: str) -> None:
    click.echo(f"warmfront: {' '.join(message.split())}", err=True)
