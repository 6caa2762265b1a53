"""What a selector is made of, and that nothing else looks at its name.  pytest tests/shared/test_selector.py"""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from warmfront.shared.errors import UsageError
from warmfront.shared.selector import (
    ALL,
    CORE,
    CORE_LOWBIT,
    CORE_LOWRANK,
    EXACT,
    LOWBIT,
    LOWRANK,
    SELECTORS,
    Selector,
    Source,
    selector_of,
    wished_selector,
)

ROOT = Path(__file__).parents[2]
NAMES = set(SELECTORS) - {"auto"}
SOURCES = [
    path
    for folder in ("shared", "coordinator", "cpu_worker", "gpu_worker", "scripts")
    for path in sorted((ROOT / folder).rglob("*.py"))
    if path != ROOT / "shared/selector.py"
]


def test_names() -> None:
    assert [selector_of(name).name for name in SELECTORS if name != "auto"] == list(SELECTORS[1:])
    assert wished_selector("auto") is None
    assert wished_selector("exact") is EXACT
    for wrong in ("auto", "some", ""):
        with pytest.raises(UsageError, match="use one of auto, all"):
            selector_of(wrong)


@pytest.mark.parametrize(
    ("selector", "masked", "predicts", "skips"),
    [
        (ALL, False, False, False),
        (EXACT, False, False, True),
        (LOWRANK, True, True, True),
        (LOWBIT, True, True, True),
        (CORE, True, False, True),
        (CORE_LOWRANK, True, True, True),
        (CORE_LOWBIT, True, True, True),
    ],
    ids=str,
)
def test_parts(selector: Selector, masked: bool, predicts: bool, skips: bool) -> None:
    assert (selector.masked, selector.predicts, selector.skips(sparse=True)) == (masked, predicts, skips)
    assert not selector.skips(sparse=False)


def test_unions() -> None:
    assert selector_of("core|lowbit") is CORE_LOWBIT
    assert {Source.CORE, Source.LOWBIT} == CORE_LOWBIT.sources


def comparisons(tree: ast.AST) -> Iterator[int]:
    """Lines where something is compared with, or looked up by, the name of a selector."""
    for node in ast.walk(tree):
        against: list[ast.expr | None] = []
        if isinstance(node, ast.Compare):
            against = [node.left, *node.comparators]
        elif isinstance(node, ast.Dict):
            against = list(node.keys)
        elif isinstance(node, ast.MatchValue):
            against = [node.value]
        for value in against:
            parts = value.elts if isinstance(value, ast.Tuple | ast.List | ast.Set) else [value]
            if any(isinstance(part, ast.Constant) and part.value in NAMES for part in parts):
                yield node.lineno


@pytest.mark.parametrize(
    ("code", "found"),
    [
        ('plan.selector == "exact"', True),
        ('selector in ("lowrank", "lowbit")', True),
        ('{"all": 1}.get(selector)', True),
        ('match selector:\n    case "lowbit":\n        pass', True),
        ('Engine.load(path, selector="all")', False),
        ('config.gpu == "auto"', False),
    ],
)
def test_a_comparison_would_be_found(code: str, found: bool) -> None:
    assert bool(list(comparisons(ast.parse(code)))) == found


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_nothing_compares_names(path: Path) -> None:
    assert list(comparisons(ast.parse(path.read_text(encoding="utf-8")))) == []
