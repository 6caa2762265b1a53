"""What `warmfront plan` refuses, before anything is loaded.  pytest tests/coordinator/cli/test_plan_command.py"""

import sys
from pathlib import Path

import pytest

from warmfront.coordinator.cli.main import _run


def refused(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *args: str) -> str:
    """The single line of an error with exit code 2 that `args` lead to."""
    monkeypatch.setattr(sys, "argv", ["warmfront", "plan", *args])
    assert _run() == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("warmfront: ")
    assert printed.err.count("\n") == 1
    return printed.err


@pytest.mark.parametrize(
    ("args", "words"),
    [
        ("", ["--vram-budget, such as 6GB"]),
        ("m --vram-budget much", ["'much' is not a size", "512MB"]),
        ("m --vram-budget 1GB --gpu none", ["a plan is for a GPU", "--gpu host"]),
        ("m --vram-budget 1GB --gpu rocm", ["'rocm'", "cuda:N"]),
        ("m --vram-budget 1GB --selector some", ["'some' is not one of"]),
        ("m --vram-budget 1GB --dtype q5", ["'q5' is not one of"]),
        ("m --vram-budget 1GB -o absent/x.json", ["absent/x.json", "there is no folder absent"]),
        ("m --vram-budget 1GB -o /proc/x/y.json", ["there is no folder /proc/x"]),
        ("m --vram-budget 1GB --plot absent/x.png", ["absent/x.png", "there is no folder absent"]),
        ("m --vram-budget 1GB -o .", ["'.' is a directory"]),
        ("m --vram-budget 1GB --plan x.json", ["No such option", "--plan"]),
        ("m n --vram-budget 1GB", ["(n)"]),
    ],
)
def test_wrong_requests(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    args: str,
    words: list[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    line = refused(capsys, monkeypatch, *args.split())
    for word in words:
        assert word in line
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("option", "package"), [("--exact", "scipy"), ("--plot=x.png", "matplotlib")])
def test_missing_packages(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    option: str,
    package: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, package, None)
    line = refused(capsys, monkeypatch, "m", "--vram-budget", "1GB", option)
    assert f"{option.partition('=')[0]} needs {package}: run {sys.executable} -m pip install {package}" in line
