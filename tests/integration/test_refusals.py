"""Errors are one line, with the right exit code, and leave nothing behind.

pytest tests/integration/test_refusals.py
"""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.integration.command import CORES, WARMFRONT, assert_refused, link_cache, prepack, run
from warmfront.coordinator.packing.packer import ensure_packed
from warmfront.shared.machine.driver import find_driver
from warmfront.shared.model.store import PackedModel
from warmfront.shared.paths import cache_root

# A command that sees a folder, the next word, as one that cannot be written, whoever runs it.
_MOUNT = 'mount --bind "$0" "$0" && mount -o remount,bind,ro "$0" && exec "$@"'
READ_ONLY = [shutil.which("unshare") or "false", "--map-root-user", "--mount", "sh", "-c", _MOUNT]

pytestmark = pytest.mark.usefixtures("compiled")


@pytest.fixture
def relu(tiny_llama: Callable[..., Path]) -> Path:
    return prepack(tiny_llama(hidden_act="relu"))


@pytest.mark.parametrize(
    ("args", "words"),
    [
        ("", ["Missing command", "`warmfront --help`"]),
        ("nonsense", ["No such command 'nonsense'", "`warmfront --help`"]),
        ("generate", ["-p TEXT or --prompt-ids"]),
        ("generate -p x --prompt-ids 1", ["either -p TEXT or --prompt-ids"]),
        ("generate -p x --nonsense", ["No such option '--nonsense'", "`warmfront generate --help`"]),
        ("generate -p x surplus", ["surplus"]),
        ("generate -p", ["'-p' requires an argument"]),
        ("generate -p x -n 0", ["'-n'", "x>=1"]),
        ("generate -p x -n many", ["'-n'", "'many' is not a valid integer"]),
        ("generate -p x --temperature -1", ["temperature", "0 or more"]),
        ("generate -p x --temperature nan", ["temperature", "0 or more"]),
        ("generate -p x --temperature inf", ["temperature", "0 or more"]),
        ("generate -p x --temperature hot", ["'--temperature'", "not a valid float"]),
        ("generate -p x --top-k -1", ["top_k", "0 (off) or more"]),
        ("generate -p x --top-p 0", ["top_p", "above 0, up to 1"]),
        ("generate -p x --top-p 1.5", ["top_p", "above 0, up to 1"]),
        ("generate -p x --min-p 2", ["min_p", "between 0 and 1"]),
        ("generate -p x --repetition-penalty 0", ["repetition_penalty", "between 0.01 and 100"]),
        ("generate -p x --seed -1", ["seed", "0 or more"]),
        ("generate -p x --seed 1.5", ["'--seed'", "not a valid integer"]),
        ("generate -p x --workers two", ["'--workers'", "not a valid integer"]),
        ("generate -p x --workers 0", ["0 workers", "--workers 1 or more"]),
        ("generate -p x --threads 0", ["0 threads", "--threads 1 or more"]),
        ("generate -p x --threads 1 --workers 2", ["2 workers of 1 thread in all", "--workers 1 or fewer"]),
        (f"generate -p x --threads {CORES + 1}", [f"{CORES + 1} threads", f"--threads {CORES} or fewer"]),
        (f"generate -p x --workers {CORES + 1}", [f"{CORES + 1} workers", f"--workers {CORES} or fewer"]),
        ("generate -p x --dtype q5", ["'q5' is not one of", "'q4'"]),
        ("generate -p x --selector some", ["'some' is not one of", "'exact'"]),
        ("generate -p x --gpu rocm", ["'rocm'", "auto, none, host or cuda:N"]),
        ("generate -p x --gpu cuda", ["'cuda'", "auto, none, host or cuda:N"]),
        ("generate -p x --vram-budget much", ["'much' is not a size", "512MB"]),
        ("generate -p x --vram-budget -1GB", ["'-1GB' is not a size", "512MB"]),
        ("generate -p x --vram-budget 1GB --gpu none", ["--vram-budget with --gpu none", "leave one"]),
        ("generate -p x --ctx 0", ["a context of 0 tokens", "--ctx 1 or more"]),
        ("generate -p x --ctx long", ["'--ctx'", "not a valid integer"]),
        ("generate --prompt-ids 1,x", ["'1,x'", "1,2,3"]),
        ("generate --prompt-ids 1,,2", ["'1,,2'", "1,2,3"]),
        ("generate --prompt-ids=", ["not a list of numbers", "1,2,3. See `warmfront generate --help`."]),
        ("generate --temperatur 1", ["--temperature", "? See `warmfront generate --help`."]),
        ("chat --temperature -1", ["temperature", "0 or more"]),
        ("bench --contexts 16,x", ["'16,x'", "1,2,3"]),
        ("bench --rounds 0", ["--rounds", "0"]),
        ("bench --recall 2", ["recall of 2.0"]),
        ("info a b", ["(b)"]),
        ("info --dtype q5", ["'q5' is not one of"]),
    ],
)
def test_wrong_requests(args: str, words: list[str]) -> None:
    """These are refused at once, without the model."""
    assert_refused(run(*args.split()), 2, *words)


@pytest.mark.parametrize(
    ("args", "code", "words"),
    [
        ("--ctx 513 -p x", 2, ["--ctx 513", "512 tokens", "pass no more"]),
        ("--ctx 4 --prompt-ids 1,2,3,4", 2, ["4 tokens", "context holds 4", "--ctx"]),
        ("--prompt-ids 1,300", 2, ["token id 300", "vocabulary of 300"]),
        ("--prompt-ids=-1", 2, ["token id -1", "vocabulary of 300"]),
        ("--prompt-ids 99999999999999999999", 2, ["token id 99999999999999999999", "vocabulary of 300"]),
        ("--gpu host --vram-budget 1KB -p x", 2, ["holds no group", "MB are needed", "larger --vram-budget"]),
        ("--gpu host --vram-budget 0 -p x", 2, ["holds no group", "MB are needed", "larger --vram-budget"]),
        ("--gpu host --vram-budget 900TB -p x", 1, ["900000.00 GB", "smaller --vram-budget"]),
        ("--gpu cuda:99 -p x", 1, ["cuda:99"]),
    ],
)
def test_requests_that_do_not_fit(relu: Path, args: str, code: int, words: list[str]) -> None:
    assert_refused(run("generate", "-m", relu, *args.split()), code, *words)


def test_empty_prompt(relu: Path) -> None:
    assert_refused(run("generate", "-m", relu, "-p", ""), 2, "the prompt is empty")


def test_prompt_that_is_no_text(relu: Path) -> None:
    assert_refused(run("generate", "-m", relu, "-p", os.fsdecode(b"\xff\xfe")), 2, "not UTF-8")


def test_exact_needs_relu(tiny_llama: Callable[..., Path]) -> None:
    outcome = run("generate", "-m", prepack(tiny_llama(hidden_act="silu")), "-p", "x", "--selector", "exact")
    assert_refused(outcome, 2, "ReLU", "silu", "--selector all")


@pytest.mark.skipif(find_driver() is not None, reason="there may be a GPU to take it")
@pytest.mark.parametrize("option", ["--vram-budget", "--plan"])
def test_options_of_a_gpu_that_is_not_there(relu: Path, option: str) -> None:
    """The plan only has to exist: the request is refused without reading it."""
    value = "1GB" if option == "--vram-budget" else relu / "config.json"
    outcome = run("generate", "-m", relu, "-p", "x", option, value)
    assert_refused(outcome, 2, option, "no CUDA device", "--gpu host")
    assert_refused(run("generate", "-m", relu, "-p", "x", option, value, "--gpu", "none"), 2, option, "--gpu none")


@pytest.mark.parametrize("gpu", ["auto", "host"])
def test_a_plan_that_is_not_there(gpu: str) -> None:
    """It is refused before the model is looked for."""
    outcome = run("generate", "-m", "no/such/model", "-p", "x", "--plan", "no/such/plan.json", "--gpu", gpu)
    assert_refused(outcome, 2, "--plan no/such/plan.json", "no such file", "warmfront plan")


def write_config(folder: Path, text: str) -> None:
    folder.mkdir()
    (folder / "config.json").write_text(text)


@pytest.mark.parametrize("command", [["generate", "-p", "x", "-m"], ["chat", "-m"], ["info"]], ids=lambda c: c[0])
def test_wrong_models(command: list[str], tmp_path: Path, tiny_gguf: Callable[..., Path]) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.txt").write_text("hello")
    (tmp_path / "text.gguf").write_text("hello")
    write_config(tmp_path / "broken", "{")
    write_config(tmp_path / "bloom", '{"model_type": "bloom"}')
    write_config(tmp_path / "bare", '{"model_type": "llama"}')
    (tmp_path / "bare" / "model.safetensors").touch()
    tiny_gguf("bloom.gguf", architecture="bloom")
    tiny_gguf("part.gguf", without=["blk.0.ffn_up.weight"])
    refusals = {
        "absent": ["no such model", "smollm2-135m"],
        "empty": ["no config.json", "GGUF file"],
        "text.txt": ["is not a GGUF file"],
        "text.gguf": ["not a whole GGUF file", "fetch it again"],
        "broken": ["is not JSON", "fetch it again"],
        "bloom": ["'bloom' is not supported", "llama, ", "gemma3"],
        "bare": ["field hidden_size is missing"],
        "bloom.gguf": ["'bloom' is not supported", "llama, ", "gemma3"],
        "part.gguf": ["is missing", "incomplete"],
    }
    # All commands open a model alike: one tries them all.
    for name in refusals if command == ["info"] else ("absent", "part.gguf"):
        assert_refused(run(*command, tmp_path / name), 1, *refusals[name])


@pytest.mark.parametrize("kept", [7, 0.5])
def test_truncated_gguf(tiny_gguf: Callable[..., Path], kept: float) -> None:
    path = tiny_gguf()
    data = path.read_bytes()
    path.write_bytes(data[: kept if isinstance(kept, int) else int(len(data) * kept)])
    assert_refused(run("generate", "-m", path, "--prompt-ids", "1"), 1, path.name)


def test_without_a_tokenizer(tiny_gguf: Callable[..., Path], tmp_path: Path) -> None:
    path = prepack(tiny_gguf())
    assert run("generate", "-m", path, "--prompt-ids", "1", "-n", "2").code == 0
    words = "without a tokenizer", "warmfront generate --prompt-ids"
    assert_refused(run("generate", "-m", path, "-p", "x"), 2, *words)
    assert_refused(run("chat", "-m", path), 2, *words)
    text = tmp_path / "text.txt"
    text.write_text("Some words of no use.\n" * 40)
    for command in ("cluster", "eval", "profile", "train-predictor"):
        # Some say before what they find out of the model, such as its activation.
        outcome = run(command, path, "--text", text, "--activation", "relu")
        *_, line = outcome.err.splitlines()
        assert (outcome.code, outcome.out) == (2, ""), outcome
        assert line.startswith("warmfront: ")
        assert all(word in line for word in words)


class TestCache:
    """A cache that is damaged, full or cannot be written; what counts as damage is in shared/model/test_store.py."""

    @pytest.fixture
    def home(self, tmp_path: Path) -> Path:
        """An $XDG_CACHE_HOME without packed models."""
        link_cache(tmp_path / "home")
        return tmp_path / "home"

    @pytest.fixture
    def packed(self, home: Path, relu: Path) -> Path:
        """The packed file of `relu` in `home`, which a test may damage."""
        original = ensure_packed(relu, "auto", print, lambda _done, _total: None)
        folder = home / "warmfront" / "models"
        folder.mkdir()
        return Path(shutil.copy(original, folder))

    def generate(self, home: Path, model: Path, *args: str, limit: int | None = None) -> Any:
        """Run with $XDG_CACHE_HOME at `home`, no file larger than `limit` bytes."""
        command = [WARMFRONT, "generate", "-m", os.fspath(model), "-p", "x", "-n", "2", *args]
        if limit is None:
            return run(*command[1:], env=os.environ | {"XDG_CACHE_HOME": os.fspath(home)})
        code = (
            "import os, resource; "
            f"resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit})); os.execv({WARMFRONT!r}, {command!r})"
        )
        return run("-c", code, executable=sys.executable, env=os.environ | {"XDG_CACHE_HOME": os.fspath(home)})

    def assert_mended(self, home: Path, model: Path, packed: Path, whole: bytes, *args: str) -> None:
        """A line says what is wrong, and the file is as it was before."""
        outcome = self.generate(home, model, *args)
        assert outcome.code == 0, outcome
        first, *rest = outcome.err.splitlines()
        assert packed.name in first
        assert re.search(r" is damaged \(.+\): packing it anew$", first)
        assert set(rest) <= {"profiling which neurons fire (first load only)"}
        assert packed.read_bytes() == whole

    def test_packed_file_is_truncated(self, relu: Path, home: Path, packed: Path) -> None:
        data = packed.read_bytes()
        packed.write_bytes(data[: len(data) // 2])
        self.assert_mended(home, relu, packed, data)

    def test_head_of_the_packed_file_is_damaged(self, relu: Path, home: Path, packed: Path) -> None:
        data = bytearray(whole := packed.read_bytes())
        data[9:13] = b"\xff\xfe\x01}"
        packed.write_bytes(data)
        self.assert_mended(home, relu, packed, whole)

    @pytest.mark.parametrize("name", ["layers.1.o", "layers.0.ffn", "tokenizer"])
    def test_pages_of_the_packed_file_are_zero(self, relu: Path, home: Path, packed: Path, name: str) -> None:
        """As a power cut may leave it: of the right size, with the right header. Threads of the coordinator find it, a
        worker, or the tokenizer."""
        with PackedModel(packed) as model:
            entry = model.entries[name]
        data = bytearray(whole := packed.read_bytes())
        at = entry.offset + (entry.nbytes // 2 if entry.nbytes > 8192 else 0)
        assert any(data[at : at + 128])
        data[at : at + 128] = bytes(128)
        packed.write_bytes(data)
        self.assert_mended(home, relu, packed, whole)

    def test_copies_of_the_gates_are_damaged(self, relu: Path, home: Path, packed: Path) -> None:
        options = ("--selector", "lowbit", "--bits", "4")
        first = self.generate(home, relu, *options)
        assert first.code == 0, first
        (copies,) = packed.parent.glob(f"{packed.stem}-lowbit4*.safetensors")
        data = bytearray(copies.read_bytes())
        data[-3000:-2000] = bytes(1000)
        copies.write_bytes(data)
        again = self.generate(home, relu, *options)
        assert again == first._replace(err=again.err), again
        assert again.err.splitlines()[0].endswith("packing it anew")

    def test_a_deleted_file_is_made_again(self, relu: Path, home: Path, packed: Path) -> None:
        data = packed.read_bytes()
        packed.unlink()
        assert self.generate(home, relu).code == 0
        assert packed.read_bytes() == data

    @pytest.mark.skipif(
        subprocess.run([*READ_ONLY, "/tmp", "true"], stderr=subprocess.DEVNULL).returncode != 0,
        reason="may mount nothing here",
    )
    def test_a_read_only_cache_that_has_all(self, relu: Path, home: Path, packed: Path) -> None:
        """Nothing is written, and nothing is said; what it lacks, and cannot get, is one line."""
        shutil.copytree(cache_root() / "sources", home / "warmfront" / "sources")
        before = sorted((path, path.lstat().st_mtime_ns) for path in home.rglob("*"))
        options = {"env": os.environ | {"XDG_CACHE_HOME": os.fspath(home)}, "executable": READ_ONLY[0]}

        def generate(*args: str) -> Any:
            return run(*READ_ONLY[1:], home, WARMFRONT, "generate", "-m", relu, "-p", "x", "-n", "2", *args, **options)

        outcome = generate()
        assert (outcome.code, outcome.err) == (0, ""), outcome
        assert outcome.out == self.generate(home, relu).out
        assert_refused(generate("--dtype", "q8"), 1, "cannot write the packed model", "Read-only file system")
        assert_refused(generate("--selector", "lowbit"), 1, "cannot write 2-bit copies", "Read-only file system")
        assert sorted((path, path.lstat().st_mtime_ns) for path in home.rglob("*")) == before
        assert packed.exists()

    def test_no_room_for_the_packed_file(self, relu: Path, home: Path) -> None:
        assert_refused(self.generate(home, relu, limit=1 << 16), 1, "cannot write the packed model", "XDG_CACHE_HOME")
        assert list((home / "warmfront" / "models").iterdir()) == []

    @pytest.mark.usefixtures("packed")
    def test_no_room_for_the_board(self, relu: Path, home: Path) -> None:
        assert_refused(self.generate(home, relu, limit=1 << 14), 1, "no room for", "shared memory")

    def test_folder_cannot_be_written(self, relu: Path, smollm2: Path) -> None:
        home = Path("/proc/self")  # refuses even root
        assert_refused(self.generate(home, relu), 1, "cannot write the packed model", "XDG_CACHE_HOME")
        outcome = run("info", env=os.environ | {"XDG_CACHE_HOME": os.fspath(home)})
        assert_refused(outcome, 1, "cannot keep smollm2-135m", "XDG_CACHE_HOME")

    def test_the_weights_are_gone_after_packing(self, relu: Path, tmp_path: Path) -> None:
        folder = tmp_path / "model"
        shutil.copytree(relu, folder)
        prepack(folder)
        (folder / "model.safetensors").unlink()
        assert_refused(run("generate", "-m", folder, "-p", "x"), 1, "no model.safetensors")
