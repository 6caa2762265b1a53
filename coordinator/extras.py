"""Packages that only `warmfront plan` uses, and not without being asked: scipy, matplotlib."""

import sys
from importlib.util import find_spec

from warmfront.shared.errors import UsageError

__all__ = ["require"]


def require(package: str, what: str) -> None:
    """Raise UsageError that says how to install `package`, if `what` cannot do without and it is missing."""
    if find_spec(package) is None:
        raise UsageError(f"{what} needs {package}: run {sys.executable} -m pip install {package}")
