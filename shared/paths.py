"""Where warmfront keeps what it can make again: packed models, downloads, compiled kernels."""

import contextlib
import os
import stat
from pathlib import Path

from warmfront.shared.errors import ResourceError

__all__ = ["cache_root"]


def cache_root() -> Path:
    """The user's cache folder of warmfront; may not exist yet.

    $XDG_CACHE_HOME/warmfront if that is an absolute path, else ~/.cache/warmfront. Without a usable home folder, as in
    containers with a bare user id, a private folder below the temporary folder, which is made. Raises ResourceError if
    that cannot be had either.
    """
    chosen = os.environ.get("XDG_CACHE_HOME", "")
    if os.path.isabs(chosen):
        return Path(chosen, "warmfront")
    home = os.path.expanduser("~")  # stays "~" without HOME and an entry in the list of users
    folder = Path(home, ".cache/warmfront")
    return folder if os.path.isabs(home) and _usable(folder) else _temporary()


def _usable(folder: Path) -> bool:
    """Whether the folder exists, if only to be read, or can be made."""
    existing = next(place for place in (folder, *folder.parents) if os.path.lexists(place))
    mode = os.R_OK | os.X_OK if existing == folder else os.W_OK | os.X_OK
    return os.path.isdir(existing) and os.access(existing, mode)


def _temporary() -> Path:
    """The same folder in every run of this user; one that another user has made, or can write to, is refused."""
    folder = Path(os.environ.get("TMPDIR") or "/tmp", f"warmfront-{os.geteuid()}").absolute()
    try:
        with contextlib.suppress(FileExistsError):
            folder.mkdir(mode=0o700)
        status = folder.lstat()
    except OSError as error:
        raise ResourceError(
            f"there is no home folder for a cache, and {folder} cannot be made: {error.strerror}; "
            "set XDG_CACHE_HOME to a folder that can be written to"
        ) from error
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.geteuid() or status.st_mode & 0o077:
        raise ResourceError(
            f"there is no home folder for a cache, and {folder} is not a private folder: "
            "set XDG_CACHE_HOME to one of your own"
        )
    return folder
