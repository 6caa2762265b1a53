"""What the hub's own cache holds, whoever fetched it; nothing here asks the hub.

    HF_HUB_CACHE/models--ORG--NAME/
        refs/main                  the commit that the branch was at when it was last asked for
        snapshots/COMMIT/FILE      a link to
        blobs/ETAG                 the content, or a link to
    HF_HUB_CACHE/blobs/XX/HASH     content that several repositories share

Links that lead elsewhere are refused (`inside`).
"""

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from warmfront.coordinator.models.hf.folder import inside, read_fields
from warmfront.coordinator.models.hub.choice import INDEX, WEIGHTS, gguf_files, gguf_parts, is_folder
from warmfront.coordinator.models.hub.names import HubName, is_file_name, parse
from warmfront.shared.errors import ModelError

__all__ = ["BRANCH", "REVISION", "Held", "held", "hub_cache", "models", "place_of", "weight_files"]

BRANCH = "main"
REVISION = re.compile(r"[0-9a-f]{40}")
# Without these a folder runs too, but a program that wanted only the weights may have left them out.
_TEXT_FILES = ("tokenizer.json", "tokenizer_config.json")


class Held(NamedTuple):
    """A model in the cache that can be run."""

    # The folder, or the GGUF file.
    path: Path
    # All its files.
    files: list[Path]
    # Whether nothing can be missing, so that the hub need not be asked.
    whole: bool


def hub_cache() -> Path:
    """The folder that huggingface_hub keeps repositories in; need not exist."""
    from huggingface_hub import constants  # not by programs that name no model of the hub

    return Path(constants.HF_HUB_CACHE)


def place_of(repository: str) -> Path:
    """The repository's folder in the cache; need not exist."""
    return hub_cache() / f"models--{repository.replace('/', '--')}"


def held(name: HubName) -> Held | None:
    """The model as the cache has it; None if files of it are missing. Raises ModelError for links out of the cache."""
    snapshot = _snapshot(name.repository)
    if snapshot is None:
        return None
    files = _files(snapshot)
    if name.file is None and is_folder(files):
        return _held_folder(snapshot, files)
    try:
        parts = gguf_parts(name, files)
    except ModelError:
        return None
    paths = [inside((snapshot / part).parent, Path(part).name) for part in parts]
    return Held(paths[0], paths, whole=True)


def _held_folder(snapshot: Path, files: set[str]) -> Held | None:
    weights = weight_files(snapshot, files)
    if not files.issuperset(weights):
        return None
    paths = [inside(snapshot, file) for file in files if "/" not in file]
    return Held(snapshot, sorted(paths), whole=files.issuperset(_TEXT_FILES))


def weight_files(snapshot: Path, files: set[str]) -> list[str]:
    """The weights of a folder whose settings are there; `files`: all that it has or will have."""
    if WEIGHTS in files:
        return [WEIGHTS]
    index = read_fields(snapshot, INDEX)
    if index is None:
        return []
    where = index.section("weight_map")
    named = sorted({where.text(name) for name in where})
    if wrong := [file for file in named if not is_file_name(file) or not file.endswith(".safetensors")]:
        raise ModelError(f"{index.path} names {wrong[0]}, which is no safetensors file of the folder; choose another")
    return named


def models() -> Iterator[tuple[HubName, Held | None]]:
    """Every model in the cache, by name; None for one that was fetched in part."""
    try:
        folders = sorted(hub_cache().glob("models--*"))
    except OSError:
        return
    for folder in folders:
        name = parse(folder.name.removeprefix("models--").replace("--", "/"))
        snapshot = None if name is None else _snapshot(name.repository)
        if name is None or snapshot is None:
            continue
        files = _files(snapshot)
        named = [name._replace(file=file) for file in gguf_files(files)]
        if "config.json" in files and not named:
            named = [name]
        for each in named:
            try:
                yield each, held(each)
            except ModelError:  # links that lead elsewhere, an index that is not one
                yield each, None


def _snapshot(repository: str) -> Path | None:
    """The folder of the main branch's newest commit that is known here."""
    place = place_of(repository)
    try:
        revision = (place / "refs" / BRANCH).read_text(encoding="ascii").strip()
    except (OSError, ValueError):
        return None
    snapshot = place / "snapshots" / revision
    return snapshot if REVISION.fullmatch(revision) and snapshot.is_dir() else None


def _files(snapshot: Path) -> set[str]:
    """The paths of the files in a snapshot, as the repository has them."""
    found = set()
    for folder, _, files in os.walk(snapshot):
        for file in files:
            path = Path(folder, file)
            name = path.relative_to(snapshot).as_posix()
            if is_file_name(name) and path.is_file():
                found.add(name)
    return found
