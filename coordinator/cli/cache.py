"""`warmfront cache ls`, `rm`, `prune`: list and remove what is kept on the disk."""

import json
import math
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING

import click

from warmfront.coordinator.cli.options import Size
from warmfront.coordinator.cli.terminal import say
from warmfront.shared.errors import UsageError
from warmfront.shared.paths import cache_root

if TYPE_CHECKING:
    from warmfront.coordinator.packing.cache import Item

__all__ = ["cache"]


@click.group(no_args_is_help=False)
def cache() -> None:
    """Show and remove packed models, downloads, kernels and profiles."""


@cache.command()
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def ls(as_json: bool) -> None:
    """List what is kept: size, when last used, and what it was made from."""
    from warmfront.coordinator.packing.cache import listed

    items = listed()
    if as_json:
        fields = ("part", "name", "dtype", "id", "nbytes", "used", "source", "state")
        rows = [{field: getattr(item, field) for field in fields} for item in items]
        click.echo(json.dumps({"path": str(cache_root()), "nbytes": _total(items), "items": rows}))
        return
    for line in _lines(items):
        click.echo(line)


def _total(items: "list[Item]") -> int:
    return sum(item.nbytes for item in items)


def _lines(items: "list[Item]") -> Iterator[str]:
    for part in ("models", "downloads", "kernels", "profiles", ""):
        of_part = [item for item in items if item.part == part]
        if of_part:
            yield f"{part or 'other'}: {_total(of_part) / 1e6:.1f} MB"
        for item in of_part:
            used = time.strftime("%Y-%m-%d %H:%M", time.localtime(item.used))
            source = f"  {item.source or ''} [{item.state}]" if item.state else ""
            yield f"  {item.label:<48} {item.nbytes / 1e6:10.1f} MB  {used}{source}"
    yield f"{cache_root()}: {_total(items) / 1e6:.1f} MB in all"


@cache.command()
@click.argument("names", nargs=-1)
@click.option("--all", "all_", is_flag=True, help="Everything except profiles and what `tune` found.")
def rm(names: tuple[str, ...], all_: bool) -> None:
    """Remove NAMES.

    Names or ids as `ls` shows them, or models, downloads, kernels, profiles.
    """
    from warmfront.coordinator.packing.cache import chosen, everything, listed

    if bool(names) == all_:
        raise UsageError("give either names, as `warmfront cache ls` shows them, or --all")
    items = listed()
    _remove((item, "") for item in (everything(items) if all_ else chosen(names, items)))


@cache.command()
@click.option(
    "--older-than", type=click.FloatRange(0), metavar="DAYS", help="Also what has not been used for DAYS days."
)
@click.option(
    "--keep-size", type=Size(), help="Also the least recently used, until no more than this is left, such as 20GB."
)
def prune(older_than: float | None, keep_size: int | None) -> None:
    """Remove what is no longer of use.

    What was packed from models that are gone or have changed, what killed runs have left, old kernels.
    """
    from warmfront.coordinator.packing.cache import listed, refresh, stale, tidy

    if older_than is not None and not math.isfinite(older_than):
        raise UsageError(f"--older-than {older_than}: give a number of days, such as 30")
    refresh(say)
    _remove(stale(listed(), older_than, keep_size))
    tidy()


def _remove(doomed: "Iterator[tuple[Item, str]]") -> None:
    from warmfront.coordinator.packing.cache import listed, remove

    freed = 0
    for item, reason in doomed:
        if remove(item):
            freed += item.nbytes
            click.echo(f"removed {item.label}, {item.nbytes / 1e6:.1f} MB{reason and f': {reason}'}")
        else:
            say(f"{item.label} is just being written by another warmfront: left as it is")
    click.echo(f"{freed / 1e6:.1f} MB freed, {_total(listed()) / 1e6:.1f} MB left")
