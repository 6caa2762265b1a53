"""The command line: what it prints and how it ends.  pytest tests/integration/test_cli.py"""

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.integration.command import WARMFRONT, Outcome, prepack, run, run_anew
from warmfront.shared.config import DTYPES

pytestmark = pytest.mark.usefixtures("compiled")


@pytest.fixture
def model(tiny_llama: Callable[..., Path]) -> Path:
    return prepack(tiny_llama(hidden_act="relu"))


def succeeded(outcome: Outcome) -> Outcome:
    assert outcome.code == 0, outcome
    return outcome


def answer(model: Path, *args: str) -> dict[str, Any]:
    """The object that `generate --json` prints."""
    outcome = succeeded(run("generate", "-m", model, "--json", *args))
    assert outcome.out.count("\n") == 1
    found: dict[str, Any] = json.loads(outcome.out)
    return found


@pytest.mark.parametrize("args", [["--help"], ["-h"], ["generate", "--help"], ["--version"]], ids=" ".join)
def test_help_comes_at_once(args: list[str]) -> None:
    times = []
    for _ in range(3):
        start = time.monotonic()
        outcome = succeeded(run_anew(*args))
        times.append(time.monotonic() - start)
        assert outcome.err == ""
        assert "warmfront, version 0." in outcome.out if "--version" in args else "Usage: warmfront" in outcome.out
    assert min(times) < 0.5


def test_help_names_what_there_is() -> None:
    outcome = run("--help")
    for command in ("generate", "chat", "info", "pull", "models"):
        assert f"\n  {command} " in outcome.out
    options = run("generate", "--help").out
    for option in (*DTYPES, "--workers", "--vram-budget", "--ctx", "--seed", "--stop", "--prompt-ids", "--json"):
        assert option in options


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion(shell: str) -> None:
    """The script that click makes for the shell, which asks the command itself."""

    def ask(what: str, words: str = "", word: str = "") -> str:
        environment = {"_WARMFRONT_COMPLETE": f"{shell}_{what}", "COMP_WORDS": words, "COMP_CWORD": word}
        return succeeded(run(env=os.environ | environment)).out

    script = ask("source")
    assert f"_WARMFRONT_COMPLETE={shell}_complete" in script
    if shutil.which(shell):
        subprocess.run([shell, "-n"], input=script, text=True, check=True, timeout=60)
    # bash and zsh count words, fish gives the one that is being typed.
    commands = ask("complete", "warmfront ge", "ge" if shell == "fish" else "1")
    assert "generate" in commands
    assert "chat" not in commands
    options = ask("complete", "warmfront generate --log", "--log" if shell == "fish" else "2")
    assert "--logprobs" in options
    types = ask("complete", "warmfront generate --dtype q", "q" if shell == "fish" else "3")
    assert "q8" in types
    files = ask("complete", "warmfront generate -m x", "x" if shell == "fish" else "3")
    assert "file" in files


def test_generate_prints_the_text_alone(model: Path) -> None:
    text = answer(model, "-p", "The sea", "-n", "12")["text"]
    assert text
    outcome = succeeded(run_anew("generate", "-m", model, "-p", "The sea", "-n", "12"))
    assert outcome.out == f"{text}\n"
    assert outcome.err == ""


def test_json(model: Path) -> None:
    found = answer(model, "--prompt-ids", "5,17,200", "-n", "12", "--workers", "1", "--selector", "exact")
    assert found["prompt_ids"] == [5, 17, 200]
    assert len(found["token_ids"]) <= 12
    assert all(type(token) is int for token in found["token_ids"])
    assert type(found["text"]) is str
    for name in ("load_s", "prefill_tps", "decode_tps"):
        assert found[name] > 0
    assert 0 < found["active_fraction"] < 1
    assert (found["selector"], found["dtype"], found["model"]) == ("exact", "auto", str(model))
    (worker,) = found["workers"]
    assert (worker["name"], worker["device"], worker["groups"]) == ("cpu0", "cpu", 6)
    assert worker["busy_s"] > 0
    assert worker["neurons"] > 0
    assert worker["bytes"] > 0
    assert found["selection"] is None  # nothing is predicted
    assert set(worker) == {"name", "device", "pid", "busy_s", "neurons", "bytes", "groups", "jobs", "nodes"}


def test_text_and_ids_are_the_same_prompt(model: Path) -> None:
    text = answer(model, "-p", "The lighthouse", "-n", "8")
    ids = ",".join(map(str, text["prompt_ids"]))
    assert answer(model, "--prompt-ids", ids, "-n", "8")["token_ids"] == text["token_ids"]


def test_stats_name_every_worker(model: Path) -> None:
    outcome = succeeded(run_anew("generate", "-m", model, "-p", "The sea", "-n", "9", "--stats", "--gpu", "host"))
    rates, selector, *workers = outcome.err.splitlines()
    assert "tok/s" in rates
    assert "prefill" in rates
    assert "decode" in rates
    assert selector.startswith("selector exact · ")
    assert [line.split()[0] for line in workers] == ["cpu0", "gpu0"]
    assert "emulated" in workers[1]


def test_dtypes_of_one_model_are_kept_apart(model: Path) -> None:
    found = {}
    for dtype in ("auto", "f32", "q4"):
        found[dtype] = answer(prepack(model, dtype), "-p", "The sea", "-n", "24", "--dtype", dtype)
        assert found[dtype]["dtype"] == dtype
    assert found["auto"]["token_ids"] == found["f32"]["token_ids"]  # the folder is float32
    assert found["auto"]["token_ids"] != found["q4"]["token_ids"]


@pytest.mark.slow
class TestStop:
    """Stop strings, with a model that writes text."""

    PROMPT = ("-p", "The capital of France is", "-n", "24")

    def test_the_text_ends_before_it(self, smollm2: Path) -> None:
        whole = answer(smollm2, *self.PROMPT)
        middle = len(whole["text"]) // 2
        stop = whole["text"][middle : middle + 12]
        cut = answer(smollm2, *self.PROMPT, "--stop", "never said", "--stop", stop)
        assert cut["text"] == whole["text"].partition(stop)[0]
        assert cut["token_ids"] == whole["token_ids"][: len(cut["token_ids"])]
        assert len(cut["token_ids"]) < len(whole["token_ids"])

    def test_what_only_begins_like_it_comes_out_once(self, smollm2: Path) -> None:
        whole = answer(smollm2, *self.PROMPT)
        held = whole["text"][-5:]
        same = answer(smollm2, *self.PROMPT, "--stop", f"{held}that never comes")
        assert (same["text"], same["token_ids"]) == (whole["text"], whole["token_ids"])


@pytest.fixture
def mute(model: Path, tmp_path: Path) -> Path:
    """The model without its tokenizer."""
    shutil.copytree(model, tmp_path / "mute", ignore=shutil.ignore_patterns("tokenizer*"))
    return prepack(tmp_path / "mute")


def test_without_a_tokenizer_ids_go_in_and_come_out(mute: Path) -> None:
    found = answer(mute, "--prompt-ids", "5,17,200", "-n", "12")
    assert found["text"] == ""
    assert len(found["token_ids"]) == 12  # nothing says which token ends an answer


def test_the_context_bounds_the_answer(mute: Path) -> None:
    assert len(answer(mute, "--prompt-ids", "5,17,200", "-n", "99", "--ctx", "4")["token_ids"]) == 1
    assert len(answer(mute, "--prompt-ids", "5,17,200", "-n", "99", "--ctx", "40")["token_ids"]) == 37


def test_info(model: Path) -> None:
    found = json.loads(succeeded(run("info", model, "--json")).out)
    assert (found["layers"], found["hidden"], found["ffn"], found["vocab"]) == (2, 64, 96, 300)
    assert found["sparse"]
    assert found["selectors"] == ["exact", "lowbit", "all", "core", "core|lowbit"]
    assert found["bytes"]["feed-forward"] == 2 * 96 * 3 * 64 * 4
    text = succeeded(run_anew("info", model, "--dtype", "q4")).out
    assert "relu" in text
    assert "q4" in text


def test_info_writes_nothing(model: Path, tmp_path: Path) -> None:
    succeeded(run("info", model, env=os.environ | {"XDG_CACHE_HOME": os.fspath(tmp_path)}))
    assert list(tmp_path.iterdir()) == []


def test_reader_that_leaves_early(model: Path) -> None:
    command = [WARMFRONT, "generate", "-m", model, "-p", "The sea", "-n", "400"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.read(1)
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait(10) == 1


def test_full_disk_behind_stdout(model: Path) -> None:
    with open("/dev/full", "w") as full:
        command = [WARMFRONT, "generate", "-m", model, "-p", "The sea", "-n", "4"]
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, timeout=60, check=False)
    assert done.returncode == 1
    assert done.stderr.startswith("warmfront: ")
    assert "No space left" in done.stderr
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("closed", [0, 1, 2])
def test_a_standard_stream_is_closed(model: Path, closed: int) -> None:
    args = [WARMFRONT, "generate", "-m", os.fspath(model), "-p", "The sea", "-n", "4"]
    code = f"import os; os.close({closed}); os.execv({WARMFRONT!r}, {args!r})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done
    assert done.stderr == ""


def test_workers_are_not_for_users() -> None:
    command = [sys.executable, "-m", "warmfront.cpu_worker"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2
    assert "run `warmfront` instead" in done.stderr
