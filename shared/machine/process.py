"""How warmfront's processes live: they die with their parent, leave Ctrl-C to it, stay on their cores, have names.

Linux only. `open_standard_files` and `collect_seldom` are called first thing in every process, `die_with_parent` and
`ignore_interrupts` in a worker's main thread.
"""

import contextlib
import ctypes
import gc
import os
import platform
import resource
import signal
import struct
import sys
import threading
from collections.abc import Collection, Iterator
from typing import NoReturn

from warmfront.shared.errors import ResourceError

__all__ = [
    "collect_seldom",
    "die_with_parent",
    "ensure_address_space",
    "ensure_files",
    "hold_interrupts",
    "ignore_interrupts",
    "leave",
    "open_standard_files",
    "pin",
    "python_module_command",
    "set_name",
    "take_short_turns",
]

_PR_SET_PDEATHSIG = 1
_PR_SET_NAME = 15
# The system call's number by machine, since glibc wraps it from 2.41 on only; the shortest slice that Linux gives.
_SCHED_SETATTR = {"x86_64": 314, "aarch64": 274}
_SLICE_NS = 100_000


def _prctl(option: int, argument: int | bytes) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(option, ctypes.c_char_p(argument) if isinstance(argument, bytes) else ctypes.c_ulong(argument)):
        raise OSError(ctypes.get_errno(), f"prctl({option}) failed")


def collect_seldom() -> None:
    """Look for cycles of dead objects every so many objects, not every 700: a sixth of a process's start went there.

    Imports and kernels make hundreds of thousands of objects, all of which live on.
    """
    gc.set_threshold(100_000)


def die_with_parent(parent_pid: int) -> None:
    """Have the kernel kill this process when `parent_pid`, the process that started it, ends.

    The kernel watches the *thread* that started this process: start workers from a thread that lives as long as they.
    """
    _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent_pid:  # it ended before the line above
        os._exit(1)


def ignore_interrupts() -> None:
    """Leave Ctrl-C to the coordinator, which stops its workers in order; SIGTERM ends this process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def leave(code: int) -> NoReturn:
    """End this process without Python's tidying up: with numba loaded that takes 0.2 to 0.4 s, while somebody waits.

    Whatever must be closed is closed by now.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def open_standard_files() -> None:
    """Open /dev/null in the place of stdin, stdout and stderr where they are closed.

    The next file that is opened would get that number, and what is printed would be written into it.
    """
    for fd, (name, mode) in enumerate((("stdin", "r"), ("stdout", "w"), ("stderr", "w"))):
        try:
            os.fstat(fd)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # gets the lowest number that is free, this one
        if getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(fd, mode, encoding="utf-8", closefd=False))


def ensure_files(count: int) -> None:
    """Let this process open `count` files beside those that are open; its children inherit the limit.

    Raises the soft limit where it is lower, and ResourceError if the hard limit does not allow it.
    """
    with contextlib.suppress(OSError):  # without /proc
        count += len(os.listdir("/proc/self/fd"))
    _ensure(
        resource.RLIMIT_NOFILE, count, "only {} files may be open at once, warmfront needs {}", f"ulimit -n {count}"
    )


def ensure_address_space(megabytes: int) -> None:
    """The same for the addresses that libraries reserve: without them OpenBLAS retries for ever."""
    needs = "only {} bytes of addresses may be used, warmfront needs {}"
    _ensure(resource.RLIMIT_AS, megabytes << 20, needs, f"ulimit -v {megabytes << 10}")


def _ensure(limit: int, count: int, needs: str, command: str) -> None:
    soft, hard = resource.getrlimit(limit)
    if hard != resource.RLIM_INFINITY and hard < count:
        raise ResourceError(f"{needs.format(hard, count)}: raise the limit ({command})")
    if soft != resource.RLIM_INFINITY and soft < count:
        resource.setrlimit(limit, (count, hard))


@contextlib.contextmanager
def hold_interrupts() -> Iterator[None]:
    """Hold Ctrl-C back until the block ends. During an import it may be lost: weakref callbacks drop exceptions."""
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
    if missing := sorted(set(wanted) - os.sched_getaffinity(0)):  # the kernel silently drops cpus outside the cpuset
        raise ResourceError(f"cannot run on cpus {missing} of {wanted}: not allowed; check taskset and cpusets")


def take_short_turns() -> None:
    """Ask the scheduler to run the calling thread as soon as it is woken, for a short slice, beside busy neighbours.

    Its share of the core stays the same. Linux 6.12 and later honour this: a thread with a short slice need not wait
    for the end of its neighbour's, 3 ms. Beside a busy process 20 ms of waiting a token became 6 (docs/log.md).
    Elsewhere nothing happens.
    """
    number = _SCHED_SETATTR.get(platform.machine())
    if number is None or os.sched_getscheduler(0) != os.SCHED_OTHER:
        return
    nice = os.getpriority(os.PRIO_PROCESS, threading.get_native_id())
    # struct sched_attr: size, policy, flags, nice, priority, runtime (the slice, ns), deadline, period.
    attributes = struct.pack("=IIQiIQQQ", 48, os.SCHED_OTHER, 0, nice, 0, _SLICE_NS, 0, 0)
    ctypes.CDLL(None).syscall(ctypes.c_long(number), ctypes.c_int(0), attributes, ctypes.c_uint(0))


def set_name(name: str) -> None:
    """Name the calling thread as `top -H` and `ps -L` show it: the first 15 bytes of `name`."""
    _prctl(_PR_SET_NAME, name.encode())


def python_module_command(module: str, *args: str) -> list[str]:
    """The command that runs `module` with this interpreter; -P keeps the working directory off its import path."""
    return [sys.executable, "-P", "-m", module, *args]
