"""How processes live and die, with real ones.  pytest tests/shared/machine/test_process.py"""

import os
import re
import resource
import select
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from warmfront.shared.errors import ResourceError
from warmfront.shared.machine.process import (
    ensure_files,
    hold_interrupts,
    pin,
    python_module_command,
    set_name,
    take_short_turns,
)

CHILD = """
import os, sys, time
from warmfront.shared.machine.process import die_with_parent
die_with_parent(int(sys.argv[1]))
print(os.getpid(), flush=True)
time.sleep(60)
"""
PARENT = f"""
import os, subprocess, sys, time
subprocess.Popen([sys.executable, "-c", {CHILD!r}, str(os.getpid())])
time.sleep(60)
"""


def start(code: str, *args: str) -> subprocess.Popen[str]:
    return subprocess.Popen([sys.executable, "-c", code, *args], stdout=subprocess.PIPE, text=True)


def first_line(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def test_child_dies_with_a_killed_parent() -> None:
    with start(PARENT) as parent:
        child = os.pidfd_open(int(first_line(parent)))
        try:
            assert select.select([child], [], [], 0)[0] == []
            parent.kill()
            assert select.select([child], [], [], 10)[0] == [child]
        finally:
            os.close(child)


def test_child_of_a_parent_already_gone_exits() -> None:
    with start(CHILD, "1") as orphan:
        assert orphan.wait(10) == 1
        assert first_line(orphan) == ""


def test_interrupts_are_left_to_the_parent_and_sigterm_ends() -> None:
    code = """
import signal, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
from warmfront.shared.machine.process import ignore_interrupts
ignore_interrupts()
print("up", flush=True)
time.sleep(0.2)
print("still up", flush=True)
time.sleep(60)
"""
    with start(code) as child:
        assert first_line(child) == "up"
        child.send_signal(signal.SIGINT)
        assert first_line(child) == "still up"
        child.terminate()
        assert child.wait(10) == -signal.SIGTERM


def in_a_thread(work: "threading.Thread") -> None:
    work.start()
    work.join()


def test_pin_moves_the_calling_thread_only() -> None:
    before = os.sched_getaffinity(0)
    cpu = max(before)
    seen: list[set[int]] = []

    def work() -> None:
        pin([cpu])
        seen.append(os.sched_getaffinity(0))

    in_a_thread(threading.Thread(target=work))
    assert seen == [{cpu}]
    assert os.sched_getaffinity(0) == before


@pytest.mark.parametrize("cpus", [[], [100_000], [-1], [0, 100_000]])
def test_pin_refuses_what_is_not_allowed(cpus: list[int]) -> None:
    caught: list[ResourceError] = []

    def work() -> None:
        try:
            pin(cpus)
        except ResourceError as error:
            caught.append(error)

    in_a_thread(threading.Thread(target=work))
    assert "check taskset and cpusets" in str(caught[0])
    assert str(cpus) in str(caught[0])


def test_short_turns_are_asked_of_the_scheduler() -> None:
    """The slice shows where the kernel has custom slices; the thread's nice value stays."""
    seen: list[tuple[int, int, str]] = []

    def work() -> None:
        thread = threading.get_native_id()
        os.setpriority(os.PRIO_PROCESS, thread, 3)
        take_short_turns()
        schedule = Path(f"/proc/self/task/{thread}/sched")
        found = re.search(r"se\.slice +: +(\d+)", schedule.read_text()) if schedule.exists() else None
        seen.append((os.sched_getscheduler(thread), os.getpriority(os.PRIO_PROCESS, thread), found[1] if found else ""))

    in_a_thread(threading.Thread(target=work))
    policy, nice, slice_ns = seen[0]
    assert (policy, nice) == (os.SCHED_OTHER, 3)
    release = tuple(int(part) for part in os.uname().release.split(".")[:2])
    if release >= (6, 12) and slice_ns:
        assert slice_ns == "100000"


def test_set_name_names_the_thread() -> None:
    names: list[str] = []

    def work() -> None:
        set_name("warmfront-cpu0-and-more")
        names.append(Path("/proc/thread-self/comm").read_text().strip())

    in_a_thread(threading.Thread(target=work))
    assert names == ["warmfront-cpu0-"]


def test_module_command_ignores_modules_in_the_working_directory(tmp_path: Path) -> None:
    (tmp_path / "json.py").write_text("raise SystemExit('the wrong json')")
    command = python_module_command("json.tool", "--help")
    assert command[0] == sys.executable
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert "usage" in done.stdout


def test_an_interrupt_waits_for_the_end_of_the_block() -> None:
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    reached = []

    def interrupted() -> None:
        with hold_interrupts():
            signal.raise_signal(signal.SIGINT)
            reached.append(True)

    try:
        with pytest.raises(KeyboardInterrupt):
            interrupted()
        assert reached
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)


def test_interrupts_are_left_alone_by_other_threads() -> None:
    seen = []

    def work() -> None:
        with hold_interrupts():
            seen.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [signal.getsignal(signal.SIGINT)]


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&-", "<&- >&- 2>&-"])
def test_no_file_takes_the_place_of_a_closed_standard_one(tmp_path: Path, closed: str) -> None:
    code = f"""
import sys
from warmfront.shared.machine.process import open_standard_files
open_standard_files()
with open({str(tmp_path / "file")!r}, "w") as file:
    print("printed", flush=True)
    print("printed", file=sys.stderr, flush=True)
    file.write(f"{{file.fileno()}} {{sys.stdin.read()!r}}")
"""
    command = ["sh", "-c", f'exec "$0" -c "$1" {closed}', sys.executable, code]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, check=True)
    number, read = (tmp_path / "file").read_text().split()
    assert int(number) > 2
    assert read == "''"
    assert done.stdout == (b"" if " >&-" in f" {closed}" else b"printed\n")
    assert done.stderr == (b"" if "2>&-" in closed else b"printed\n")


def limits(code: str, soft: int, hard: int) -> str:
    """What `code` prints under these limits of open files."""
    start = f"""
import resource
resource.setrlimit(resource.RLIMIT_NOFILE, ({soft}, {hard}))
from warmfront.shared.machine.process import ensure_files
{code}
print(*resource.getrlimit(resource.RLIMIT_NOFILE))
"""
    done = subprocess.run([sys.executable, "-c", start], capture_output=True, text=True)
    return done.stdout or done.stderr.splitlines()[-1]


def test_the_soft_limit_of_files_is_raised_as_far_as_is_needed() -> None:
    assert limits("ensure_files(40)", 10, 60) == "44 60\n"
    assert limits("ensure_files(40)", 50, 60) == "50 60\n"
    refusal = "only 43 files may be open at once, warmfront needs 44: raise the limit (ulimit -n 44)"
    assert limits("ensure_files(40)", 10, 43).endswith(refusal)
    # Those that are open count.
    assert limits("import os; pipes = [os.pipe() for _ in range(10)]; ensure_files(40)", 30, 70) == "64 70\n"


def test_no_limit_of_files_is_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    unlimited = (resource.RLIM_INFINITY, resource.RLIM_INFINITY)
    monkeypatch.setattr(resource, "getrlimit", lambda _what: unlimited)
    monkeypatch.setattr(resource, "setrlimit", lambda *_: pytest.fail("there is nothing to raise"))
    ensure_files(1 << 40)


def test_address_space() -> None:
    code = """
import resource
resource.setrlimit(resource.RLIMIT_AS, (1 << 30, 2 << 30))
from warmfront.shared.machine.process import ensure_address_space
ensure_address_space(1500)
print(*resource.getrlimit(resource.RLIMIT_AS), flush=True)
ensure_address_space(2049)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == f"{1500 << 20} {2 << 30}\n"
    refusal = f"only {2 << 30} bytes of addresses may be used, warmfront needs {2049 << 20}: raise the limit"
    assert refusal in done.stderr


def test_leave_prints_what_was_said_and_tidies_nothing_up() -> None:
    code = (
        "import atexit, sys\nfrom warmfront.shared.machine.process import leave\n"
        "atexit.register(print, 'tidied up')\nprint('said')\nsys.stderr.write('complained')\nleave(3)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (3, "said\n", "complained")
