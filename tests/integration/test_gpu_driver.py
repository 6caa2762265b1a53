"""Every command where a driver reports a card: without CuPy, and with one that runs the kernels on the CPU.

pytest tests/integration/test_gpu_driver.py
"""

import json
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.integration.command import assert_refused, prepack, run
from warmfront.shared.machine.driver import find_driver

STAND_IN = Path(__file__).parents[1] / "gpu_worker" / "stand_in"
pytestmark = [
    pytest.mark.usefixtures("compiled"),
    pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++"),
    pytest.mark.skipif(find_driver() is not None, reason="there is a driver already"),
]


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The environment with a driver of CUDA 12.4 that reports a card."""
    folder = tmp_path_factory.mktemp("driver")
    (folder / "cuda.c").write_text(
        "int cuInit(unsigned flags) { return 0; }\n"
        "int cuDeviceGetCount(int *count) { *count = 1; return 0; }\n"
        "int cuDriverGetVersion(int *version) { *version = 12040; return 0; }\n"
    )
    subprocess.run(["cc", "-shared", "-fPIC", "-o", folder / "libcuda.so.1", folder / "cuda.c"], check=True)
    return {**os.environ, "LD_LIBRARY_PATH": str(folder)}


@pytest.fixture
def relu(tiny_llama: Callable[..., Path]) -> Path:
    return prepack(tiny_llama(hidden_act="relu"), "f32")


def test_without_cupy(relu: Path, driver: dict[str, str]) -> None:
    """The CPU computes alone; one line says why, and what installs a CuPy for this driver."""
    outcome = run("generate", "-m", relu, "--dtype", "f32", "--prompt-ids", "5,6", "-n", "2", env=driver)
    assert outcome.code == 0
    line = (
        "no GPU is used: cuda:0: CuPy cannot be imported (No module named 'cupy'): run pip install 'warmfront[cuda12]'"
    )
    assert outcome.err.splitlines().count(line) == 1
    asked = run("generate", "-m", relu, "--dtype", "f32", "--prompt-ids", "5", "--gpu", "cuda:0", env=driver)
    assert asked.code == 1
    assert asked.err.splitlines()[-1].startswith("warmfront: worker gpu0: cuda:0: CuPy cannot be imported")
    budget = run("plan", relu, "--dtype", "f32", "--vram-budget", "1MB", env=driver)
    assert_refused(budget, 2, "--vram-budget", "no GPU can be used", "warmfront[cuda12]", "--gpu host")
    assert run("info", relu, env=driver).code == 0


@pytest.mark.parametrize("command", ["bench", "profile"])
def test_commands_without_cupy(relu: Path, driver: dict[str, str], tmp_path: Path, command: str) -> None:
    (tmp_path / "text").write_text("The sea had been calm.")
    options = {
        "bench": ("--rounds", "1", "--contexts", "4", "-n", "4"),
        "profile": ("--text", tmp_path / "text"),
    }
    outcome = run(command, relu, "--dtype", "f32", *options[command], env=driver)
    assert outcome.code == 0, outcome.err


def test_a_card_that_computes_rightly_is_used(relu: Path, driver: dict[str, str]) -> None:
    """It is chosen by `auto`, and the tokens are those of the CPU."""
    command = ("generate", "-m", relu, "--dtype", "f32", "--prompt-ids", "5,6,7,8,9", "-n", "12", "--json", "--verify")
    ways = {"cuda:0 CPU stand-in": driver | {"PYTHONPATH": str(STAND_IN)}, None: os.environ}
    tokens = []
    for device, environment in ways.items():
        outcome = run(*command, env=environment)
        assert outcome.code == 0, outcome.err
        answer = json.loads(outcome.out)
        assert [worker["device"] for worker in answer["workers"]][1:] == ([device] if device else [])
        tokens.append(answer["token_ids"])
    assert tokens[0] == tokens[1]
