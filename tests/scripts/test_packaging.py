"""What is installed: the lowest releases of what warmfront needs, and everything that a wheel must contain.

pytest tests/scripts/test_packaging.py
"""

import os
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from collections.abc import Iterator
from itertools import chain
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = ("shared", "coordinator", "cpu_worker", "gpu_worker")
# Of the folder warmfront/, which is none of them.
TOP = {"warmfront/__main__.py", "warmfront/serve_app.py"}
# Not needed to run the tests, or not installable without a GPU.
UNTRIED = {"accelerate", "lm-eval", "mypy", "ruff", "cupy-cuda12x", "cupy-cuda13x", "ray", "setuptools", "warmfront"}


def bounds() -> Iterator[tuple[str, str]]:
    """Each requirement's name and lowest release."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for requirement in chain(project["dependencies"], *project["optional-dependencies"].values()):
        name, _, rest = requirement.partition(">=")
        yield name.partition("[")[0], rest.partition(",")[0]


def test_the_oldest_releases_are_those_that_the_tests_were_run_with() -> None:
    lines = (ROOT / "tests/oldest.txt").read_text().splitlines()
    oldest = dict(line.split("==") for line in lines if not line.startswith("#"))
    wanted = {name: bound for name, bound in bounds() if name not in UNTRIED}
    assert set(oldest) == set(wanted)
    for name, bound in wanted.items():
        assert re.sub(r"(\.0)+$", "", oldest[name]) == re.sub(r"(\.0)+$", "", bound), name


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder with the wheel and the source archive."""
    tree, out = tmp_path_factory.mktemp("tree"), tmp_path_factory.mktemp("built")
    for name in ("warmfront", *PACKAGES):
        shutil.copytree(ROOT / name, tree / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tree)
    code = (
        f"from setuptools import build_meta; build_meta.build_sdist({str(out)!r}); build_meta.build_wheel({str(out)!r})"
    )
    subprocess.run([sys.executable, "-c", code], cwd=tree, check=True, capture_output=True)
    return out


def test_every_package_is_listed() -> None:
    """A folder that is missing from the list would be missing from a wheel, and from that alone."""
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    folders = [path.parent.relative_to(ROOT) for name in PACKAGES for path in (ROOT / name).rglob("__init__.py")]
    assert sorted(listed) == sorted(["warmfront", *(f"warmfront.{'.'.join(folder.parts)}" for folder in folders)])


def test_every_folder_of_modules_is_a_package() -> None:
    folders = {path.parent for name in PACKAGES for path in (ROOT / name).rglob("*.py")}
    assert [str(folder) for folder in folders if not (folder / "__init__.py").is_file()] == []


def sources() -> set[str]:
    kinds = (".py", ".cu", ".typed", ".html", ".css", ".js")
    files = {path for name in PACKAGES for path in (ROOT / name).rglob("*") if path.suffix in kinds}
    return {str(path.relative_to(ROOT)) for path in files}


def test_wheel_and_source_archive_hold_every_file(built: Path) -> None:
    (wheel,) = built.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
    assert names == {f"warmfront/{name}" for name in sources()} | TOP
    (source,) = built.glob("*.tar.gz")
    with tarfile.open(source) as packed:
        inside = {name.partition("/")[2] for name in packed.getnames()}
    assert sources() | TOP | {"pyproject.toml", "LICENSE"} <= inside


@pytest.mark.parametrize(
    ("args", "code", "out", "err"),
    [
        (["--version"], 0, "python -m warmfront, version 0.1.0", ""),
        (["-h"], 0, "Usage: python -m warmfront [OPTIONS] COMMAND", ""),
        (["topology", "--no-measure", "--json"], 0, '{"nodes": ', ""),
        (["info", "nowhere"], 1, "", "warmfront: no such model: nowhere"),
        (["generate"], 2, "", "warmfront: there is no prompt: give -p TEXT"),
    ],
)
def test_the_wheel_runs_as_a_module(
    built: Path, tmp_path: Path, args: list[str], code: int, out: str, err: str
) -> None:
    (wheel,) = built.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
    environment = os.environ | {"PYTHONPATH": str(tmp_path / "site"), "XDG_CACHE_HOME": str(tmp_path / "cache")}
    command = [sys.executable, "-m", "warmfront", *args]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stdout[: len(out)], done.stderr[: len(err)]) == (code, out, err), done.stderr
    assert bool(done.stdout) == bool(out)
    assert bool(done.stderr) == bool(err)
