"""The GPU acceptance on the emulated device: what is printed, what fails, what is never written.

pytest tests/scripts/test_gpu_acceptance.py
"""

import json
import os
import re
import subprocess
import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any, NamedTuple

import pytest

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "scripts" / "gpu_acceptance"
MEASUREMENTS = ROOT / "docs" / "gpu-measurements.md"


class Outcome(NamedTuple):
    code: int
    lines: list[str]
    result: dict[str, Any]


def accept(*args: str) -> Outcome:
    environment = {**os.environ, "PYTHON": sys.executable}
    done = subprocess.run([SCRIPT, *args], capture_output=True, text=True, env=environment, timeout=300, check=False)
    assert done.stderr == ""
    *lines, last = done.stdout.splitlines()
    return Outcome(done.returncode, lines, json.loads(last))


@pytest.fixture(autouse=True)
def _untouched() -> Any:
    before = MEASUREMENTS.read_bytes()
    yield
    assert MEASUREMENTS.read_bytes() == before


def test_on_the_emulated_device() -> None:
    """The steps that need a card are skipped by name; the others pass, and every line says that they are emulated."""
    code, lines, result = accept("--gpu", "host", "--steps", "choice,tests,killed,device,handover")
    assert all(line.startswith("emulated on the CPU | ") for line in lines)
    assert {name: found["state"] for name, found in result["steps"].items()} == {
        "environment": "ok",
        "choice": "skipped",
        "tests": "skipped",
        "models": "ok",
        "killed": "ok",
        "device": "ok",
        "handover": "ok",
    }
    assert result["emulated"]
    assert result["steps"]["handover"]["figures"]["job_us"] > 0
    assert any(re.search(r"skipped +tests .* needs a CUDA card", line) for line in lines)
    assert code == 0


def test_a_step_without_time_fails_and_the_others_run() -> None:
    code, _, result = accept("--gpu", "host", "--steps", "handover,device", "--minutes", "0.03")
    states = {name: (found["state"], found.get("reason", "")) for name, found in result["steps"].items()}
    assert list(states) == ["environment", "models", "device", "handover"]
    assert states["handover"] == ("failed", "there are no models")
    assert states["models"][0] == "failed"
    assert re.search("took longer than|no time was left", states["models"][1])
    assert code == 1


@pytest.mark.parametrize("args", [("--gpu", "tpu"), ("--steps", "tokens,magic"), ("--minutes", "soon")])
def test_wrong_requests(args: tuple[str, ...]) -> None:
    environment = {**os.environ, "PYTHON": sys.executable}
    done = subprocess.run([SCRIPT, *args], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 2
    assert args[1].rpartition(",")[2] in done.stderr.splitlines()[-1]


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The script as a module."""
    monkeypatch.syspath_prepend(ROOT / "scripts" / "acceptance")
    spec = spec_from_file_location("acceptance", ROOT / "scripts" / "acceptance" / "__main__.py")
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    for name in ("steps", "model"):
        monkeypatch.delitem(sys.modules, name)
    return module


def test_a_row_of_a_card(script: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Date, card, command, figures and failures become a row of the table at the end of the document."""
    monkeypatch.setattr(script, "MEASUREMENTS", tmp_path / "measured.md")
    results = {
        "environment": {"state": "ok", "figures": {"device": "cuda:0 Made | Up", "cuda": "13000"}},
        "tests": {"state": "failed", "reason": "no"},
        "handover": {"state": "ok", "figures": {"job_us": 12.3456}},
    }
    script.note(results, "scripts/gpu_acceptance --minutes 5")
    row = (tmp_path / "measured.md").read_text()
    assert re.fullmatch(
        r"\| 20\d\d-\d\d-\d\d \d\d:\d\d \| cuda:0 Made / Up \| `scripts/gpu_acceptance --minutes 5` at [\w ]+ "
        r"\| cuda 13000; job_us 12\.35 \| tests \|\n",
        row,
    )
    head = MEASUREMENTS.read_text().splitlines()[-1]
    assert head.startswith("|")
    assert head.count("|") == row.count("|")
