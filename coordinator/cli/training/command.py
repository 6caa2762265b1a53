"""The declaration of `warmfront train-predictor`."""

import json
from pathlib import Path
from typing import Any

import click

from warmfront.coordinator.cli.options import Size, activation_option, dtype_option, plot_option, text_option
from warmfront.coordinator.cli.terminal import Bars, say
from warmfront.shared.config import EngineConfig
from warmfront.shared.errors import UsageError
from warmfront.shared.files import check_writable
from warmfront.shared.machine.process import hold_interrupts

__all__ = ["train_predictor"]


def _rank(_context: click.Context, _param: click.Parameter, value: str) -> int | None:
    if value == "auto":
        return None
    if not value.isdecimal() or not 0 < int(value) <= 8192:
        raise click.BadParameter(f"{value!r} is neither auto nor a number of up to 8192")
    return int(value)


@click.command()
@click.argument("model")
@text_option
@dtype_option
@activation_option
@click.option("--rank", default="auto", show_default=True, callback=_rank, help="Of each layer; auto: as it needs.")
@click.option("--recall", type=float, default=0.97, show_default=True, help="By mass, of what fires.")
@click.option("--max-density", type=float, help="Share of the neurons to select at most, at the cost of recall.")
@click.option("--tokens", type=click.IntRange(1), help="Use the first N tokens only.  [default: what --disk holds]")
@click.option("--disk", type=Size(), default="4GB", show_default=True, help="Disk for inputs, while it is at work.")
@click.option(
    "-o", "--out", type=click.Path(path_type=Path, dir_okay=False), help="[default: NAME.predictor.safetensors]"
)
@plot_option("Draw recall and density")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def train_predictor(
    model: str, texts: tuple[Path, ...], out: Path | None, plot: Path | None, as_json: bool, **options: Any
) -> None:
    """Make predictors of which neurons of MODEL fire.

    From texts that resemble your use; --predictor takes the file. After Ctrl-C the same command goes on.
    """
    rank, recall, max_density = (options.pop(name) for name in ("rank", "recall", "max_density"))
    tokens, disk = options.pop("tokens"), options.pop("disk")
    if not 0.5 <= recall < 1:
        raise UsageError(f"a recall of {recall}: it must be at least 0.5 and below 1")
    if max_density is not None and not 0 < max_density <= 1:
        raise UsageError(f"a density of {max_density}: it must be above 0, and 1 at most")
    check_writable(out or Path("predictor.safetensors"))
    config = EngineConfig(**options)

    with hold_interrupts():
        from warmfront.coordinator.cli.training.train_predictor import Request, draw, render, train
        from warmfront.coordinator.training.layer import Wish

    with Bars() as bars:
        request = Request(model, texts, Wish(rank, recall, max_density), tokens, disk, out)
        facts = train(request, config, say, bars.show, bars.count, bars.last)
    if plot:
        draw(facts, plot)
    click.echo(json.dumps(facts) if as_json else "\n".join(render(facts)))
