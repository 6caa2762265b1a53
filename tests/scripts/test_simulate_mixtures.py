"""Simulated mixtures of experts.  pytest tests/scripts/test_simulate_mixtures.py"""

import json
import sys
from pathlib import Path
from types import ModuleType

import pytest

SCRIPTS = Path(__file__).parents[2] / "scripts"


@pytest.fixture(scope="module")
def script() -> ModuleType:
    """The script, imported as Python runs it."""
    sys.path.insert(0, str(SCRIPTS))
    try:
        import simulate_mixtures
    finally:
        sys.path.pop(0)
    return simulate_mixtures


def run(script: ModuleType, monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", ["simulate_mixtures.py", *arguments])
    script.main()


def test_a_card_that_holds_all_experts_is_faster_than_a_full_one(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shape = script.mixture(4, 2048, 1024, 32, 4, (32, 4, 128), 32_000, 8.5)
    large = shape._replace(expert_bytes=100 * shape.expert_bytes)
    monkeypatch.setattr(script, "MODELS", {"small": shape, "large": large})
    run(script, monkeypatch, "--models", "small;large", "--cards", "rtx3060", "--tokens", "64")
    small, full = json.loads(capsys.readouterr().out.splitlines()[-1])["runs"]
    assert small["held"] == 1 > full["held"] > 0
    for policy, speed in full["tok_s"].items():
        assert 0 < speed < small["tok_s"][policy]


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["--tokens", "0"], "--tokens must be 1 or more"),
        (["--cards", "rtx3060,rtx1"], "'rtx1' is none of rtx3060"),
        (["--models", "GPT"], "'GPT' is none of Qwen3-30B-A3B"),
    ],
)
def test_wrong_usage(
    script: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    line: str,
) -> None:
    with pytest.raises(SystemExit, match="2"):
        run(script, monkeypatch, *arguments)
    assert line in capsys.readouterr().err
