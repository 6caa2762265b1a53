"""How engines take turns, what peers are asked, what is reported.  pytest tests/scripts/test_compare_peers.py"""

import contextlib
import importlib
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

SCRIPTS = Path(__file__).parents[2] / "scripts"
# Notes its arguments; answers 100 tok/s for prefill, 10 for decode at the first length, 11 at the second.
BENCH = """#!{python}
import json, sys
arguments = sys.argv[1:]
open({log!r}, "a").write(" ".join(arguments) + "\\n")
prefill = arguments[arguments.index("-p") + 1] != "0"
lengths = arguments[arguments.index("-d") + 1].split(",") if "-d" in arguments else ["-gp"] * arguments.count("-gp")
rates = [100.0] if prefill else [10.0 + i for i in range(len(lengths))]
print(json.dumps([{{"avg_ts": rate}} for rate in rates]))
"""
POWERINFER = """#!{python}
import sys
options = dict(zip(sys.argv[1::2], sys.argv[2::2]))
text, tokens = options["-p"], int(options["-n"])
ids = [1, *(int(word) for word in text.split("▁w")[1:])]
print(*(f"{{token:6d}} -> 'x'" for token in ids), sep="\\n", file=sys.stderr)
for phase, rate in (("prompt eval", 50.5), ("eval", tokens)):
    print(f"timings: {{phase}} time = 1 ms / 1 runs (1 ms, {{rate}} tokens per second)", file=sys.stderr)
"""


class Meter:
    """A memory bandwidth without measuring."""

    def __init__(self, _cpus: list[int]) -> None:
        pass

    def measure(self) -> float:
        return 10.0


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The script as a module, without waiting for a quiet machine."""
    monkeypatch.syspath_prepend(SCRIPTS)
    module = importlib.import_module("compare_peers")
    monkeypatch.setattr(module, "PATIENCE_S", 0.0)
    monkeypatch.setattr(module, "Bandwidth", Meter)
    for variable in module.PROGRAMS.values():
        monkeypatch.delenv(variable, raising=False)
    return module


def task_of(script: ModuleType) -> Any:
    return script.Task(2, 64, 512, (16, 4000))


def contender(script: ModuleType, name: str, decode: float, skip_at: int = -1, ours: bool = False) -> Any:
    """Decodes `decode` tok/s; cannot take turn `skip_at`, 0 = cannot be loaded."""

    @contextlib.contextmanager
    def load(own: Any) -> Iterator[Any]:
        def turn(task: Any) -> Any:
            if len(own.samples) + 1 == skip_at:
                raise script.Skip("no such engine")
            return task.rates(2 * decode, [decode, decode / 2])

        if skip_at == 0:
            raise script.Skip("no such engine")
        yield turn

    return script.Contender(name, load, ours)


def executable(path: Path, text: str, **values: Any) -> str:
    path.write_text(text.format(python=sys.executable, **values), encoding="utf-8")
    path.chmod(0o755)
    return str(path)


def test_engines_take_turns(script: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    ours, peer = contender(script, "warmfront x", 30.0, ours=True), contender(script, "peer", 10.0)
    ours.bytes_per_token = 250_000_000
    absent, failing = contender(script, "absent", 1.0, 0), contender(script, "failing", 1.0, 2)
    left, others = script.compare([ours, absent, failing, peer], 3, task_of(script))
    assert left == [ours, peer]
    assert len(ours.samples) == len(peer.samples) == 3
    assert len(others) == 3 + 3 + 1
    assert ours.bandwidth == [10.0] * 3
    said = capsys.readouterr().out
    assert "absent skipped: no such engine" in said
    assert "failing skipped: no such engine" in said
    found = script.report(left, others)
    assert found["ratios"] == {"warmfront x": {"peer": {"prefill 512": 3.0, "decode @16": 3.0, "decode @4000": 3.0}}}
    assert found["engines"]["warmfront x"]["decode @16"] == {"median": 30.0, "min": 30.0, "max": 30.0}
    assert found["engines"]["warmfront x"]["share"] == 0.75
    assert "x / peer" in capsys.readouterr().out


@pytest.mark.parametrize("peer", ["llama.cpp", "ik_llama.cpp"])
def test_llama_bench_is_asked(script: ModuleType, peer: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = tmp_path / "log"
    monkeypatch.setenv(script.PROGRAMS[peer], executable(tmp_path / "bench", BENCH, log=str(log)))
    task = task_of(script)
    with script.llama_bench(peer, tmp_path / "model.gguf", "1", task, None) as turn:
        assert turn(task) == {"prefill 512": 100.0, "decode @16": 10.0, "decode @4000": 11.0}
    prefill, decode = log.read_text().splitlines()[1:]
    both = f"-m {tmp_path / 'model.gguf'} -t 2 -fa 1 -r 1 -o json" + " -rtr 1" * (peer == "ik_llama.cpp")
    assert prefill == f"{both} -p 512 -n 0"
    behind = "-n 0 -gp 16,64 -gp 4000,64" if peer == "ik_llama.cpp" else "-n 64 -d 16,4000"
    assert decode == f"{both} -p 0 {behind}"


def test_powerinfer_is_asked(script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WARMFRONT_POWERINFER", executable(tmp_path / "main", POWERINFER))
    task = task_of(script)
    with script.powerinfer(tmp_path / "model.gguf", task, None) as turn:
        assert turn(task) == {"prefill 512": 50.5, "decode @16": 65.0, "decode @4000": 65.0}


def test_missing_peers_are_named(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WARMFRONT_LLAMA_CPP", str(tmp_path / "nothing"))
    monkeypatch.setenv(
        "WARMFRONT_IK_LLAMA_CPP", executable(tmp_path / "fails", "#!/bin/sh\necho error: bad >&2\nexit 3\n")
    )
    wish = script.argparse.Namespace(
        rows=["f16"], selectors=["all"], peers=list(script.PROGRAMS), flash_attention=["0", "1"]
    )
    rows = script.rows_of(tmp_path, task_of(script), wish)
    names = [one.name for one in rows["f16"]]
    assert names[0] == "warmfront f16 all"
    assert names[1:] == [f"{peer} f16{flash}" for peer in ("llama.cpp", "ik_llama.cpp") for flash in ("", " flash")] + [
        "PowerInfer f16"
    ]
    left, _ = script.compare(rows["f16"][1:], 1, task_of(script))
    assert left == []
    said = capsys.readouterr().out
    assert f"llama.cpp f16 skipped: WARMFRONT_LLAMA_CPP={tmp_path / 'nothing'} cannot be run" in said
    assert "ik_llama.cpp f16 flash skipped: error: bad" in said
    assert "PowerInfer f16 skipped: WARMFRONT_POWERINFER is not set to the path of its program" in said


def test_ours_takes_a_turn(script: ModuleType, smollm2: Path) -> None:
    task = script.Task(2, 4, 40, (8, 24))
    ours = script.Contender("ours", lambda own: script.warmfront(smollm2, "auto", "auto", task, own), ours=True)
    left, _ = script.compare([ours], 1, task)
    assert left == [ours]
    assert list(ours.samples[0]) == ["prefill 40", "decode @8", "decode @24"]
    assert min(ours.samples[0].values()) > 0
    assert 5e7 < ours.bytes_per_token < 2e8  # the file has 89 MB


@pytest.mark.parametrize("option", ["--rows=q5", "--peers=ollama", "--selectors=most", "--contexts=16,x", "--rounds=0"])
def test_wrong_options(option: str) -> None:
    command = [sys.executable, SCRIPTS / "compare_peers.py", "nowhere", option]
    done = subprocess.run(command, capture_output=True, encoding="utf-8")
    assert done.returncode == 2
    assert "error: " in done.stderr.splitlines()[-1]
    assert not json.loads(done.stdout or "0")
