"""Watching the warm front: drawn while it moves, in the trace, in the statistics.

pytest tests/integration/test_watch.py
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.integration.command import WARMFRONT, assert_refused, prepack, run
from tests.integration.gpu import Restless, budget_for, watch
from tests.integration.terminal import Terminal
from warmfront.coordinator.engine.engine import Engine

MAKER = Path(__file__).parents[2] / "scripts" / "make_synthetic_model.py"
SHAPE = {"hidden": 256, "layers": 4, "ffn": 1024, "heads": 4, "kv-heads": 2, "vocab": 512, "rank": 31}
BUDGET = budget_for(40, hidden=256, ffn=1024)

pytestmark = pytest.mark.usefixtures("compiled")


@pytest.fixture(scope="module")
def made(compiled: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small synthetic ReLU model with predictors, profiled."""
    folder = tmp_path_factory.mktemp("synthetic") / "model"
    sizes = [f"--{name}={size}" for name, size in SHAPE.items()]
    subprocess.run([sys.executable, MAKER, folder, *sizes, "--formats=hf"], check=True, capture_output=True)
    path = prepack(folder / "hf", "f32")
    Engine.load(str(path), dtype="f32").close()
    return path


def command(model: Path, *more: str) -> list[str]:
    options = ["--dtype=f32", "--gpu=host", f"--vram-budget={BUDGET}", "-n", "40"]
    return [WARMFRONT, "generate", "-m", os.fspath(model), "--prompt-ids=300,301", *options, *more]


def test_watch_draws_and_the_answer_is_printed_whole(made: Path) -> None:
    answer = run(*command(made)[1:]).out
    watching = command(made, "--watch", "--ram-budget=8MB")
    with Terminal(["/usr/bin/env", "TERM=xterm-256color", "COLUMNS=100", "LINES=40", *watching]) as seen:
        assert seen.wait(60) == 0
    text = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", seen.text)
    for part in (
        r"\d+\.\d tok/s · \d+ moves/s",
        "policy balance",
        r"from the disk \d+\.\d MB a token at \d+ MB/s",
        "layer   0 ",
        "layer   3 ",
        r"cpu0 +\d+%",
        r"gpu0 +\d+%",
    ):
        assert re.search(part, text), (part, text)
    assert text.rstrip().endswith(answer.rstrip()[-60:])


def test_watch_without_colours_on_a_narrow_terminal(made: Path) -> None:
    """Workers differ by their marks, and no line is wider than the terminal."""
    settings = ["TERM=xterm-256color", "NO_COLOR=1", "COLUMNS=40", "LINES=24"]
    with Terminal(["/usr/bin/env", *settings, *command(made, "--watch")]) as seen:
        assert seen.wait(60) == 0
    styles = {style for found in re.findall(r"\x1b\[([0-9;]*)m", seen.text) for style in found.split(";")}
    assert styles <= {"", "0", "1", "2"}  # plain, bold, dim
    text = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", seen.text)
    assert re.search(r"layer   0 #+", text)
    assert "=" in text
    drawn = text[: text.rindex("gpu0")]
    assert max(len(line) for line in re.split(r"[\r\n]+", drawn)) <= 40


def test_watch_needs_a_terminal(made: Path) -> None:
    assert_refused(run(*command(made, "--watch")[1:]), 2, "--watch draws on a terminal")


def test_moves_are_in_the_trace(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "trace.json"
    with Engine.load(str(made), dtype="f32", gpu="host", vram_budget=BUDGET, trace=str(file)) as engine:
        filled = sum(transfer.groups for transfer in engine.ownership.transfers)
        watch(engine, Restless(1), monkeypatch)
        engine.decode_ids([300, 301], 50)
        moved, gpu = engine.ownership.flow.moves, engine.statistics.workers()[-1].pid
    events = [event for event in json.loads(file.read_text())["traceEvents"] if event["name"] == "move"]
    assert sum(event["args"]["groups"] for event in events) == filled + moved
    assert moved > 100
    assert {event["pid"] for event in events} == {gpu}
    assert all(event["dur"] > 0 for event in events)


def test_looking_ahead_tells_what_it_missed(made: Path) -> None:
    """A layer's input is much like the one before it, not the same."""
    recalls = []
    for look_ahead in (False, True):
        with Engine.load(str(made), dtype="f32", look_ahead=look_ahead, measure=True, verify=True) as engine:
            engine.decode_ids([300, 301], 130)
            selection = engine.statistics.selection()
            assert selection is not None
            recalls.append(selection.recall)
    plain, ahead = recalls
    assert plain > 0.999
    assert 0.3 < ahead < 0.999
    assert_refused(
        run("generate", "-m", made, "-p", "x", "--look-ahead", "--selector=exact"), 2, "--look-ahead", "exact"
    )
