"""docs/structure.md says what is true: files, functions, packages, the order of imports.

pytest tests/scripts/test_structure.py
"""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.test_architecture import LAYERS

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "structure.md").read_text(encoding="utf-8")
README = (ROOT / "README.md").read_text(encoding="utf-8")
CODE = ("coordinator", "cpu_worker", "gpu_worker", "shared")
PACKAGES = sorted(path.parent.relative_to(ROOT) for top in CODE for path in (ROOT / top).rglob("__init__.py"))


def picture(top: str) -> list[list[str]]:
    """The packages of `top` in the drawing, line by line from above; the text beside them begins in column 37."""
    lines = PAGE[PAGE.index(f" {top}/") :].split("└", 1)[0].splitlines()
    names = [line.strip("│ ")[: 37 - 2].split() for line in lines if line.startswith(" │ ")]
    return [[name for name in line if (ROOT / top / name).is_dir()] for line in names]


def named_files(text: str) -> set[str]:
    """Every path in backticks that has a folder, and every folder that ends with a slash."""
    words = re.findall(r"`([^`\s]+)`", text)
    paths = {word for word in words if re.fullmatch(r"[\w.]+(/[\w.]+)*/?", word) and "/" in word}
    return {path for path in paths if path.split("/")[0] in (*CODE, "warmfront", "tests", "scripts", "docs")}


@pytest.mark.parametrize("path", sorted(named_files(PAGE) | named_files(README)))
def test_what_is_named_exists(path: str) -> None:
    assert (ROOT / path).exists()


@pytest.mark.parametrize("path", PACKAGES, ids=str)
def test_every_package_is_described(path: Path) -> None:
    assert re.search(rf"^\| `{path}/` \| [\w`]", PAGE, re.MULTILINE), f"{path} has no line in the table"


def functions(text: str) -> Iterator[tuple[str, str]]:
    """Pairs of a file and a function or class in it, written as `file.py` `name`."""
    yield from re.findall(r"`([\w/]+\.py)`\s+`(\w+)`", text)


@pytest.mark.parametrize(("path", "name"), sorted(set(functions(PAGE))))
def test_functions_are_where_it_says(path: str, name: str) -> None:
    tree = ast.parse((ROOT / path).read_text(encoding="utf-8"))
    defined = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    assert name in {node.name for node in ast.walk(tree) if isinstance(node, defined)}


def test_a_token_takes_at_most_twelve_steps() -> None:
    section = PAGE.split("## The life of a token")[1].split("\n## ")[0]
    steps = re.findall(r"^(\d+)\. .*", section, re.MULTILINE)
    assert [int(step) for step in steps] == list(range(1, len(steps) + 1))
    assert 5 < len(steps) <= 12
    assert len(list(functions(section))) >= len(steps)


@pytest.mark.parametrize("top", ["coordinator", "shared"])
def test_packages_may_import_those_below(top: str) -> None:
    """The picture shows the order of `LAYERS`, which the imports are held to."""
    lines = picture(top)
    names = [name for line in lines for name in line]
    assert sorted(names) == sorted(path.name for path in PACKAGES if path.parent == Path(top))
    for number, line in enumerate(lines):
        below = {name for other in lines[number + 1 :] for name in other}
        for name in line:
            assert set(LAYERS[top][name]) <= below | {"", "extras"}, f"{top}/{name} may import what is not below it"
