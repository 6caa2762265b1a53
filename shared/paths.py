"""Where warmfront keeps what it can make again: packed models, downloads, compiled kernels."""

import os
from pathlib import Path

__all__ = ["cache_root"]


def cache_root() -> Path:
    """The user's cache folder of warmfront ($XDG_CACHE_HOME/warmfront, else ~/.cache/warmfront); may not exist yet."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "warmfront"
