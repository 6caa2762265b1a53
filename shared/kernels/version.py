"""Which compiled code this is: a digest, known without importing what compiles it."""

import hashlib
import os
import re
import sys
from collections.abc import Iterator
from functools import cache
from importlib.metadata import version
from itertools import accumulate
from pathlib import Path

__all__ = ["digest"]

_TOP = Path(__file__).parents[2]
_PACKAGES = ("shared", "coordinator", "cpu_worker", "gpu_worker")
_COMPILED = (b"@kernel", b"@inlined", b"@intrinsic")
# At the top of a module, where what a kernel uses is imported: from which module, which names, or plain modules.
_IMPORT = re.compile(rb"^(?:from +warmfront([.\w]*) +import +(\([^)]*\)|.*)|import +(.*))", re.MULTILINE)


def _modules() -> dict[str, bytes]:
    """The sources of all modules, by their names below warmfront, of a package by its own: ".shared.kernels.jit".

    Every process reads them before its first kernel, so by the plainest means: the path objects alone would take as
    long as all the rest.
    """
    found = {}
    for package in _PACKAGES:
        for folder, _folders, files in os.walk(_TOP / package):
            place = folder[len(str(_TOP)) :].replace(os.sep, ".")
            for file in files:
                name, kind = os.path.splitext(file)
                if kind == ".py":
                    with open(os.path.join(folder, file), "rb") as source:
                        found[place if name == "__init__" else f"{place}.{name}"] = source.read()
    return found


def _imported(text: bytes) -> Iterator[str]:
    """What a module may import, with the packages on the way to it."""
    for module, names, plain in _IMPORT.findall(text):
        imported = [b".".join((module, name)) for name in re.findall(rb"\w+", names)]  # a name may be a module's
        for each in imported + re.findall(rb"\bwarmfront([.\w]+)", plain):
            yield from accumulate(f".{part}" for part in each.decode().split(".")[1:])


@cache
def digest() -> str:
    """Of all sources that hold compiled code, of those that they import, and of the versions of what compiles them."""
    modules = _modules()
    # Constants and types that compiled code imports are compiled in, however far they come.
    found: set[str] = set()
    ahead = [name for name, text in modules.items() if any(mark in text for mark in _COMPILED)]
    while ahead:
        if (name := ahead.pop()) in modules and name not in found:
            found.add(name)
            ahead += _imported(modules[name])
    total = hashlib.sha256(f"{sys.version} {version('numba')} {version('llvmlite')}".encode())
    for name in sorted(found):
        total.update(b"\0%s\0%s" % (name.encode(), modules[name]))
    return total.hexdigest()[:16]
