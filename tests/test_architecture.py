"""The house: who may import whom, how large a room may be, what must not be loaded where.

docs/structure.md shows the same.  pytest tests/test_architecture.py
"""

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("shared", "coordinator", "cpu_worker", "gpu_worker")
# Each package and those of its folder that it may import, the lowest first; "" is what lies flat in the folder.
# Workers and coordinator may import all of shared, and nothing of each other.
LAYERS = {
    "shared": {
        "": [],
        "machine": [""],
        "model": [""],
        "kernels": ["", "machine", "model"],
        "wire": ["", "machine", "model", "kernels"],
    },
    "coordinator": {
        "": ["engine"],  # `warmfront.coordinator.Engine`
        "extras": [],
        "hardware": [],
        "models": [],
        "workers": [],
        "text": ["models"],
        "packing": ["models"],
        "profile": ["packing"],
        "selectors": ["packing"],
        "training": ["packing", "selectors"],
        "converting": ["models", "packing"],
        "placement": ["extras", "profile"],
        "balancing": ["workers"],
        "decode": ["selectors"],
        "scheduling": [],
        "quantising": ["models", "text", "packing", "profile", "selectors", "decode"],
        "engine": [
            "hardware",
            "models",
            "workers",
            "text",
            "scheduling",
            "packing",
            "profile",
            "selectors",
            "placement",
            "balancing",
            "decode",
            "quantising",
        ],
        "harness": ["text", "engine"],
        "measure": ["hardware", "packing", "selectors", "placement", "decode", "engine"],
        "serve": ["extras", "models", "text", "engine"],
        "cli": [
            "converting",
            "extras",
            "hardware",
            "models",
            "text",
            "packing",
            "profile",
            "quantising",
            "training",
            "placement",
            "engine",
            "measure",
            "serve",
        ],
    },
}
# Libraries that a package must not import.
FORBIDDEN = {
    "shared": {"torch", "cupy", "transformers"},
    "coordinator": {"cupy", "transformers"},
    "cpu_worker": {"torch", "cupy", "transformers"},
    "gpu_worker": {"torch", "transformers"},
}
MAX_LINES, MAX_MODULES, MAX_POSITIONAL = 400, 15, 8
SOURCES = [path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))]
ALL = [*SOURCES, *(path for folder in ("scripts", "tests") for path in sorted((ROOT / folder).rglob("*.py")))]


def relative(path: Path) -> str:
    return str(path.relative_to(ROOT))


def module_of(path: Path) -> str:
    """Its dotted name, without "warmfront."."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_of(path): path for path in SOURCES}


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
    assert len(SOURCES) > 140


def imported(path: Path) -> set[str]:
    """The project's modules that the file imports."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module is not None:
            for name in node.names:
                names = f"{node.module}.{name.name}".removeprefix("warmfront."), node.module.removeprefix("warmfront.")
                found |= {next((each for each in names if each in MODULES), "")}
        elif isinstance(node, ast.Import):
            found |= {name.name.removeprefix("warmfront.") for name in node.names}
    return found & MODULES.keys()


def room_of(module: str) -> tuple[str, str]:
    """The top-level package of a module, and that within, or "" for what lies flat."""
    top, _, rest = module.partition(".")
    room = rest.partition(".")[0]
    return top, room if room in LAYERS.get(top, {}) else ""


@pytest.mark.parametrize("path", SOURCES, ids=relative)
def test_imports(path: Path) -> None:
    package = path.relative_to(ROOT).parts[0]
    for module in imports(path):
        top, _, rest = module.partition(".")
        assert top not in PACKAGES, f"import warmfront.{module}: a bare import loads a second copy of every class"
        assert top not in FORBIDDEN[package]
        if top == "warmfront" and rest:
            assert rest.split(".")[0] in {"shared", package}


@pytest.mark.parametrize("path", SOURCES, ids=relative)
def test_layers(path: Path) -> None:
    top, room = room_of(module_of(path))
    for module in imported(path):
        other_top, other = room_of(module)
        if other_top == top and other != room:
            assert other in LAYERS[top][room], f"{top}/{room} may not import {module}"


def test_the_layers_are_all_the_packages_and_have_no_circle() -> None:
    for top, layers in LAYERS.items():
        folders = {path.parent.name for path in (ROOT / top).glob("*/__init__.py")}
        assert folders == {name for name in layers if name and (ROOT / top / name).is_dir()}
        list(TopologicalSorter(layers).static_order())


def test_no_module_imports_itself_in_a_circle() -> None:
    graph = {module: imported(path) - {module} for module, path in MODULES.items()}
    assert sum(map(len, graph.values())) > 400
    try:
        list(TopologicalSorter(graph).static_order())
    except CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


def test_a_circle_would_be_found() -> None:
    with pytest.raises(CycleError):
        list(TopologicalSorter({"a": {"b"}, "b": {"a"}}).static_order())
    assert imported(ROOT / "coordinator/engine/engine.py") >= {"coordinator.engine.load", "shared.errors"}


@pytest.mark.parametrize("path", sorted({path.parent for path in SOURCES}), ids=relative)
def test_no_room_is_crowded(path: Path) -> None:
    assert len([file for file in path.glob("*.py") if file.name != "__init__.py"]) <= MAX_MODULES


@pytest.mark.parametrize("path", ALL, ids=relative)
def test_no_file_is_long(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= MAX_LINES


@pytest.mark.parametrize("path", [path for path in SOURCES if path.name == "__init__.py"], ids=relative)
def test_every_package_says_what_lives_there(path: Path) -> None:
    assert ast.get_docstring(ast.parse(path.read_text()))


@pytest.mark.parametrize("path", SOURCES, ids=relative)
def test_few_positional_parameters(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            names = [each.arg for each in (*node.args.posonlyargs, *node.args.args) if each.arg not in ("self", "cls")]
            assert len(names) <= MAX_POSITIONAL, f"{node.name}, line {node.lineno}: {', '.join(names)}"


@pytest.mark.parametrize("path", SOURCES, ids=relative)
def test_nothing_is_exported_anew(path: Path) -> None:
    """A name is imported from where it is defined; the only exception is `warmfront.coordinator.Engine`."""
    tree = ast.parse(path.read_text())
    definitions = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef
    defined = {node.name for node in ast.walk(tree) if isinstance(node, definitions)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            defined |= {name.id for target in targets for name in ast.walk(target) if isinstance(name, ast.Name)}
    exported = next(
        (
            ast.literal_eval(node.value)
            for node in tree.body
            if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__"
        ),
        [],
    )
    if path != ROOT / "coordinator/__init__.py":
        assert set(exported) <= defined


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


@pytest.mark.parametrize("module", ["coordinator.decode.thread_team", "cpu_worker.worker", "gpu_worker.host"])
def test_a_first_kernel_loads_no_linear_algebra(module: str) -> None:
    """numba would; whoever multiplies matrices in the same process still can."""
    code = f"""
import numba, numpy
import warmfront.{module}
from warmfront.shared.kernels.rows import row_stride
row_stride(0, 32)
assert "scipy.linalg" not in sys.modules
assert numba.njit(lambda a: numpy.dot(a, a))(numpy.full((2, 2), 2.0)).tolist() == [[8.0, 8.0], [8.0, 8.0]]
"""
    assert "scipy" in loaded_by(code)


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
    command = f"sys.argv = ['warmfront', *{arguments}]"
    loaded = loaded_by(f"{command}\nfrom warmfront.coordinator.cli.main import _run\n_run()")
    assert "click" in loaded
    assert not loaded & {"numba", "numpy", "torch", "zmq", "tokenizers", "transformers", "gguf", "huggingface_hub"}


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
