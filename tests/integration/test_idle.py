"""A chat that waits for its user costs next to nothing.  pytest tests/integration/test_idle.py"""

import os
import time
from pathlib import Path

import pytest

from tests.integration.command import MARK, WARMFRONT, marked
from tests.integration.terminal import CTRL_D, Terminal

SECONDS = 3.0
MOST = 0.02  # of one core


def cpu_seconds(pids: list[int]) -> float:
    """User and system time of these processes so far."""
    ticks = 0
    for pid in pids:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        ticks += int(fields[11]) + int(fields[12])
    return ticks / os.sysconf("SC_CLK_TCK")


@pytest.mark.slow
@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize("gpu", ["none", "host"])
def test_idle_chat(smollm2: Path, monkeypatch: pytest.MonkeyPatch, gpu: str) -> None:
    monkeypatch.setenv(MARK, f"idle-{os.getpid()}-{gpu}")
    with Terminal([WARMFRONT, "chat", "-m", os.fspath(smollm2), "--gpu", gpu]) as terminal:
        terminal.read_until("> ")
        terminal.press("Hello!\n")
        terminal.read_until("> ")
        time.sleep(1.0)  # past the waiters' patience, and what the answer left to do
        pids = list(marked(os.environ[MARK]))
        assert len(pids) == (3 if gpu == "host" else 2)
        before = cpu_seconds(pids)
        time.sleep(SECONDS)
        used = (cpu_seconds(pids) - before) / SECONDS
        terminal.press(CTRL_D)
        assert terminal.wait() == 0
    assert used < MOST, f"an idle chat uses {used:.1%} of a core"
