"""Imported where a process begins to use numba: its first kernel comes half a second earlier.

Before it compiles anything, or takes it from a cache, numba looks for a BLAS by importing all of scipy's linear algebra
if scipy is installed, for products of matrices that no kernel here makes. Whether scipy is there can be told without.
Who compiles such a product in the same process gets what numba does otherwise.
"""

from importlib import import_module
from importlib.util import find_spec

from numba.np import linalg

__all__: list[str] = []


def _ensure_scipy() -> None:
    if find_spec("scipy") is None:
        raise ImportError("scipy is not installed")


_ensure_blas, linalg.ensure_blas = linalg.ensure_blas, _ensure_scipy
import_module("numba.np.arraymath")  # it is this one that looks, once
linalg.ensure_blas = _ensure_blas
