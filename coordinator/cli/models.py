"""`warmfront models`: the models on this disk: those of the hub's cache, the default one, and what else was packed.

`warmfront pull` brings the newest version of one into that cache.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from warmfront.coordinator.models.default_model import DEFAULT_MODEL, default_file
from warmfront.coordinator.models.find import find_model
from warmfront.coordinator.models.gguf.file import GgufFile
from warmfront.coordinator.models.hf.folder import read_fields
from warmfront.coordinator.models.hub.cached import Held, hub_cache
from warmfront.coordinator.models.hub.cached import models as hub_models
from warmfront.coordinator.models.hub.fetch import fetch
from warmfront.coordinator.models.hub.names import parse
from warmfront.coordinator.models.open import model_files
from warmfront.coordinator.packing.cache import Item, listed
from warmfront.coordinator.packing.content import known_sources
from warmfront.shared.errors import ModelError, UsageError
from warmfront.shared.model.store import PackedModel

__all__ = ["describe", "pull", "render"]


def pull(model: str, say: Callable[[str], None], progress: Callable[[str, int, int], None]) -> str:
    """Fetch what is missing of `model`; returns a line about it. Raises UsageError for a path, else as `fetch`."""
    if model == DEFAULT_MODEL:
        return f"{model} is in {find_model(model, say, progress)}"
    name = parse(model)
    if name is None:
        known = "is a path, there is nothing to fetch" if Path(model).exists() else "is no name of the hub"
        raise UsageError(f"{model} {known}: give one like ORG/NAME, ORG/NAME:FILE.gguf or ORG/NAME:Q4_K_M")
    found = fetch(name, say, progress)
    size = f"{found.files} file{'s' * (found.files > 1)}, {found.nbytes / 1e6:.1f} MB"
    if not found.fetched:
        return f"{name} ({size}) is up to date in {found.path}"
    rate = found.fetched / 1e6 / max(found.seconds, 1e-3)
    return f"{name} ({size}) is in {found.path}; {found.seconds:.1f} s, {rate:.1f} MB/s"


def describe() -> dict[str, Any]:
    """The object that `--json` prints: `models`, each with a name that `-m` takes, and where the hub keeps its own.

    Of each: path, files, bytes, family (None where it is not known), the bytes of each weight type that it is packed
    with, and whether all of it is there.
    """
    packed = [item for item in listed() if item.part == "models" and item.id]
    content = {known.path: known.content for known in known_sources() if known.current}
    found = {str(name): held for name, held in hub_models()}
    if (file := default_file()).is_file():
        found[DEFAULT_MODEL] = Held(file, [file], whole=True)
    rows, named = [], set()
    for name, held in found.items():
        ids = set() if held is None else {content.get(held.path.resolve(), "")}
        items = [item for item in packed if item.id in ids]
        named |= {item.id for item in items}
        rows.append(_row(name, held, items))
    others = [item for item in packed if item.id not in named]
    for source in sorted({item.source or item.name for item in others}):
        rows.append(_row(source, _at(Path(source)), [item for item in others if source in (item.source, item.name)]))
    return {"hub": str(hub_cache()), "models": rows}


def _at(path: Path) -> Held | None:
    """The model at an absolute path, from which one was packed; None if it is gone."""
    with suppress(ModelError, OSError):
        return Held(path, model_files(path.resolve(strict=True)), whole=True) if path.is_absolute() else None
    return None


def _row(name: str, held: Held | None, packed: list[Item]) -> dict[str, Any]:
    files = [] if held is None else held.files
    return {
        "name": name,
        "path": None if held is None else str(held.path),
        "files": len(files),
        "nbytes": sum(file.stat().st_size for file in files),
        "family": _family(held, packed),
        "packed": {item.dtype: item.nbytes for item in packed},
        "complete": held is not None,
    }


def _family(held: Held | None, packed: Iterable[Item]) -> str | None:
    """By its packed file, else by its own settings."""
    for item in packed:
        with suppress(ModelError), PackedModel(item.paths[0]) as model:
            return model.spec.family
    if held is not None:
        with suppress(ModelError):
            if held.path.is_dir():
                config = read_fields(held.path, "config.json")
                return None if config is None else config.text("model_type")
            return str(GgufFile(held.path).fields.get("general.architecture"))
    return None


def render(facts: dict[str, Any]) -> Iterator[str]:
    """The object of `describe` as lines for people."""
    for row in facts["models"]:
        size = f"{row['files']:>2} file{'s' if row['files'] != 1 else ' '} {row['nbytes'] / 1e6:10.1f} MB"
        packed = ", ".join(f"{dtype} {nbytes / 1e6:.1f} MB" for dtype, nbytes in row["packed"].items())
        state = f"packed: {packed}" if packed else "not packed"
        if not row["complete"]:
            state = f"{state}; the model itself is gone" if packed else "incomplete: `warmfront pull` goes on with it"
        yield f"{row['name']:<48} {size}  {row['family'] or '?':<10} {state}"
    count = len(facts["models"])
    yield f"{count} model{'s' * (count != 1)}; the hub's cache is {facts['hub']}"
