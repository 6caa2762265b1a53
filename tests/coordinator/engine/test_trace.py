"""The trace of a run: valid JSON, whole or not there, of bounded memory.

Run: pytest tests/coordinator/engine/test_trace.py
"""

import json
import os
import stat
import threading
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from warmfront.coordinator.balancing.flow import Transfer
from warmfront.coordinator.engine.trace import Trace
from warmfront.shared.errors import ResourceError

LAYERS, WORKERS = 3, {"cpu0": 11, "gpu0": 12}
TRANSFER = Transfer(worker=1, groups=5, began=2_000, ended=4_000)


def note(trace: Trace, job: int, tokens: int = 1) -> None:
    """A job that began at `job` ms; each of its steps takes 1 us, each layer 10 us."""
    began = job * 1_000_000 + 10_000 * np.arange(LAYERS)
    times = began[:, None] + 1_000 * np.arange(7)
    spans = began[:, None, None] + np.array([[4_500, 5_500], [4_600, 5_600]])
    trace.note(job, tokens, times, spans)


def written(path: Path, jobs: int) -> None:
    trace = Trace(path)
    for job in range(jobs):
        note(trace, job)
    trace.close(WORKERS, [TRANSFER])


def events(text: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(text)["traceEvents"]
    return found


def test_events(tmp_path: Path) -> None:
    path = tmp_path / "trace.json"
    written(path, 2)
    found = events(path.read_text())
    assert [event["args"]["name"] for event in found if event["ph"] == "M"] == ["coordinator", "cpu0", "gpu0"]
    spans = [event for event in found if event["ph"] == "X"]
    assert len(spans) == 1 + 2 * LAYERS * (5 + 2 + 2)
    attention = [event for event in spans if event["name"] == "attention"]
    # In us since the first job began.
    assert [event["ts"] for event in attention] == [1, 11, 21, 1001, 1011, 1021]
    assert {event["dur"] for event in attention} == {1}
    assert [event["args"] for event in attention[-2:]] == [
        {"layer": 1, "position": 1, "tokens": 1},
        {"layer": 2, "position": 1, "tokens": 1},
    ]
    (move,) = (event for event in spans if event["name"] == "move")
    assert (move["pid"], move["ts"], move["dur"]) == (12, 2, 2)
    gpu = [event for event in spans if event["pid"] == 12 and event["name"] == "feed-forward"]
    assert [round(event["ts"], 3) for event in gpu[:2]] == [4.6, 14.6]
    assert os.listdir(tmp_path) == ["trace.json"]


def test_without_a_job_the_file_stays_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "trace.json"
    written(path, 0)
    assert os.listdir(tmp_path) == []
    path.write_text("precious")
    written(path, 0)
    assert path.read_text() == "precious"


def test_it_is_replaced_at_the_end_only(tmp_path: Path) -> None:
    path = tmp_path / "trace.json"
    path.write_text("precious")
    trace = Trace(path)
    note(trace, 0)
    assert path.read_text() == "precious"
    assert os.listdir(tmp_path) == ["trace.json"]
    trace.close(WORKERS, [])
    assert len(events(path.read_text())) == 3 + LAYERS * 9


@pytest.mark.parametrize("there", [True, False])
def test_a_link_is_followed(tmp_path: Path, there: bool) -> None:
    (tmp_path / "real").mkdir()
    target, link = tmp_path / "real" / "trace.json", tmp_path / "link.json"
    if there:
        target.write_text("precious")
    link.symlink_to(target)
    written(link, 0)
    assert not there or target.read_text() == "precious"
    written(link, 1)
    assert link.is_symlink()
    assert len(events(target.read_text())) > 3


@pytest.mark.parametrize("jobs", [0, 2])
def test_a_pipe_is_written_through(tmp_path: Path, jobs: int) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    got: list[str] = []
    reader = threading.Thread(target=lambda: got.append(pipe.read_text()))
    reader.start()
    written(pipe, jobs)
    reader.join()
    assert got[0] == "" if jobs == 0 else len(events(got[0])) > 3
    assert stat.S_ISFIFO(pipe.stat().st_mode)


@pytest.mark.parametrize(
    ("prepare", "words"),
    [
        (lambda path: path.mkdir(), "Is a directory"),
        (lambda path: path.symlink_to(path), "Too many levels of symbolic links"),
        (lambda path: path.symlink_to("no/such/folder"), "No such file or directory"),
    ],
    ids=["folder", "loop", "nowhere"],
)
def test_what_cannot_be_written_is_said_before_the_run(
    tmp_path: Path, prepare: Callable[[Path], object], words: str
) -> None:
    path = tmp_path / "trace.json"
    prepare(path)
    with pytest.raises(ResourceError, match=f"cannot write the trace {path}: {words}"):
        Trace(path)


def test_a_file_that_may_not_be_written_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "trace.json").touch()
    monkeypatch.setattr(os, "access", lambda _path, mode: not mode & os.W_OK)  # root may
    with pytest.raises(ResourceError, match="the file is read-only"):
        Trace(tmp_path / "trace.json")


def test_the_file_that_the_output_goes_to_is_refused(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    output = Path("/dev/stdout")
    assert stat.S_ISREG(output.stat().st_mode)  # pytest's
    with pytest.raises(ResourceError, match="the output goes there"):
        Trace(output)


def test_a_full_disk_ends_the_run_with_a_line(tmp_path: Path) -> None:
    trace = Trace(Path("/dev/full"))
    note(trace, 0)
    with pytest.raises(ResourceError, match="cannot write the trace /dev/full: No space left on device"):
        trace.close(WORKERS, [])


def test_memory_is_bounded(tmp_path: Path) -> None:
    trace = Trace(tmp_path / "trace.json")
    note(trace, 0)
    tracemalloc.start()
    try:
        for job in range(1, 500):
            note(trace, job)
        trace.close(WORKERS, [])
        assert tracemalloc.get_traced_memory()[1] < 200_000  # all of the jobs are 600 kB
    finally:
        tracemalloc.stop()
    assert len(events((tmp_path / "trace.json").read_text())) == 3 + 500 * LAYERS * 9
