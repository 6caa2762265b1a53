"""The declaration of `warmfront convert`."""

from pathlib import Path

import click

from warmfront.coordinator.cli.options import dtype_option
from warmfront.coordinator.cli.terminal import Bars, say
from warmfront.shared.config import EngineConfig
from warmfront.shared.files import check_writable
from warmfront.shared.machine.process import hold_interrupts

__all__ = ["convert"]


@click.command()
@click.argument("model")
@dtype_option
@click.option("-o", "--out", type=click.Path(path_type=Path, dir_okay=False), required=True, help="The file to write.")
def convert(model: str, dtype: str, out: Path) -> None:
    """Write MODEL as a GGUF file that llama.cpp loads too.

    From a GGUF file of any family, or a folder of the families llama, mistral, qwen2 and qwen3.
    """
    EngineConfig(dtype=dtype)
    check_writable(out)

    with hold_interrupts():
        from warmfront.coordinator.converting.convert import convert

    with Bars() as bars:
        line = convert(model, dtype, out, say, bars.show)
    click.echo(line)
