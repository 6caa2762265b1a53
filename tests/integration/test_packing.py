"""The cache of packed models, filled by two at once or after one that was killed.

pytest tests/integration/test_packing.py
"""

import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.integration.command import WARMFRONT, link_cache

pytestmark = pytest.mark.usefixtures("compiled")


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """An $XDG_CACHE_HOME without packed models."""
    link_cache(tmp_path / "home")
    return tmp_path / "home"


def start(home: Path, model: Path, *args: str) -> "subprocess.Popen[str]":
    command = [WARMFRONT, "generate", "-m", model, "-p", "The sea", "-n", "4", *args]
    streams: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, env=os.environ | {"XDG_CACHE_HOME": os.fspath(home)}, **streams)


def test_two_at_once(home: Path, tiny_llama: Callable[..., Path]) -> None:
    model = tiny_llama(hidden_size=512, intermediate_size=4096, num_hidden_layers=4, hidden_act="relu")
    processes = [start(home, model) for _ in range(2)]
    outcomes = [(process.communicate(timeout=60), process.returncode) for process in processes]
    assert [code for _, code in outcomes] == [0, 0], outcomes
    (first, notes), (second, more_notes) = (streams for streams, _ in outcomes)
    assert first == second
    assert set((notes + more_notes).splitlines()) <= {
        "waiting for another warmfront that is packing a model",
        "profiling which neurons fire (first load only)",
    }
    (packed,) = (home / "warmfront" / "models").iterdir()
    assert packed.suffix == ".safetensors"
    modified = packed.stat().st_mtime_ns
    process = start(home, model)
    assert process.communicate(timeout=60) == (first, "")
    assert packed.stat().st_mtime_ns == modified


@pytest.mark.slow
def test_killed_while_packing(home: Path, smollm2: Path) -> None:
    """A real process and a real model; when it is killed is what the tests of packing go over."""
    models = home / "warmfront" / "models"
    process = start(home, smollm2, "--dtype", "f32")
    with process:
        while not models.exists():
            assert process.poll() is None
            time.sleep(0.001)
        time.sleep(0.1)
        process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    with start(home, smollm2, "--dtype", "f32") as process:
        assert process.communicate(timeout=120)[0]
    assert process.returncode == 0
    assert sorted(path.suffix for path in models.iterdir() if path.suffix != ".json") == [".safetensors"]
