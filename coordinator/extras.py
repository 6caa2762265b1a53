"""Packages that only some commands use, and not without being asked: scipy, matplotlib, scikit-learn."""

import sys
from importlib.util import find_spec

from warmfront.shared.errors import UsageError

__all__ = ["require"]


def require(package: str, what: str, module: str = "") -> None:
    """Raise UsageError that says how to install `package`, if `what` cannot do without and it is missing.

    `module`: the name by which it is imported, if that is another one.
    """
    if find_spec(module or package) is None:
        raise UsageError(f"{what} needs {package}: run {sys.executable} -m pip install {package}")
