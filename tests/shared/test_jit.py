"""The cache of compiled kernels: warm when nothing changed, cold when a kernel did.  pytest tests/shared/test_jit.py"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FOLDER = "from warmfront.shared import jit; print(jit._FOLDER)"
# Says whether the cache is cold, runs a kernel, says it again, then how often the cache had it.
RUN = """
from warmfront.shared.jit import cache_is_cold
from warmfront.shared.kernels import row_stride, share
print(cache_is_cold(row_stride), row_stride(0, 32), cache_is_cold(row_stride), cache_is_cold(row_stride, share),
      sum(row_stride.stats.cache_hits.values()))
"""
COMPILE_ONLY = """
import numba
from warmfront.shared.jit import cache_is_cold, compile_for
from warmfront.shared.kernels import row_stride
compile_for(row_stride, 0, 32)
print(cache_is_cold(row_stride), row_stride.signatures == [(numba.int64, numba.int64)])
"""
CONSTANTS = """
from warmfront.shared.jit import inlined, kernel

@kernel
def twice(number):
    return 2 * number

@inlined
def both(number):
    if number > 100:
        return 0
    return twice(2) + twice(number)

@kernel
def total(number):
    return both(number) + twice(3)

print(total(5), total(101), *twice.signatures, len(both.signatures))
"""
# Ctrl-C while LLVM compiles.
PRESSED = """
import signal
from numba import types
from numba.extending import intrinsic
from warmfront.shared.jit import kernel

@intrinsic
def press(context):
    def build(context, builder, signature, arguments):
        signal.raise_signal(signal.SIGINT)
        return context.get_dummy_value()
    return types.void(), build

@kernel
def pressed():
    press()

try:
    pressed()
except KeyboardInterrupt:
    print("interrupted with", len(pressed.signatures), "compiled")
pressed()
"""


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """The packages copied to where they are imported from instead."""
    for package in ("shared", "coordinator", "cpu_worker"):
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / package, tmp_path / "path" / "warmfront" / package, ignore=ignored)
    return tmp_path / "path" / "warmfront"


def run(code: str, copy: Path) -> list[str]:
    """Run `code` on the copy, with a cache of its own; its output in words."""
    environment = os.environ | {"PYTHONPATH": str(copy.parent), "XDG_CACHE_HOME": str(copy.parent.parent / "cache")}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def append(source: Path) -> None:
    source.write_text(source.read_text() + "\n# changed\n")


def test_a_kernel_is_compiled_once_for_all_processes(copy: Path) -> None:
    assert run(RUN, copy) == ["True", "128", "False", "True", "0"]
    assert run(RUN, copy) == ["False", "128", "False", "True", "1"]


def test_compile_without_a_call(copy: Path) -> None:
    assert run(COMPILE_ONLY, copy) == ["False", "True"]
    assert run(RUN, copy)[-1] == "1"


def test_a_changed_kernel_makes_another_cache_and_few_are_kept(copy: Path) -> None:
    (before,) = run(FOLDER, copy)
    assert Path(before).is_relative_to(copy.parent.parent / "cache" / "warmfront")
    assert run(RUN, copy)[0] == "True"
    for number in range(3):
        (Path(before).parent / str(number)).mkdir()
    os.utime(before, (0, 0))
    append(copy / "shared/kernels.py")
    (after,) = run(FOLDER, copy)
    assert after != before
    assert run(RUN, copy)[0] == "True"
    assert {folder.name for folder in Path(after).parent.iterdir()} == {"0", "1", "2", Path(after).name}


@pytest.mark.parametrize(
    ("source", "matters"),
    [
        ("shared/atomics.py", True),
        ("coordinator/forward.py", True),
        ("coordinator/network.py", True),
        ("cpu_worker/executor.py", True),
        # Imported by compiled code: their constants are in it.
        ("shared/bundle.py", True),
        ("shared/weights.py", True),
        ("shared/messages.py", False),
        ("coordinator/terminal.py", False),
    ],
)
def test_what_matters(copy: Path, source: str, matters: bool) -> None:
    before = run(FOLDER, copy)
    append(copy / source)
    assert (run(FOLDER, copy) != before) == matters


def test_a_constant_makes_no_kernel_of_its_own_and_what_is_inlined_none(copy: Path) -> None:
    (copy.parent / "constants.py").write_text(CONSTANTS)
    assert run("import constants", copy) == ["20", "6", "(int64,)", "0"]


def test_ctrl_c_waits_for_the_compilation(copy: Path) -> None:
    """In LLVM's callbacks it would be dropped."""
    (copy.parent / "pressed.py").write_text(PRESSED)
    assert run("import pressed", copy) == ["interrupted", "with", "1", "compiled"]
