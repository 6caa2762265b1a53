"""Workers and commands forked from a process that has imported what they need, and loaded the kernels.

That is most of a start, and starts are most of these tests. What is forked does all else as ever: with arguments, an
environment, standard files and a working directory of its own, as a child of who asks for it.

    who asks ── arguments, environment, folder, cpus; files ──> server ── fork ──> between ── fork ──> what is asked for

The server is a process of its own, without threads. The process between ends at once; so what is forked becomes a child
of who asks, a subreaper at that moment: it says its pid when it is. A command has a server of its own, forked from it
before it has threads, for its workers.

Started in full are commands and workers whose environment may matter to what is imported, those that a test starts with
`run_anew` or `subprocess`, as it does each command at least once, and all in tests outside this folder.
"""

import ctypes
import gc
import os
import pickle
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib import import_module
from io import TextIOWrapper
from pathlib import Path
from runpy import run_module
from types import ModuleType, SimpleNamespace
from typing import Any, NoReturn

from warmfront.coordinator.workers import supervisor
from warmfront.shared.machine.process import die_with_parent, ignore_interrupts
from warmfront.shared.paths import cache_root

COMMAND = "warmfront"
# A variable by which the processes of a command, or of an engine, are found.
MARK = "WARMFRONT_TEST_COMMAND"
_PR_SET_CHILD_SUBREAPER = 36
_MOST = 1 << 17  # bytes of a request
_libc = ctypes.CDLL(None)
# What a worker's supervisor sets is read when numpy is imported.
_SET = {"OPENBLAS_NUM_THREADS": "1"}
_current: "Forks | None" = None
_IMPORTED = ("cli.main", "cli.generate", "cli.chat", "engine.engine", "engine.load", "engine.session")
# Modules with kernels that Python calls.
_KERNELS = (
    "coordinator.decode.attention",
    "coordinator.decode.forward",
    "coordinator.decode.linear",
    "coordinator.decode.row_split",
    "coordinator.text.merging_kernels",
    "coordinator.text.sampling_kernels",
    "cpu_worker.cached_jobs",
    "cpu_worker.cache_reader",
    "cpu_worker.executor",
    "cpu_worker.jobs",
    "gpu_worker.arithmetic",
    "shared.kernels.tiles",
    "shared.wire.handoff",
)


class Forked:
    """A child, as `subprocess.Popen` has it."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self.returncode: int | None = None

    def poll(self, how: int = os.WNOHANG) -> int | None:
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, how)
            self.returncode = os.waitstatus_to_exitcode(status) if pid else None
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        if timeout is not None:
            ended = os.pidfd_open(self.pid)
            readable, _, _ = select.select([ended], [], [], timeout)
            os.close(ended)
            if not readable:
                raise subprocess.TimeoutExpired(COMMAND, timeout)
        code = self.poll(0)
        assert code is not None
        return code

    def terminate(self) -> None:
        self._send(signal.SIGTERM)

    def kill(self) -> None:
        self._send(signal.SIGKILL)

    def _send(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)


class Forks:
    """What this process asks its server for."""

    def __init__(self, server: socket.socket, environment: Mapping[str, str]) -> None:
        self._server, self._environment, self._lock = server, _lasting(environment), threading.Lock()
        self._kernels = _kernels(environment)

    def fit(self, environment: Mapping[str, str]) -> bool:
        """Whether what is imported and loaded with `environment` is what the server has.

        What is marked is looked for by its command and environment, which are the server's of what is forked.
        """
        return (
            MARK not in environment
            and _lasting(environment) == self._environment
            and _kernels(environment) == self._kernels
        )

    def start(self, words: Sequence[str], environment: Mapping[str, str], files: Sequence[int], folder: str) -> Forked:
        """Run the module `words[0]` with the others as its arguments; `files`: stdin, stdout, stderr, others.

        The numbers of the others are further arguments.
        """
        request = pickle.dumps(([*words], {**environment}, folder, os.sched_getaffinity(0)))
        with self._lock:
            _libc.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
            socket.send_fds(self._server, [request], files)
            pid = int(self._server.recv(_MOST))
            _libc.prctl(_PR_SET_CHILD_SUBREAPER, 0, 0, 0, 0)
        return Forked(pid)

    def start_worker(self, command: list[str], *, env: dict[str, str], pass_fds: list[int], **options: Any) -> Any:
        """In the place of `subprocess.Popen`."""
        if not self.fit(env):
            return subprocess.Popen(command, env=env, pass_fds=pass_fds, **options)
        with open(os.devnull, "r+b", buffering=0) as null:
            files = [null.fileno(), null.fileno(), 2, *pass_fds]
            return self.start(command[command.index("-m") + 1 : -1], env, files, os.getcwd())

    def take_workers(self) -> None:
        """From now on the supervisors of this process fork their workers."""
        supervisor.subprocess = SimpleNamespace(Popen=self.start_worker, DEVNULL=subprocess.DEVNULL)


def current() -> Forks | None:
    """Who forks for this process, if somebody does."""
    return _current


@contextmanager
def forking() -> Iterator[None]:
    """A server for this process, until the block ends."""
    global _current
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    command = [sys.executable, "-m", "tests.integration.forks", str(theirs.fileno())]
    environment, top = os.environ | _SET, Path(__file__).parents[2]
    with subprocess.Popen(command, env=environment, pass_fds=[theirs.fileno()], cwd=top), ours:
        theirs.close()
        _current = Forks(ours, environment)
        _current.take_workers()
        yield
        supervisor.subprocess, _current = subprocess, None


def _lasting(environment: Mapping[str, str]) -> dict[str, str]:
    """What is read at imports, or may be."""
    ours = ("WARMFRONT_", "PYTEST_", "XDG_CACHE_HOME", *_SET)
    return {name: value for name, value in environment.items() if not name.startswith(ours)}


def _kernels(environment: Mapping[str, str]) -> Path:
    cache = Path(environment["XDG_CACHE_HOME"]) / "warmfront" if "XDG_CACHE_HOME" in environment else cache_root()
    return (cache / "kernels").resolve()


def _load() -> None:
    """Import what commands and workers do, and load what is compiled of the kernels that they call."""
    import numba
    import numpy as np

    from warmfront.shared.kernels import jit

    for name in _IMPORTED:
        import_module(f"warmfront.coordinator.{name}")
    for name in ("cpu_worker.worker", "gpu_worker.host", "gpu_worker.worker"):
        import_module(f"warmfront.{name}")
    numba.typeof(np.zeros(1))
    folder: Any = jit._FOLDER
    for name in _KERNELS:
        for function in vars(import_module(f"warmfront.{name}")).values():
            if isinstance(cache := getattr(function, "_cache", None), jit._Cache):
                for path in folder.glob(f"{cache._file().stem}.*.nbc"):
                    _, result = pickle.loads(path.read_bytes())
                    function.compile(result[3].args)


def _serve(requests: socket.socket, parent: int) -> None:
    while True:
        request, files, _, _ = socket.recv_fds(requests, _MOST, 8)
        if not request:
            return
        between = os.fork()
        if between == 0:
            if os.fork():
                os._exit(0)
            while os.getppid() != parent:
                time.sleep(0.0005)
            requests.send(str(os.getpid()).encode())
            requests.close()
            _become(files, *pickle.loads(request))
        os.waitpid(between, 0)
        for file in files:
            os.close(file)


def _become(files: list[int], words: list[str], environment: dict[str, str], folder: str, cpus: set[int]) -> NoReturn:
    """Be what the command would start."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.chdir(folder)
    os.sched_setaffinity(0, cpus)
    for number, file in enumerate(files[:3]):
        os.dup2(file, number)
        os.close(file)
    os.environ.clear()
    os.environ.update(environment)
    sys.argv = [*words, *map(str, files[3:])]
    if words[0] != COMMAND:
        os.setpgid(0, 0)
        run_module(words[0], run_name="__main__")
    else:
        _open_streams()
        _fork_server(environment)
        sys.modules["__main__"] = ModuleType("__main__")  # the program's name is that of its first word
        import_module("warmfront.coordinator.cli.main").main()
    raise AssertionError("it has not ended")


def _open_streams() -> None:
    """Those of the server were opened for its own files."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        old, binary = getattr(sys, name), os.fdopen(number, "wb" if number else "rb", closefd=False)
        line_buffering = number == 2
        setattr(sys, name, TextIOWrapper(binary, old.encoding, old.errors, line_buffering=line_buffering))


def _fork_server(environment: Mapping[str, str]) -> None:
    """Have a server, of what is loaded here."""
    parent, (ours, theirs) = os.getpid(), socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    if os.fork() == 0:
        ours.close()
        ignore_interrupts()
        die_with_parent(parent)
        _serve(theirs, parent)
        os._exit(0)
    theirs.close()
    Forks(ours, environment).take_workers()


if __name__ == "__main__":
    ignore_interrupts()
    _load()
    gc.freeze()
    _serve(socket.socket(fileno=int(sys.argv[1])), os.getppid())
