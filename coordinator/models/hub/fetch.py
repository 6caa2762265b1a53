"""Getting a model of the hub: from its cache where that has all of it, else from the hub.

A folder comes in two steps, so that a model that does not run is refused before its weights are fetched. The cache is
told last that this commit is the newest: until then an older one that is whole goes on being used.
"""

import shutil
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

from warmfront.coordinator.models.hf.refusals import checked_config, what_else
from warmfront.coordinator.models.hub.cached import held, hub_cache, place_of, weight_files
from warmfront.coordinator.models.hub.choice import gguf_files, gguf_parts, is_folder, settings
from warmfront.coordinator.models.hub.names import HubName, is_file_name
from warmfront.shared.errors import ModelError, ResourceError

__all__ = ["Fetched", "fetch", "find"]

Say = Callable[[str], None]
Progress = Callable[[str, int, int], None]


class Fetched(NamedTuple):
    """A model that is in the cache now."""

    # The folder, or the first part of the GGUF file.
    path: Path
    files: int
    nbytes: int
    # Bytes of these that were not there before.
    fetched: int
    seconds: float


def find(name: HubName, say: Say, progress: Progress) -> Path:
    """The path of the model, fetched if the cache lacks some of it.

    What the cache has whole is used as it is: a start needs no network, and the model changes only by `fetch`.
    Raises ModelError, ResourceError as `fetch` does.
    """
    from warmfront.coordinator.models.hub.client import UnreachableError

    found = held(name)
    if found is not None and found.whole:
        return found.path
    try:
        return fetch(name, say, progress).path
    except UnreachableError:
        if found is None:
            raise
        say(f"{name} may lack some of its tokenizer here, and the hub cannot be asked for it: used as it is")
        return found.path


def fetch(name: HubName, say: Say, progress: Progress) -> Fetched:
    """Bring the newest version of the model into the hub's cache, as far as it is not there.

    `say` gets a line if something is fetched, `progress` (what, bytes done, bytes in all). Raises ModelError if there
    is no such model, it may not be read or it would not run; ResourceError if there is no room for it.
    """
    from warmfront.coordinator.models.hub.client import hang_up

    try:
        return _fetch(name, say, progress)
    finally:
        hang_up()


def _fetch(name: HubName, say: Say, progress: Progress) -> Fetched:
    from warmfront.coordinator.models.hub.client import ask, mark_newest

    started = time.monotonic()
    remote = ask(name.repository)
    sizes = {file: size for file, size in remote.sizes.items() if is_file_name(file)}
    job = _Job(name, remote.revision, sizes, progress)
    if name.file is None and is_folder(sizes):
        files = settings(sizes)
        job.run(files)
        checked_config(job.snapshot, sizes)
        files += weight_files(job.snapshot, set(sizes))
        if lacking := [file for file in files if file not in sizes]:
            raise ModelError(f"{name} lacks {lacking[0]}, which its index names; choose another model")
    elif name.file is None and not gguf_files(sizes):
        raise ModelError(f"{name} {what_else(sizes)}")
    else:
        files = gguf_parts(name, sizes)
    if missing := job.missing(files):
        count = f"{len(missing)} file{'s' * (len(missing) > 1)}"
        say(f"fetching {name} ({count}, {job.size(missing) / 1e6:.1f} MB) into {hub_cache()}")
        job.run(files)
    mark_newest(name.repository, remote.revision)
    found = held(name)
    if found is None:
        raise ModelError(f"{name} was removed while it was fetched: try again")
    return Fetched(found.path, len(files), job.size(files), job.fetched, time.monotonic() - started)


class _Job:
    """The files of one commit, fetched one after another: Ctrl-C ends it at once, and leaves what has come."""

    def __init__(self, name: HubName, revision: str, sizes: Mapping[str, int], progress: Progress) -> None:
        self.snapshot = place_of(name.repository) / "snapshots" / revision
        # Bytes so far.
        self.fetched = 0
        self._name = name
        self._revision = revision
        self._sizes = sizes
        self._progress = progress

    def missing(self, files: Iterable[str]) -> list[str]:
        """Those that are not in the cache."""
        return [file for file in files if not (self.snapshot / file).exists()]

    def size(self, files: Iterable[str]) -> int:
        """Bytes of these files in all."""
        return sum(self._sizes[file] for file in files)

    def run(self, files: Iterable[str]) -> None:
        """Fetch those that are missing."""
        from warmfront.coordinator.models.hub.client import download

        missing = self.missing(files)
        total = self.fetched + self.size(missing)
        self._check_room(total - self.fetched)
        for file in missing:

            def count(there: int, before: int = self.fetched) -> None:
                self._progress("fetching", before + there, total)

            download(self._name.repository, self._revision, file, count)
            self.fetched += self._sizes[file]

    def _check_room(self, needed: int) -> None:
        place = hub_cache()
        existing = next(folder for folder in (place, *place.absolute().parents) if folder.exists())
        free = shutil.disk_usage(existing).free
        if needed > free:
            raise ResourceError(
                f"no room for {self._name} in {place}: {needed / 1e9:.2f} GB are needed, {free / 1e9:.2f} GB are free; "
                "free some, or set HF_HOME to a folder with room"
            )
