"""A slice of the soak of the server, with workers killed.  pytest tests/integration/test_soak_server.py"""

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "scripts" / "soak_server.py"
pytest.importorskip("uvicorn")
pytestmark = pytest.mark.usefixtures("compiled")


def test_no_answer_is_lost(smollm2: Path) -> None:
    options = ["--requests", "20", "--clients", "5", "--kill-every", "0.3", "--most-kills", "2", "--seed", "23"]
    run = subprocess.run([sys.executable, SCRIPT, "-m", smollm2, *options], capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    found = json.loads(run.stdout)
    assert found["lost"] == 0
    assert found["whole"] + found["vanished"] == found["requests"] == 20
    assert found["vanished"] > 0
    # Faster than one is replaced: the second waits for the first.
    assert found["kills"] == found["replaced"] == 2
    assert "no answer within --kill-every 0.3 s" in run.stderr
    assert [part["at"] for part in found["memory"]] == [0.05, 0.25, 0.5, 0.75, 1.0]
