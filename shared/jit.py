"""Compilation of the hot path: kernels, what is inlined into them, one cache.

numba's own cache notices a change only in the file of the cached function, not in the files it calls into. So the
cache folder carries a digest of all sources that hold compiled code, and of those that they import: a changed kernel
can never be run from a stale copy. The oldest folders are removed when a new one is made.
"""

import hashlib
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import numba
from numba.core.types.misc import unliteral

from warmfront.shared.paths import cache_root
from warmfront.shared.process import hold_interrupts

__all__ = ["cache_is_cold", "compile_for", "inlined", "kernel"]

F = TypeVar("F", bound=Callable[..., Any])

_PACKAGES = ("shared", "coordinator", "cpu_worker", "gpu_worker")
_COMPILED = re.compile(r"^ *@(kernel|inlined|intrinsic)\b", re.MULTILINE)
_IMPORT = re.compile(r"^from warmfront\.(\w+)\.(\w+) import", re.MULTILINE)
# Caches that are kept, so that two installations do not make each other compile anew.
_KEPT = 4
# What arithmetic may assume: reassociation and contraction, yet infinities and NaN keep their meaning.
_FASTMATH = {"reassoc", "contract", "nsz", "arcp", "afn"}


def _cache_folder() -> Path:
    top = Path(__file__).parent.parent
    sources = [source for package in _PACKAGES for source in (top / package).glob("*.py")]
    compiled = {source for source in sources if _COMPILED.search(source.read_text())}
    # Constants and types that compiled code imports are compiled in.
    imported = {top / package / f"{module}.py" for c in compiled for package, module in _IMPORT.findall(c.read_text())}
    digest = hashlib.sha256(numba.__version__.encode())
    for source in sorted(compiled | imported):
        digest.update(source.read_bytes())
    return cache_root() / "kernels" / digest.hexdigest()[:16]


_FOLDER = _cache_folder()


def cache_is_cold(*functions: Any) -> bool:
    """Whether any of these kernels has yet to be compiled on this machine."""
    return any(not any(_FOLDER.rglob(f"*{f.py_func.__name__}-*.nbc")) for f in functions)


def compile_for(function: Any, *arguments: object) -> None:
    """Compile the kernel `function` for the types of `arguments`, or take it from the cache, without calling it."""
    function.compile(tuple(numba.typeof(argument) for argument in arguments))


def inlined(function: F) -> F:
    """Compile `function` into its callers, at each call, not by itself.

    A kernel is optimised anew within each kernel that calls it, and again within that one's callers; and each hands its
    arguments on field by field, hundreds for a tuple of arrays. So what has one caller is inlined.
    """
    piece: F = numba.njit(inline="always")(function)
    return piece


def kernel(function: F) -> F:
    """Compile `function` on first call: no GIL, result cached across processes."""
    if not _FOLDER.exists():
        _FOLDER.mkdir(parents=True, exist_ok=True)
        for old in sorted(_FOLDER.parent.glob("*"), key=lambda folder: -folder.stat().st_mtime)[_KEPT:]:
            shutil.rmtree(old, ignore_errors=True)
    previous = numba.config.CACHE_DIR
    numba.config.CACHE_DIR = str(_FOLDER)
    try:
        compiled: Any = numba.njit(nogil=True, cache=True, fastmath=_FASTMATH, error_model="numpy")(function)
    finally:
        numba.config.CACHE_DIR = previous
    resolve, compile_now = compiled.get_call_template, compiled.compile
    # numba would compile it anew for every constant that a caller passes.
    compiled.get_call_template = lambda args, kws: resolve(
        tuple(map(unliteral, args)), {name: unliteral(kind) for name, kind in kws.items()}
    )
    # LLVM calls back into Python, where a KeyboardInterrupt would be dropped.
    compiled.compile = hold_interrupts()(compile_now)
    return compiled  # type: ignore[no-any-return]
