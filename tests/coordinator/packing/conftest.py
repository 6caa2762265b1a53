"""A cache of each test's own, and a model to pack."""

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.coordinator.packing.packed import SIZES


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    return tmp_path / "home" / "warmfront"


@pytest.fixture
def models(cache: Path) -> Path:
    """The folder of packed models."""
    return cache / "models"


@pytest.fixture
def folder(tiny_llama: Callable[..., Path]) -> Path:
    return tiny_llama(**SIZES)
