"""All that is said to the hub, through huggingface_hub: its cache, its HF_TOKEN, HF_HUB_OFFLINE, HF_ENDPOINT, HF_HOME.

The library keeps a file only when it is whole, so an interrupted download would begin anew. Here the bytes go to
`blobs/ETAG.incomplete`, where a later run goes on; the library then finds the blob and makes the links to it. What was
fetched in several runs is compared with the hash that the hub calls it by.
"""

import errno
import hashlib
import io
import logging
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import huggingface_hub
from huggingface_hub import constants, errors
from huggingface_hub.file_download import http_get
from huggingface_hub.utils import WeakFileLock, build_hf_headers, get_token

from warmfront.coordinator.models.hub.cached import BRANCH, REVISION, hub_cache, place_of
from warmfront.shared.errors import ModelError, ResourceError

__all__ = ["Remote", "UnreachableError", "ask", "download", "hang_up", "mark_newest"]

_ETAG = re.compile(r"[0-9A-Za-z][\w.+-]{0,127}", re.ASCII)
# What the hub calls a file by: SHA-256 of the content of large ones, git's SHA-1 of others.
_SHA256, _GIT_SHA1 = re.compile(r"[0-9a-f]{64}"), re.compile(r"[0-9a-f]{40}")
_PROGRAM = {"library_name": "warmfront"}


class UnreachableError(ModelError):
    """The hub does not answer, or may not be asked; what is in the cache may do."""


class Remote(NamedTuple):
    """A repository as the hub has it now."""

    # The commit.
    revision: str
    # Bytes of each file, by its path.
    sizes: dict[str, int]


def ask(repository: str) -> Remote:
    """The files of the repository's main branch. Raises ModelError, UnreachableError where there is no answer."""
    with _in_one_line(repository):
        api = huggingface_hub.HfApi(endpoint=constants.ENDPOINT, **_PROGRAM)
        timeout = constants.HF_HUB_ETAG_TIMEOUT
        info = api.model_info(repository, revision=BRANCH, files_metadata=True, timeout=timeout)
        sizes = {str(each.rfilename): int(each.size or 0) for each in info.siblings or ()}
        if not REVISION.fullmatch(str(info.sha)):
            raise ValueError(f"its commit is {info.sha!r:.60}")
        return Remote(info.sha, sizes)


def download(repository: str, revision: str, file: str, count: Callable[[int], None]) -> None:
    """Fetch a file into the hub's cache, if it is not there; `count` gets the bytes of it that are there so far.

    Raises ModelError, UnreachableError, and ResourceError if it cannot be kept; what has come so far is kept.
    """
    with _in_one_line(repository, file):
        cache, place = hub_cache(), place_of(repository)
        if not (place / "snapshots" / revision / file).exists():
            url = huggingface_hub.hf_hub_url(repository, file, revision=revision, endpoint=constants.ENDPOINT)
            headers = build_hf_headers(**_PROGRAM)
            found = huggingface_hub.get_hf_file_metadata(url, headers=headers)
            if not _ETAG.fullmatch(str(found.etag)):
                raise ValueError(f"its ETag is {found.etag!r:.60}")
            blob = place / "blobs" / found.etag
            # Larger ones are not given by plain requests, only in pieces that the library knows to put together.
            if not blob.exists() and (found.size or 0) <= constants.MAX_HTTP_DOWNLOAD_SIZE:
                lock = cache / ".locks" / place.name / f"{found.etag}.lock"
                for folder in (blob.parent, lock.parent):
                    folder.mkdir(parents=True, exist_ok=True)
                with WeakFileLock(lock):
                    _fetch(url, headers, blob, found.size, count)
        huggingface_hub.hf_hub_download(
            repository,
            file,
            revision=revision,
            endpoint=constants.ENDPOINT,
            cache_dir=cache,
            tqdm_class=_NoBar,
            **_PROGRAM,
        )


def _fetch(url: str, headers: dict[str, str], blob: Path, size: int | None, count: Callable[[int], None]) -> None:
    if blob.exists():  # fetched by another process meanwhile
        return
    partial = blob.with_name(f"{blob.name}.incomplete")
    while True:
        begun = _size(partial)
        try:
            with _Counted(partial, count) as file:
                if size is None or begun > size:
                    begun = file.truncate(0)
                count(file.seek(begun))
                http_get(url, file, resume_size=begun, headers=headers, expected_size=size, tqdm_class=_NoBar)
                file.flush()
                os.fsync(file.fileno())  # a blob that has its name is complete, even after a power cut
        except errors.HTTPError as error:
            if isinstance(error, errors.HfHubHTTPError) or _size(partial) <= begun:
                raise
            continue  # a connection that broke, but brought something
        if not begun or _is(partial, blob.name):
            partial.replace(blob)
            return
        partial.unlink()


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


class _NoBar(huggingface_hub.utils.tqdm):  # type: ignore[misc]
    """A progress bar of the library that shows nothing: how far a download has come is drawn elsewhere."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **(options | {"disable": True}))


class _Counted(io.BufferedRandom):
    """A file to read and write that tells how far it has been written."""

    def __init__(self, path: Path, count: Callable[[int], None]) -> None:
        super().__init__(io.FileIO(os.open(path, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o644), "r+"))
        self._count = count

    def write(self, data: Any) -> int:
        written = super().write(data)
        self._count(self.tell())
        return written


def _is(path: Path, etag: str) -> bool:
    """Whether a file has the content that the hub calls so; True for a name that is no hash."""
    if _SHA256.fullmatch(etag):
        digest, expected = hashlib.sha256(), etag
    elif _GIT_SHA1.fullmatch(etag):
        digest, expected = hashlib.sha1(f"blob {path.stat().st_size}\0".encode(), usedforsecurity=False), etag
    else:
        return True
    with path.open("rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest() == expected


def mark_newest(repository: str, revision: str) -> None:
    """Have the cache know that the main branch is at `revision`. Raises ResourceError."""
    with _in_one_line(repository):
        newest = place_of(repository) / "refs" / BRANCH
        newest.parent.mkdir(parents=True, exist_ok=True)
        partial = newest.with_name(f"{BRANCH}.{os.getpid()}.tmp")
        partial.write_text(revision, encoding="ascii")
        partial.replace(newest)


def hang_up() -> None:
    """Close the connections to the hub."""
    huggingface_hub.close_session()


@contextmanager
def _in_one_line(repository: str, file: str = "") -> Iterator[None]:
    """Turn what the library raises into errors of one line, and keep it from printing warnings of its own."""
    log = logging.getLogger("huggingface_hub")
    level = log.level
    log.setLevel(logging.CRITICAL)
    try:
        yield
    except (errors.HTTPError, OSError, ValueError, errors.EntryNotFoundError) as error:
        raise _explained(error, repository, file) from error
    finally:
        log.setLevel(level)


def _explained(error: Exception, repository: str, file: str) -> ModelError | ResourceError:
    endpoint, what = constants.ENDPOINT, f"{repository}:{file}" if file else repository
    cause = error.__cause__ if isinstance(error, errors.LocalEntryNotFoundError) else None
    if isinstance(cause, Exception):  # the library's guess that there is no network; the reason is behind it
        return _explained(cause, repository, file)
    if isinstance(error, errors.OfflineModeIsEnabled):
        return UnreachableError(f"{what} is not in the cache, and HF_HUB_OFFLINE is set: unset it to fetch it")
    if isinstance(error, errors.GatedRepoError):
        return ModelError(
            f"{repository} is gated: accept its terms at {endpoint}/{repository}, "
            "and set HF_TOKEN to a token of that account"
        )
    if isinstance(error, errors.RemoteEntryNotFoundError):
        return ModelError(f"{repository} has no file {file}: choose another one at {endpoint}/{repository}/tree/main")
    if isinstance(error, errors.RevisionNotFoundError):
        return ModelError(f"{repository} is empty: it has no branch {BRANCH}; choose another one")
    if isinstance(error, errors.RepositoryNotFoundError):
        token = "the token in use may not read it" if get_token() else "it is private, and needs HF_TOKEN"
        return ModelError(
            f"no such model: {repository} is neither a file or folder here nor a repository on {endpoint}, or {token}"
        )
    if isinstance(error, errors.HfHubHTTPError):
        return _answered(error, repository)
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return ResourceError(
            f"no room for {what} in {constants.HF_HUB_CACHE}: {error.strerror}; free some, or set HF_HOME to a folder "
            "with room: what has been fetched is kept, and the next run goes on from there"
        )
    if isinstance(error, OSError) and error.errno in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR):
        return ResourceError(
            f"cannot keep {what} in {constants.HF_HUB_CACHE}: {error.strerror}; set HF_HOME to a folder of your own"
        )
    if isinstance(error, errors.HTTPError):
        reason = str(error) or type(error).__name__
        return UnreachableError(
            f"cannot fetch {what} from {endpoint}: {reason}; check the network, and run the command again: "
            "what has been fetched is kept"
        )
    return ModelError(f"cannot fetch {what} from {endpoint}: {error}; try again, or fetch the files by other means")


def _answered(error: Any, repository: str) -> ModelError:
    """The error for an answer of the hub that is a refusal."""
    code, endpoint = error.response.status_code, constants.ENDPOINT
    if code == 401:
        return ModelError(f"{endpoint} refuses the token for {repository}: set HF_TOKEN to a valid one, or unset it")
    if code == 403:
        return ModelError(f"{endpoint} forbids {repository}: set HF_TOKEN to a token that may read it")
    if code == 429:
        return UnreachableError(f"{endpoint} allows no more requests now: try again in some minutes, or set HF_TOKEN")
    return UnreachableError(f"{endpoint} answers {code} for {repository}: try again later")
