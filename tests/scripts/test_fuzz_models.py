"""A slice of the fuzzing of model files, and that it can fail.  pytest tests/scripts/test_fuzz_models.py"""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

SCRIPT = Path(__file__).parents[2] / "scripts" / "fuzz_models.py"
WHOLE = """
import random, tempfile
from pathlib import Path
from fuzzing.gguf_files import make_gguf
from fuzzing.hf_folders import make_folder
from fuzzing.trial import attempt

for number in range(8):
    rng = random.Random(number)
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "model"
        if number % 2:
            path.mkdir()
            for name, content in make_folder(rng).items():
                (path / name).write_bytes(content)
        else:
            path.write_bytes(make_gguf(rng).written())
        print(attempt(path, "auto", Path(scratch) / "cache"))
"""
SPOILT = """
import os, signal, sys, warnings
import fuzz_models
from fuzzing import trial

ending = sys.argv.pop()

def read(*_):
    if ending == "noise":
        warnings.warn("more")
        raise trial.WarmfrontError("a line")
    if ending == "memory":
        bytearray(2 << 30)
    os.kill(os.getpid(), signal.SIGSEGV) if ending == "signal" else signal.pause() if ending == "hang" else 1 / 0

trial.ensure_packed, trial.SECONDS = read, 0.3
sys.argv += ["--count", "1"]
fuzz_models.main()
"""
KEPT = """
import os, sys
from pathlib import Path
from fuzz_models import keep

folder = Path(sys.argv[1])
(folder / "in").mkdir()
(folder / "in" / "config.json").write_text("{}")
os.mkfifo(folder / "in" / "tokenizer.json")
keep(folder / "in", folder / "kept")
"""


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, cwd=SCRIPT.parent, check=False, timeout=60
    )


def test_a_slice() -> None:
    done = run(str(SCRIPT), "--count", "60", "--seed", "7")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    assert (done.returncode, found["violations"], done.stderr) == (0, [], "")
    for outcomes in found["outcomes"].values():
        assert sum(outcomes.values()) == 30
        assert outcomes["refused"] > 5
        assert outcomes["packed"] > 1


def test_inputs_are_whole_before_they_are_damaged() -> None:
    done = run("-c", WHOLE)
    assert done.stdout.splitlines() == ["Outcome(kind='packed', said='')"] * 8, done.stderr


def test_violations_are_seen() -> None:
    for ending, outcome in (("noise", "not one line"), ("memory", "memory"), ("signal", "signal 11"), ("hang", "hang")):
        done = run("-c", SPOILT, ending)
        found = json.loads(done.stdout.splitlines()[-1])
        assert [violation["outcome"] for violation in found["violations"]] == [outcome]
        assert done.returncode == 1


def test_inputs_are_kept_without_their_pipes(tmp_path: Path) -> None:
    done = run("-c", KEPT, str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert [path.name for path in (tmp_path / "kept").iterdir()] == ["config.json"]
