"""How a process of warmfront lives: it dies with its parent, leaves Ctrl-C to it, stays on its cores, has a name.

Linux only. `die_with_parent` and `ignore_interrupts` are called first thing in a worker's main thread.
"""

import contextlib
import ctypes
import os
import signal
import sys
import threading
from collections.abc import Collection, Iterator

from warmfront.shared.errors import ResourceError

__all__ = ["die_with_parent", "hold_interrupts", "ignore_interrupts", "pin", "python_module_command", "set_name"]

_PR_SET_PDEATHSIG = 1
_PR_SET_NAME = 15


def _prctl(option: int, argument: int | bytes) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(option, ctypes.c_char_p(argument) if isinstance(argument, bytes) else ctypes.c_ulong(argument)):
        raise OSError(ctypes.get_errno(), f"prctl({option}) failed")


def die_with_parent(parent_pid: int) -> None:
    """Have the kernel kill this process when `parent_pid`, the process that started it, ends.

    The kernel watches the *thread* that started this process: start workers from a thread that lives as long as they.
    """
    _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent_pid:  # it was gone before the line above
        os._exit(1)


def ignore_interrupts() -> None:
    """Leave Ctrl-C to the coordinator, which stops its workers in order; SIGTERM ends this process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


@contextlib.contextmanager
def hold_interrupts() -> Iterator[None]:
    """Let Ctrl-C wait until the block ends. An import may lose it: what its weakref callbacks raise is dropped."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    pressed: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, _frame: pressed.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
        if pressed:
            signal.raise_signal(signal.SIGINT)


def pin(cpus: Collection[int]) -> None:
    """Keep the calling thread, and threads it starts later, on `cpus`. Raises ResourceError if not all are allowed."""
    wanted = sorted(set(cpus))
    try:
        os.sched_setaffinity(0, wanted)
    except (OSError, OverflowError, ValueError) as error:
        raise ResourceError(f"cannot run on cpus {wanted}: {error}; check taskset and cpusets") from error
    if got := sorted(set(wanted) - os.sched_getaffinity(0)):  # the kernel drops cpus outside the cpuset in silence
        raise ResourceError(f"cannot run on cpus {got} of {wanted}: not allowed; check taskset and cpusets")


def set_name(name: str) -> None:
    """Name the calling thread as `top -H` and `ps -L` show it: the first 15 bytes of `name`."""
    _prctl(_PR_SET_NAME, name.encode())


def python_module_command(module: str, *args: str) -> list[str]:
    """The command that runs `module` with this interpreter; -P keeps the working directory off its import path."""
    return [sys.executable, "-P", "-m", module, *args]
