"""Names of the hub on the command line, with a hub on loopback.  pytest tests/integration/test_hub.py"""

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.coordinator.models.hub.fake_hub import FakeHub, serving
from tests.integration.command import WARMFRONT, Outcome, assert_refused, run
from tests.integration.terminal import CTRL_C, Terminal

Make = Callable[..., Path]
BIG = bytes(range(256)) * (25 << 12)


@pytest.fixture
def hub() -> Iterator[FakeHub]:
    with serving(FakeHub()) as fake:
        yield fake


@pytest.fixture
def environment(hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """For commands: the fake hub, and a cache of the hub that is empty."""
    for name in ("HF_TOKEN", "HF_HUB_OFFLINE", "HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_ENDPOINT", hub.url)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    return dict(os.environ)


def listed(outcome: Outcome) -> dict[str, dict[str, Any]]:
    """The objects that `models --json` prints, by name."""
    assert (outcome.code, outcome.err) == (0, ""), outcome
    return {row["name"]: row for row in json.loads(outcome.out)["models"]}


@pytest.mark.usefixtures("compiled", "environment")
def test_a_folder_from_its_name_to_its_text(hub: FakeHub, tiny_llama: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same text as from the folder itself; the second start asks nobody, and works offline."""
    folder = tiny_llama(hidden_act="relu")
    hub.put("org/tiny", {file.name: file.read_bytes() for file in folder.iterdir()})
    options = ("-p", "The sea", "-n", "12")
    expected = run("generate", "-m", folder, *options)
    first = run("generate", "-m", "org/tiny", *options)
    assert (first.code, first.out) == (0, expected.out), first
    assert first.err.startswith("fetching org/tiny (")
    assert set(first.err.splitlines()[1:]) <= {"profiling which neurons fire (first load only)"}
    hub.asked.clear()
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert run("generate", "-m", "org/tiny", *options) == Outcome(0, expected.out, "")
    assert hub.asked == []
    assert_refused(run("info", "org/other"), 1, "org/other is not in the cache", "HF_HUB_OFFLINE")
    assert json.loads(run("info", "org/tiny", "--json").out)["model"] == "tiny"
    row = listed(run("models", "--json"))["org/tiny"]
    assert (row["files"], row["family"], row["complete"]) == (len(list(folder.iterdir())), "llama", True)
    assert row["nbytes"] == sum(file.stat().st_size for file in folder.iterdir())
    assert "auto" in row["packed"]  # and what other tests have packed of a model with the same bytes


@pytest.mark.usefixtures("environment")
def test_pull(hub: FakeHub, tiny_gguf: Make, tmp_path: Path) -> None:
    hub.put("org/tiny-GGUF", {"tiny-F16.gguf": tiny_gguf().read_bytes(), "tiny-Q4_0.gguf": b"", "x.gguf": b""})
    outcome = run("pull", "org/tiny-GGUF:f16")
    assert outcome.code == 0, outcome
    (path,) = tmp_path.glob("hf/hub/models--*/snapshots/*/*")
    assert f"org/tiny-GGUF:f16 (1 file, {path.stat().st_size / 1e6:.1f} MB) is in {path}; " in outcome.out
    assert outcome.err.startswith("fetching org/tiny-GGUF:f16 (1 file, ")
    assert outcome.err.count("\n") == 1
    again = run("pull", "org/tiny-GGUF:f16")
    assert (again.code, again.err) == (0, "")
    assert "is up to date in" in again.out
    row = listed(run("models", "--json"))["org/tiny-GGUF:tiny-F16.gguf"]
    assert (row["path"], row["family"], row["packed"]) == (str(path), "llama", {})
    assert "org/tiny-GGUF:tiny-F16.gguf" in run("models").out
    assert_refused(run("pull", "org/none"), 1, "org/none is neither a file or folder here nor a repository")
    assert_refused(run("pull", "org/tiny-GGUF:Q2_K"), 1, "no GGUF file Q2_K; there are tiny-F16.gguf, tiny-Q4_0.gguf")
    assert_refused(run("pull", str(tmp_path)), 2, "is a path, there is nothing to fetch")


def test_ctrl_c_leaves_what_has_come(hub: FakeHub, environment: dict[str, str], tmp_path: Path) -> None:
    hub.put("org/big", {"big.gguf": BIG})
    hub.stall_at = 12 << 20
    process = subprocess.Popen([WARMFRONT, "pull", "org/big"], env=environment, stderr=subprocess.PIPE, text=True)
    assert hub.stalled.wait(30)
    (partial,) = tmp_path.glob("hf/hub/models--org--big/blobs/*")
    deadline = time.monotonic() + 30
    while partial.stat().st_size < (size := 10 << 20) and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=10)
    assert process.returncode == 130
    line, *rest = err.splitlines()
    assert line.startswith("fetching org/big (1 file, 26.2 MB) into ")
    assert rest == [""]
    assert partial.stat().st_size == size
    hub.go_on.set()
    assert run("pull", "org/big").code == 0
    assert hub.ranges() == [None, f"bytes={size}-"]
    (path,) = tmp_path.glob("hf/hub/models--org--big/snapshots/*/big.gguf")
    assert path.read_bytes() == BIG


def test_a_bar_on_a_terminal(hub: FakeHub, environment: dict[str, str]) -> None:
    hub.put("org/big", {"big.gguf": BIG})
    hub.stall_at = 12 << 20
    with Terminal([WARMFRONT, "pull", "org/big"]) as terminal:
        shown = terminal.read_until("10 of 26 MB")
        assert f"fetching [{'#' * 12}{'.' * 18}] 10 of 26 MB" in shown
        terminal.press(CTRL_C)
        assert terminal.wait() == 130
    assert "Traceback" not in terminal.text
    assert terminal.text.rstrip().endswith("10 of 26 MB^C")  # and then it is wiped
