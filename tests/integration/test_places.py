"""Where warmfront runs: few files, closed streams, odd locales, no home, a read-only cache, signals.

pytest tests/integration/test_places.py
"""

import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.integration.command import MARK, WARMFRONT, Outcome, assert_refused, marked, prepack, run, what_it_does
from warmfront.coordinator.hardware.fetching import choices_file
from warmfront.shared.kernels.version import digest
from warmfront.shared.paths import cache_root

IDS = ["--prompt-ids", "40,41", "-n", "4"]


@pytest.fixture(scope="module")
def model(compiled: None, tiny_llama: Callable[..., Path]) -> Path:
    return prepack(tiny_llama(hidden_act="relu"))


@pytest.fixture(scope="module")
def answer(model: Path) -> str:
    """What is printed in an ordinary place."""
    outcome = run("generate", "-m", model, *IDS)
    assert (outcome.code, outcome.err) == (0, "")
    return outcome.out


def shell(command: str, **environment: str) -> Outcome:
    """Run a line of bash, in which $0 is the command."""
    done = subprocess.run(
        ["bash", "-c", command, WARMFRONT],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
        env=os.environ | environment,
    )
    return Outcome(done.returncode, done.stdout, done.stderr)


@pytest.mark.parametrize("files", [5, 12, 16, 50])
def test_too_few_files(model: Path, files: int) -> None:
    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_NOFILE, (files, files))

    outcome = run("generate", "-m", model, *IDS, preexec_fn=limit)
    assert_refused(outcome, 1, f"only {files} files may be open at once, warmfront needs", "ulimit -n")


def test_a_low_soft_limit_of_files_is_raised(model: Path, answer: str) -> None:
    assert shell(f'ulimit -Sn 12; "$0" generate -m {model} {" ".join(IDS)}') == (0, answer, "")


def test_too_few_addresses(model: Path) -> None:
    """OpenBLAS would retry for ever."""
    outcome = shell(f'ulimit -v 640000; "$0" generate -m {model} {" ".join(IDS)}')
    assert_refused(outcome, 1, "only 655360000 bytes of addresses may be used", "ulimit -v")


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
def test_closed_streams(model: Path, answer: str, closed: str) -> None:
    outcome = shell(f'"$0" generate -m {model} {" ".join(IDS)} {closed}')
    assert outcome == (0, "" if " >&-" in f" {closed}" else answer, "")
    assert shell(f'"$0" generate {closed}').code == 2


@pytest.mark.parametrize("locale", ["C", "POSIX"])
def test_a_locale_without_utf_8(model: Path, answer: str, locale: str) -> None:
    options = {"PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "LC_ALL": locale}
    outcome = shell(f'"$0" generate -m {model} {" ".join(IDS)}', **options)
    assert outcome == (0, answer, "")  # where the locale says nothing of letters it is UTF-8
    assert shell(f'"$0" info {model}', **options).code == 0


@pytest.mark.parametrize("options", [["-I"], ["-O"], ["-OO"], ["-W", "error"], ["-X", "dev", "-W", "error"]])
def test_pythons_own_options(model: Path, answer: str, options: list[str]) -> None:
    command = [sys.executable, *options, "-m", "warmfront", "generate", "-m", os.fspath(model), *IDS]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (0, answer, "")


def test_numba_that_compiles_nothing(model: Path) -> None:
    outcome = shell(f'"$0" generate -m {model} {" ".join(IDS)}', NUMBA_DISABLE_JIT="1")
    assert_refused(outcome, 2, "unset NUMBA_DISABLE_JIT")


def test_a_working_directory_that_is_gone(model: Path, tmp_path: Path) -> None:
    (tmp_path / "gone").mkdir()
    outcome = shell(f'cd {tmp_path}/gone; rmdir ../gone; "$0" info {model}')
    assert_refused(outcome, 1, "the working directory is gone")


def test_no_home_at_all(tmp_path: Path) -> None:
    """A command that needs no cache runs without one."""
    environment = {name: value for name, value in os.environ.items() if name not in ("HOME", "XDG_CACHE_HOME")}
    code = "import pwd; pwd.getpwuid = {}.__getitem__; from warmfront.coordinator.cli.main import main; main()"

    def bare(*words: str) -> Outcome:
        command = [sys.executable, "-c", code, *words]
        env = environment | {"TMPDIR": f"{tmp_path}/missing"}
        done = subprocess.run(command, capture_output=True, text=True, env=env)
        return Outcome(done.returncode, done.stdout, done.stderr)

    for words in (["topology", "--no-measure"], ["--help"]):
        outcome = bare(*words)
        assert (outcome.code, outcome.err) == (0, "")
    refusal = bare("generate", "-p", "x")
    assert_refused(refusal, 1, f"{tmp_path}/missing/warmfront-", "cannot be made", "set XDG_CACHE_HOME")


def test_a_damaged_kernel_is_compiled_anew_by_a_worker(model: Path, answer: str, tmp_path: Path) -> None:
    """The copy of a cache in which a worker's kernel lost its end, as after a power cut."""
    (tmp_path / "warmfront").mkdir()
    kernels = tmp_path / "warmfront/kernels" / digest()
    kernels.parent.mkdir()
    shutil.copytree(cache_root() / "kernels" / digest(), kernels)
    kernels.chmod(0o700)
    (tmp_path / "warmfront/models").symlink_to(cache_root() / "models")
    shutil.copy(choices_file(), tmp_path / "warmfront")
    (index,) = kernels.glob("warmfront.shared.kernels.rows.dot.nbi")
    os.truncate(index, 10)
    for file in kernels.glob("warmfront.cpu_worker.executor.serve.*.nbc"):
        os.truncate(file, 10)
    outcome = run("generate", "-m", model, *IDS, timeout=300, env=os.environ | {"XDG_CACHE_HOME": str(tmp_path)})
    assert outcome == (0, answer, "")
    # There is another form where somebody ran with a --ram-budget.
    assert any(file.stat().st_size > 10 for file in kernels.glob("warmfront.cpu_worker.executor.serve.*.nbc"))


@pytest.mark.parametrize("way", ["model", "prompt"])
def test_a_run_that_fails_leaves_an_older_trace(model: Path, tmp_path: Path, way: str) -> None:
    trace = tmp_path / "trace.json"
    trace.write_text("precious")
    options = {
        "model": ["-m", str(model), "--prompt-ids", "1", "--gpu", "host", "--vram-budget", "1"],
        "prompt": ["-m", str(model), "--prompt-ids", "99999"],
    }
    outcome = run("generate", *options[way], "--trace", trace)
    assert outcome.code in (1, 2)
    assert trace.read_text() == "precious"
    assert os.listdir(tmp_path) == ["trace.json"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
@pytest.mark.parametrize("decoding", [False, True], ids=["loading", "decoding"])
def test_a_signal_ends_all(smollm2: Path, compiled: None, tmp_path: Path, number: int, decoding: bool) -> None:
    mark = f"{number}-{decoding}"
    (tmp_path / "temporary").mkdir()
    command = [
        WARMFRONT,
        "generate",
        "-p",
        "The sea",
        "-n",
        "3000",
        "--ctx",
        "4000",
        "--trace",
        tmp_path / "trace.json",
    ]
    environment = os.environ | {MARK: mark, "TMPDIR": str(tmp_path / "temporary")}
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        if decoding:
            assert process.stdout.read(1)
        else:
            while len(marked(mark)) < 2:
                time.sleep(0.01)
        process.send_signal(number)
        assert process.wait(10) == -number
        # The kernel ends a worker at once, but not before it runs: on a busy machine starting Python takes seconds.
        deadline = time.monotonic() + 30
        while (left := marked(mark)) and time.monotonic() < deadline:
            time.sleep(0.01)
        assert {pid: what_it_does(pid) for pid in left} == {}
        assert process.stderr.read() == b""
    assert list(tmp_path.rglob("*")) == [tmp_path / "temporary"]
