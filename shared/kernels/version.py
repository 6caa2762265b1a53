"""Which compiled code this is: a digest, known without importing what compiles it."""

import hashlib
import re
import sys
from collections.abc import Iterator
from functools import cache
from importlib.metadata import version
from pathlib import Path

__all__ = ["digest"]

_TOP = Path(__file__).parents[2]
_PACKAGES = ("shared", "coordinator", "cpu_worker", "gpu_worker")
_COMPILED = re.compile(r"^ *@(kernel|inlined|intrinsic)\b", re.MULTILINE)
# At the top of a module, where what a kernel uses is imported: from which module, which names, or plain modules.
_IMPORT = re.compile(r"^(?:from +warmfront([.\w]*) +import +(\([^)]*\)|.*)|import +(.*))", re.MULTILINE)


def _imported(text: str) -> Iterator[Path]:
    """Where the modules of warmfront may lie that a module imports, with the packages on the way to them."""
    for module, names, plain in _IMPORT.findall(text):
        imported = [f"{module}.{name}" for name in re.findall(r"\w+", names)]  # a name may be a module's
        for each in imported + re.findall(r"\bwarmfront([.\w]+)", plain):
            place = _TOP
            for part in filter(None, each.split(".")):
                place /= part
                yield from (place.with_suffix(".py"), place / "__init__.py")


@cache
def digest() -> str:
    """Of all sources that hold compiled code, of those that they import, and of the versions of what compiles them."""
    files = [file for package in _PACKAGES for file in (_TOP / package).rglob("*.py")]
    texts = {file: file.read_text(encoding="utf-8") for file in files}
    # Constants and types that compiled code imports are compiled in, however far they come.
    found: set[Path] = set()
    ahead = [file for file, text in texts.items() if _COMPILED.search(text)]
    while ahead:
        if (file := ahead.pop()) in texts and file not in found:
            found.add(file)
            ahead += _imported(texts[file])
    total = hashlib.sha256(f"{sys.version} {version('numba')} {version('llvmlite')}".encode())
    for file in sorted(found):
        total.update(f"\0{file.relative_to(_TOP)}\0{texts[file]}".encode())
    return total.hexdigest()[:16]
