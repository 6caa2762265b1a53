"""The cache of compiled kernels: warm when nothing changed, cold when a kernel did.

Run: pytest tests/shared/kernels/test_jit.py
"""

import os
import pickle
import shutil
import stat
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from warmfront.shared.kernels import jit
from warmfront.shared.kernels.jit import cache_is_cold

ROOT = Path(__file__).parents[3]
FOLDER = "from warmfront.shared.kernels import jit; print(jit._FOLDER)"
# The name of that folder, without numba.
DIGEST = "from warmfront.shared.kernels.version import digest; print(digest())"
# Says whether the cache is cold, runs a kernel, says it again, then how often the cache had it.
RUN = """
from warmfront.shared.kernels.jit import cache_is_cold
from warmfront.shared.kernels.rows import row_stride, share
print(cache_is_cold(row_stride), row_stride(0, 32), cache_is_cold(row_stride), cache_is_cold(row_stride, share),
      sum(row_stride.stats.cache_hits.values()))
"""
COMPILE_ONLY = """
import numba
from warmfront.shared.kernels.jit import cache_is_cold, compile_for
from warmfront.shared.kernels.rows import row_stride
compile_for(row_stride, 0, 32)
print(cache_is_cold(row_stride), row_stride.signatures == [(numba.int64, numba.int64)])
"""
# What compiling needs, and what numba looks for a BLAS in.
IMPORTED = """
import sys
print("numba.np.arraymath" in sys.modules, "scipy.linalg" in sys.modules)
"""
CONSTANTS = """
from warmfront.shared.kernels.jit import inlined, kernel

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
# Through a kernel that is not apart, and from the cache where only the caller's file is asked for.
CALLED = """
from warmfront.shared.kernels.jit import apart, kernel

@apart
def called(number):
    if number < 0:
        raise ValueError("negative")
    return 2 * number

@kernel
def between(number):
    return called(number) + 1

@kernel
def calling(number):
    return between(number) + called(1)

print(calling(5), *called.signatures, sum(calling.stats.cache_hits.values()))
try:
    calling(-1)
except ValueError as error:
    print(error)
"""
COMPILED = """
lines = calling.inspect_llvm(calling.signatures[0]).splitlines()
print([sum(" = external " in line and name in line for line in lines) for name in ("between", "called")])
"""
# Ctrl-C while LLVM compiles.
PRESSED = """
import signal
from numba import types
from numba.extending import intrinsic
from warmfront.shared.kernels.jit import kernel

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


def test_only_what_a_process_needs_is_imported(copy: Path) -> None:
    """By a kernel that is compiled, and by one that is there."""
    assert run(RUN + IMPORTED, copy)[-2:] == ["True", "False"]
    assert run(RUN + IMPORTED, copy)[-2:] == ["False", "False"]


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
    append(copy / "shared/kernels/rows.py")
    (after,) = run(FOLDER, copy)
    assert after != before
    assert run(DIGEST, copy) == [Path(after).name]
    assert run(RUN, copy)[0] == "True"
    assert {folder.name for folder in Path(after).parent.iterdir()} == {"0", "1", "2", Path(after).name}


@pytest.mark.parametrize(
    ("source", "matters"),
    [
        ("shared/kernels/atomics.py", True),
        ("coordinator/decode/forward.py", True),
        ("coordinator/decode/network.py", True),
        ("cpu_worker/executor.py", True),
        # Imported by compiled code: their constants are in it.
        ("shared/model/bundle.py", True),
        ("shared/model/formats.py", True),
        # Imported by what that imports.
        ("shared/model/architecture.py", True),
        ("shared/wire/messages.py", False),
        ("coordinator/cli/terminal.py", False),
    ],
)
def test_what_matters(copy: Path, source: str, matters: bool) -> None:
    before = run(DIGEST, copy)
    append(copy / source)
    assert (run(DIGEST, copy) != before) == matters


@pytest.mark.parametrize(
    "line",
    [
        "from warmfront.shared.deep.middle import SIZE",
        "from warmfront.shared.deep import (\n    # where the size is\n    middle,\n)",
        "from warmfront.shared import deep",
        "import numpy, warmfront.shared.deep.middle",
    ],
)
def test_constants_of_nested_modules_matter_however_they_are_imported(copy: Path, line: str) -> None:
    deep = copy / "shared/deep"
    deep.mkdir()
    (deep / "__init__.py").write_text("from warmfront.shared.deep.middle import SIZE\n")
    (deep / "middle.py").write_text("from warmfront.shared.deep.constants import SIZE\n")
    (deep / "constants.py").write_text("SIZE = 1\n")
    with (copy / "shared/kernels/fp16.py").open("a") as file:
        file.write(f"\n{line}\n")
    before = run(DIGEST, copy)
    assert run(DIGEST, copy) == before
    append(deep / "constants.py")
    assert run(DIGEST, copy) != before


@pytest.mark.parametrize("what", ["numba", "llvmlite", "python"])
def test_versions_matter(copy: Path, what: str) -> None:
    before = run(DIGEST, copy)
    code = f"""
import sys
from importlib import metadata
known = metadata.version
metadata.version = lambda name: known(name) + " changed" * (name == {what!r})
sys.version += " changed" * ({what!r} == "python")
"""
    assert run(code + DIGEST, copy) != before


def plus_one(number: int) -> int:
    return number + 1


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The cache's folder for this test, not made yet."""
    monkeypatch.setattr(jit, "_FOLDER", tmp_path / "kernels" / "digest")
    return tmp_path / "kernels" / "digest"


def was_kept() -> bool:
    """Run a kernel as a new process would; whether the cache had it."""
    made: Any = jit.kernel(plus_one)
    assert made(1) == 2
    return sum(made.stats.cache_hits.values()) == 1


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("suffix", ["nbi", "nbc"])
@pytest.mark.parametrize(
    "damage",
    [
        lambda file: file.write_bytes(b""),
        lambda file: file.write_bytes(file.read_bytes()[:10]),
        lambda file: file.write_bytes(file.read_bytes()[:-1]),
        lambda file: file.write_bytes(bytes(byte ^ 0x55 for byte in file.read_bytes())),
        lambda file: file.write_bytes(pickle.dumps("stale")),
        lambda file: file.write_bytes(b'{"a": 5, "b": {}}'),
        lambda file: file.write_bytes(file.read_bytes().replace(b'": "', b'": ["').replace(b'"}', b'"]}') + b" "),
        lambda file: file.write_bytes(b"[" * 100_000),
        lambda file: (file.unlink(), (file / "inside").mkdir(parents=True)),
        lambda file: (file.unlink(), file.symlink_to("nowhere")),
        lambda file: file.unlink(),
    ],
    ids=["empty", "cut", "short", "flipped", "stale", "other", "list", "nested", "folder", "link", "gone"],
)
def test_what_is_damaged_is_compiled_anew_and_replaced(
    folder: Path, suffix: str, damage: Callable[[Path], object]
) -> None:
    assert [was_kept(), was_kept()] == [False, True]
    (file,) = folder.glob(f"*.{suffix}")
    damage(file)
    assert [was_kept(), was_kept()] == [False, True]
    assert len(contents(folder)) == 2


def test_the_cache_is_private(folder: Path) -> None:
    previous = os.umask(0)
    try:
        was_kept()
    finally:
        os.umask(previous)
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda folder: folder.chmod(0o702), "may be written to by others"),
        (lambda folder: folder.chmod(0o720), "may be written to by others"),
        (lambda folder: os.chown(folder, 54321, 54321), "belongs to another user"),
        (lambda folder: (shutil.rmtree(folder), folder.write_bytes(b"")), "is not a folder"),
        (lambda folder: (shutil.rmtree(folder), folder.symlink_to("nowhere")), "cannot be made: File exists"),
        (lambda folder: (shutil.rmtree(folder.parent), folder.parent.touch()), "cannot be made: File exists"),
    ],
    ids=["all", "group", "owner", "file", "link", "above"],
)
def test_what_others_may_have_put_there_is_not_run(folder: Path, spoil: Callable[[Path], object], words: str) -> None:
    if os.geteuid():
        pytest.skip("needs root to give a folder away")
    was_kept()
    spoil(folder)
    assert not was_kept()
    assert cache_is_cold(jit.kernel(plus_one))
    assert jit.compiling_note().startswith(
        f"compiling kernels, as at every start: {folder} {words}; set XDG_CACHE_HOME"
    )


def test_a_cache_that_cannot_be_written_to_is_run_from(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    was_kept()
    monkeypatch.setattr(os, "access", lambda _path, mode: not mode & os.W_OK)
    before = contents(folder)
    assert was_kept()
    assert jit.kernel(lambda number: number + 2)(1) == 3
    assert contents(folder) == before
    assert jit.compiling_note().startswith(f"compiling kernels, as at every start: {folder} may not be written to;")


def test_without_a_cache_kernels_are_compiled_in_memory(copy: Path) -> None:
    """numba would write them beside the sources."""
    (copy.parent.parent / "cache").write_text("a file")
    assert run(RUN, copy) == ["True", "128", "True", "True", "0"]
    assert list(copy.rglob("*.nb[ic]")) == []


def test_many_processes_make_and_prune_the_cache_at_once(copy: Path) -> None:
    kernels = copy.parent.parent / "cache/warmfront/kernels"
    for number in range(200):
        (kernels / f"old-{number}").mkdir(parents=True)
    with ThreadPoolExecutor() as pool:
        outputs = list(pool.map(lambda _: run(RUN, copy)[1], range(6)))
    assert outputs == ["128"] * 6
    assert len(list(kernels.iterdir())) == 4


def test_a_constant_makes_no_kernel_of_its_own_and_what_is_inlined_none(copy: Path) -> None:
    (copy.parent / "constants.py").write_text(CONSTANTS)
    assert run("import constants", copy) == ["20", "6", "(int64,)", "0"]


def test_what_is_apart_is_called_and_compiled_into_no_caller(copy: Path) -> None:
    (copy.parent / "calls.py").write_text(CALLED)
    assert run("from calls import *" + COMPILED, copy)[-2:] == ["[0,", "1]"]
    assert run("import calls", copy) == ["13", "(int64,)", "1", "negative"]


@pytest.mark.parametrize("damage", [Path.unlink, lambda file: file.write_bytes(b"")])
def test_what_is_apart_is_compiled_anew_where_only_its_caller_is_kept(
    copy: Path, damage: Callable[[Path], object]
) -> None:
    (copy.parent / "calls.py").write_text(CALLED)
    run("import calls", copy)
    (file,) = (copy.parent.parent / "cache/warmfront/kernels").glob("*/calls.called.*.nbc")
    damage(file)
    assert run("import calls", copy) == ["13", "(int64,)", "1", "negative"]


def test_ctrl_c_waits_for_the_compilation(copy: Path) -> None:
    """In LLVM's callbacks it would be dropped."""
    (copy.parent / "pressed.py").write_text(PRESSED)
    assert run("import pressed", copy) == ["interrupted", "with", "1", "compiled"]


@jit.kernel
def add_squares(values: Any, total: Any) -> Any:
    for value in values:
        total += value * value
    return total


def test_arithmetic_is_done_as_it_is_written() -> None:
    """In its order, each step rounded: what the compiler may choose would follow from what it inlines."""
    values = np.random.default_rng(0).standard_normal(1000).astype(np.float32)
    expected = np.float32(0)
    for value in values:
        expected += value * value
    assert add_squares(values, np.float32(0)) == expected
    # In one step a square of 1 + 2^-12 would keep its 2^-24.
    assert add_squares(np.array([1 + 2**-12], np.float32), np.float32(-1 - 2**-11)) == 0
