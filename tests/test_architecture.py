"""Who may import whom, and what must not be loaded where.  pytest tests/test_architecture.py"""

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("shared", "coordinator", "cpu_worker", "gpu_worker")
# For each package: those of the project that it may import, and libraries that it must not.
ALLOWED = {
    "shared": {"shared"},
    "coordinator": {"shared", "coordinator"},
    "cpu_worker": {"shared", "cpu_worker"},
    "gpu_worker": {"shared", "gpu_worker"},
}
FORBIDDEN = {
    "shared": {"torch", "cupy", "transformers"},
    "coordinator": {"cupy", "transformers"},
    "cpu_worker": {"torch", "cupy", "transformers"},
    "gpu_worker": {"torch", "transformers"},
}
SOURCES = [path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))]


def imports(path: Path) -> Iterator[str]:
    """Every module that the file imports, wherever in it."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            assert node.module is not None
            # "from warmfront import shared" imports warmfront.shared.
            yield from ([f"warmfront.{name.name}" for name in node.names] if node.module == "warmfront" else [])
            yield node.module


def test_there_is_something_to_check() -> None:
    assert {path.relative_to(ROOT).parts[0] for path in SOURCES} == set(PACKAGES)
    assert len(SOURCES) > 40


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports(path: Path) -> None:
    package = path.relative_to(ROOT).parts[0]
    for module in imports(path):
        top, _, rest = module.partition(".")
        assert top not in PACKAGES, f"import warmfront.{module}: a bare import loads a second copy of every class"
        assert top not in FORBIDDEN[package]
        if top == "warmfront" and rest:
            assert rest.split(".")[0] in ALLOWED[package]


def text_calls_without_encoding(tree: ast.AST) -> Iterator[int]:
    """Lines of calls that read or write text in whatever encoding the locale has."""
    for call in ast.walk(tree):
        if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Name | ast.Attribute):
            continue
        named = {keyword.arg: keyword.value for keyword in call.keywords}
        name = call.func.id if isinstance(call.func, ast.Name) else call.func.attr
        mode_at = 0 if name == "open" and isinstance(call.func, ast.Attribute) else 1
        mode = named.get("mode", call.args[mode_at] if len(call.args) > mode_at else ast.Constant("r"))
        is_text = isinstance(mode, ast.Constant) and isinstance(mode.value, str) and "b" not in mode.value
        bare = isinstance(call.func, ast.Attribute) and ast.unparse(call.func.value) in ("os", "Partial")
        wants = (
            (name in ("open", "fdopen") and is_text and not (bare and name == "open"))
            or (name == "read_text" and not call.args)
            or (name == "write_text" and len(call.args) < 2)
            or (name in ("run", "Popen", "check_output") and "text" in named)
        )
        if wants and "encoding" not in named:
            yield call.lineno


@pytest.mark.parametrize(
    ("code", "found"),
    [
        ("open(path)", True),
        ("open(path, 'w')", True),
        ("path.open(mode='a')", True),
        ("path.open('rb')", False),
        ("open(path, 'r', encoding='utf-8')", False),
        ("os.open(path, 0)", False),
        ("os.fdopen(fd, 'w')", True),
        ("path.read_text()", True),
        ("path.read_text('utf-8')", False),
        ("path.write_text(text)", True),
        ("path.write_text(text, encoding='utf-8')", False),
        ("subprocess.run(words, text=True)", True),
        ("subprocess.run(words, encoding='utf-8')", False),
        ("subprocess.run(words)", False),
    ],
)
def test_text_in_the_encoding_of_the_locale_is_found(code: str, found: bool) -> None:
    assert list(text_calls_without_encoding(ast.parse(code))) == [1] * found


@pytest.mark.parametrize("path", [*SOURCES, *sorted((ROOT / "scripts").rglob("*.py"))], ids=lambda path: path.name)
def test_every_text_has_its_encoding(path: Path) -> None:
    assert list(text_calls_without_encoding(ast.parse(path.read_text(encoding="utf-8")))) == []


def loaded_by(code: str) -> set[str]:
    """Top-level modules and packages of warmfront that a fresh process has loaded after `code`."""
    report = "print('\\n' + ' '.join(sys.modules))"
    run = subprocess.run([sys.executable, "-c", f"import sys\n{code}\n{report}"], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    modules = [name.split(".") for name in run.stdout.splitlines()[-1].split()]
    return {".".join(parts[:2]) if parts[0] == "warmfront" else parts[0] for parts in modules}


def test_the_cpu_worker_loads_neither_torch_nor_the_coordinator() -> None:
    loaded = loaded_by("import warmfront.cpu_worker.worker, warmfront.shared.wire.worker_main")
    assert {"numba", "numpy", "warmfront.cpu_worker"} <= loaded
    assert not loaded & {"torch", "cupy", "transformers", "warmfront.coordinator", "warmfront.gpu_worker"}


def test_the_gpu_worker_loads_no_torch_and_cupy_only_for_a_cuda_device() -> None:
    loaded = loaded_by("import warmfront.gpu_worker.worker, warmfront.gpu_worker.host")
    assert "warmfront.gpu_worker" in loaded
    assert not loaded & {"torch", "cupy", "warmfront.coordinator", "warmfront.cpu_worker"}


# What `python -m` does, as far as the refusal to run without a coordinator.
START = """
import contextlib, runpy
with contextlib.suppress(SystemExit):
    runpy.run_module({!r}, run_name="__main__")
"""


@pytest.mark.parametrize("package", ["cpu_worker", "gpu_worker"])
def test_a_worker_starts_without_numba(package: str) -> None:
    """It is not imported before the worker has its cores: its memory and threads would be elsewhere."""
    assert "numba" not in loaded_by(START.format(f"warmfront.{package}"))


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["generate", "--help"], ["chat", "--nonsense"]])
def test_the_command_line_answers_before_anything_heavy_is_loaded(arguments: list[str]) -> None:
    code = f"sys.argv = ['warmfront', *{arguments}]\nfrom warmfront.coordinator.cli.main import main\n"
    code += "try:\n    main()\nexcept SystemExit:\n    pass"
    loaded = loaded_by(code)
    assert "click" in loaded
    assert not loaded & {"numba", "numpy", "torch", "zmq", "tokenizers", "transformers", "gguf"}


def test_the_engine_is_imported_without_numba() -> None:
    """The worker processes start before it: its import runs beside theirs."""
    loaded = loaded_by("import warmfront.coordinator.engine.engine")
    assert "numpy" in loaded
    assert not loaded & {"numba", "torch", "cupy", "transformers"}


@pytest.mark.parametrize("package", ["cpu_worker", "gpu_worker"])
def test_a_worker_started_by_hand_says_what_to_do(package: str) -> None:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("WARMFRONT_")}
    command = [sys.executable, "-m", f"warmfront.{package}"]
    run = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert run.returncode == 2
    assert run.stderr == "a worker is started by the coordinator: run `warmfront` instead\n"
