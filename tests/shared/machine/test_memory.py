"""Private and shared memory of the hot path.  pytest tests/shared/machine/test_memory.py"""

import fcntl
import os
import resource
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.leak_check import LASTING_SHM
from warmfront.shared.errors import ResourceError
from warmfront.shared.machine.memory import address, anonymous, collapse, create_shared, map_shared

MB = 1 << 20


def status(field: str) -> int:
    """VmSize, VmRSS... of this process in bytes."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field + ":"))
    return int(line.split()[1]) * 1024


def test_address() -> None:
    array = np.arange(10, dtype=np.float32)
    assert address(array[3:]) == address(array) + 12 == array.ctypes.data + 12


@pytest.mark.parametrize("size", [1, 4096, 2 * MB, 5 * MB + 3])
def test_anonymous_is_zero_and_starts_a_huge_page(size: int) -> None:
    memory = anonymous(size)
    assert memory.shape == (size,)
    assert memory.dtype == np.uint8
    assert address(memory) % (2 * MB) == 0
    assert not memory.any()
    memory[:] = 7
    assert memory[-1] == 7


def test_anonymous_memory_is_backed_where_touched_and_goes_with_its_last_view() -> None:
    size_before, resident_before = status("VmSize"), status("VmRSS")
    memory = anonymous(1024 * MB)
    memory[512 * MB] = 1
    assert status("VmSize") - size_before > 1000 * MB
    assert status("VmRSS") - resident_before < 64 * MB
    view = memory[512 * MB : 512 * MB + 1]
    del memory
    assert view[0] == 1
    del view
    assert status("VmSize") - size_before < 1000 * MB


@pytest.mark.parametrize("size", [1 << 60, 1 << 80])
def test_more_than_there_is(size: int) -> None:
    with pytest.raises(ResourceError, match=r"^cannot reserve [\d.]+ GB of memory: [^\n]+$"):
        anonymous(size)


def test_huge_pages_hold_what_is_written() -> None:
    memory = anonymous(5 * MB + 3, huge=True)
    assert not memory.any()
    memory[:] = 7
    assert (memory == 7).all()


@pytest.mark.parametrize("offset", [0, 1, 4096])
def test_collapse_changes_nothing(offset: int) -> None:
    """Whatever the kernel answers, also where the array contains no whole huge page."""
    memory = anonymous(7 * MB)
    memory[:] = np.arange(7 * MB) % 251
    before = memory.copy()
    for end in (offset + 10, 7 * MB):
        collapse(memory[offset:end])
        np.testing.assert_array_equal(memory, before)


def test_shared_memory_has_no_name_and_its_exact_size() -> None:
    in_shm = set(os.listdir("/dev/shm"))
    fd = create_shared("warmfront-test", 3 * MB + 5)
    try:
        assert os.readlink(f"/proc/self/fd/{fd}") == "/memfd:warmfront-test (deleted)"
        # torch's, in a test beside this one, aside.
        assert not {name for name in os.listdir("/dev/shm") if not name.startswith(LASTING_SHM)} - in_shm
        assert os.fstat(fd).st_size == 3 * MB + 5
        # Really allocated: no SIGBUS later.
        assert os.fstat(fd).st_blocks * 512 >= 3 * MB + 5
        assert fcntl.fcntl(fd, fcntl.F_GETFD) == fcntl.FD_CLOEXEC
        assert not map_shared(fd).any()
    finally:
        os.close(fd)


def test_shared_memory_is_shared_with_a_process_and_survives_its_descriptor() -> None:
    fd = create_shared("warmfront-test", 10_000)
    first, second = map_shared(fd), map_shared(fd)
    first[9_999] = 5
    code = (
        "import sys\n"
        "from warmfront.shared.machine.memory import map_shared\n"
        "memory = map_shared(int(sys.argv[1]))\n"
        "memory[0] = memory[9_999] + memory.size % 251\n"
    )
    try:
        subprocess.run([sys.executable, "-c", code, str(fd)], pass_fds=[fd], check=True)
    finally:
        os.close(fd)
    assert first.shape == (10_000,)
    assert address(first) != address(second)
    assert first[0] == second[0] == 5 + 10_000 % 251


def test_no_room_for_shared_memory() -> None:
    """Refused with a message, and no descriptor stays open (`no_leaks` would see it)."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = os.listdir("/proc/self/fd")
    resource.setrlimit(resource.RLIMIT_FSIZE, (MB, limits[1]))
    try:
        with pytest.raises(ResourceError, match=r"^no room for 4\.2 MB of shared memory: File too large$"):
            create_shared("warmfront-test", 4 * MB)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert os.listdir("/proc/self/fd") == before
