"""The leak check sees what a test may leave behind.  pytest tests/test_leak_check.py"""

import os
import signal
import subprocess
import sys
import threading
import time

import zmq

from tests.leak_check import left_since, snapshot

SLEEP = [sys.executable, "-c", "import time; time.sleep(60)"]


def test_nothing_changes_when_nothing_is_left() -> None:
    before = snapshot()
    subprocess.run([sys.executable, "-c", ""], check=True)
    with open(os.devnull):
        pass
    assert left_since(before) == []


def test_sees_a_child_and_its_zombie() -> None:
    before = snapshot()
    child = subprocess.Popen(SLEEP)
    assert any(line.startswith(f"processes: {child.pid} ") for line in left_since(before))
    child.kill()
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    assert any(f"{child.pid} (zombie)" in line for line in left_since(before))
    child.wait()
    assert left_since(before) == []


def test_sees_an_orphan() -> None:
    before = snapshot()
    quiet = "stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL"
    code = f"import subprocess; print(subprocess.Popen({SLEEP!r}, {quiet}).pid)"
    orphan = int(subprocess.run([sys.executable, "-c", code], check=True, capture_output=True).stdout)
    left = left_since(before)
    os.kill(orphan, signal.SIGKILL)
    assert [line.split()[1] for line in left] == [str(orphan)]


def test_sees_threads_and_descriptors() -> None:
    before = snapshot()
    gate = threading.Event()
    thread = threading.Thread(target=gate.wait, name="lingering")
    thread.start()
    memory = os.memfd_create("board")
    left = left_since(before)
    gate.set()
    thread.join()
    os.close(memory)
    assert len(left) == 2
    assert left[0].startswith("threads: lingering")
    assert left[1].startswith("descriptors: /memfd:board")
    assert left_since(before) == []


def test_sees_zeromq_with_its_address() -> None:
    before = snapshot()
    context = zmq.Context()
    socket = context.socket(zmq.ROUTER)
    socket.bind("ipc://@warmfront-leak-check")
    deadline = time.monotonic() + 5
    # A thread names itself, once it runs.
    while "threads: ZMQbg" not in (left := "\n".join(left_since(before))) and time.monotonic() < deadline:
        time.sleep(0.01)
    socket.close(0)
    context.term()
    assert "threads: ZMQbg" in left
    assert "@warmfront-leak-check" in left
    assert left_since(before) == []


def test_sees_shared_memory_by_name() -> None:
    before = snapshot()
    path = f"/dev/shm/warmfront-test-{os.getpid()}"
    open(path, "w").close()
    left = left_since(before)
    os.unlink(path)
    assert left == [f"shared_memory: {os.path.basename(path)} (x1)"]
