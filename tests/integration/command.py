"""Running the `warmfront` command in tests, and finding what a run has left behind."""

import os
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any, NamedTuple

import pytest

from tests.integration.forks import COMMAND, MARK, current
from warmfront.coordinator.hardware.fetching import CANDIDATES, every_use, keep
from warmfront.coordinator.packing.packer import ensure_packed
from warmfront.shared.machine.topology import read_topology
from warmfront.shared.paths import cache_root

WARMFRONT = os.fspath(Path(sys.executable).with_name("warmfront"))
CORES = sum(len(node.cores) for node in read_topology().nodes)
needs_two_cores = pytest.mark.skipif(CORES < 2, reason="two workers need two cores")


class Outcome(NamedTuple):
    """How a command ended."""

    code: int
    out: str
    err: str


def run(*args: str | Path, timeout: float = 60, **options: Any) -> Outcome:
    """Run `warmfront ARGS` to its end; `options` as of subprocess.run. Forked (`forks.py`) unless they say more than
    `input`, `env` and `cwd`."""
    forks, environment = current(), options.get("env", os.environ)
    if forks is None or options.keys() - {"input", "env", "cwd"} or not forks.fit(environment):
        return run_anew(*args, timeout=timeout, **options)
    with TemporaryFile("w+") as stdin, TemporaryFile("w+") as out, TemporaryFile("w+") as err:
        stdin.write(options.get("input", ""))
        stdin.seek(0)
        files = [file.fileno() for file in (stdin, out, err)]
        words = [COMMAND, *(os.fspath(arg) for arg in args)]
        process = forks.start(words, environment, files, os.fspath(options.get("cwd", os.getcwd())))
        try:
            code = process.wait(timeout)
        finally:
            process.kill()
            process.wait()
        out.seek(0)
        err.seek(0)
        return Outcome(code, out.read(), err.read())


def run_anew(*args: str | Path, timeout: float = 60, **options: Any) -> Outcome:
    """The same with a process of its own, started as users do."""
    options = {"stdin": None if "input" in options else subprocess.DEVNULL} | options
    done = subprocess.run([WARMFRONT, *args], capture_output=True, text=True, timeout=timeout, check=False, **options)
    return Outcome(done.returncode, done.stdout, done.stderr)


def prepack(model: Path, dtype: str = "auto") -> Path:
    """Pack `model` here, where torch is already imported: a command would take two seconds. Returns `model`."""
    ensure_packed(model, dtype, print, lambda _done, _total: None)
    return model


def assert_refused(outcome: Outcome, code: int, *words: str) -> None:
    """The command ended with `code` and exactly one line, with `words` in it, on stderr; nothing on stdout."""
    assert outcome.err.startswith("warmfront: "), outcome
    assert outcome.err.count("\n") == 1, outcome.err
    assert outcome.err.endswith("\n")
    for word in words:
        assert word in outcome.err
    assert outcome.code == code, outcome
    assert outcome.out == ""


def link_cache(home: Path) -> Path:
    """Make `home` an $XDG_CACHE_HOME with today's kernels and downloads but no packed models; returns their folder.

    How rows are fetched there was chosen before, so that no start measures it: not at all by an even number of cores,
    ahead by an odd one.
    """
    root = cache_root()
    (home / "warmfront").mkdir(parents=True)
    for name in ("kernels", "downloads"):
        (root / name).mkdir(parents=True, exist_ok=True)
        (home / "warmfront" / name).symlink_to((root / name).resolve())
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", os.fspath(home))
        for cores in range(1, CORES + 1):
            keep(range(cores), {use: CANDIDATES[use.access][cores % 2] for use in every_use()})
    return home / "warmfront" / "models"


def marked(mark: str) -> dict[int, dict[str, str]]:
    """Environments of the living processes that were started with `mark` as MARK, and their children, by pid."""
    found = {}
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            text = (entry / "environ").read_bytes().decode(errors="replace")
        except OSError:  # it has ended meanwhile, or is another user's
            continue
        environment = dict(line.split("=", 1) for line in text.split("\0") if "=" in line)
        if environment.get(MARK) == mark:
            found[int(entry.name)] = environment
    return found


def find_module(mark: str, module: str) -> int | None:
    """The pid of the marked process that runs `python -m MODULE`."""
    for pid in marked(mark):
        try:
            words = Path(f"/proc/{pid}/cmdline").read_bytes().decode().split("\0")
        except OSError:
            continue
        if module in words:
            return pid
    return None


def what_it_does(pid: int) -> str:
    """The command of a process and its state, for the message of a failed test."""
    try:
        folder = Path("/proc", str(pid))
        command = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
        state = next(line for line in (folder / "status").read_text().splitlines() if line.startswith("State"))
    except OSError:
        return "ended meanwhile"
    return f"{command}({state})"
