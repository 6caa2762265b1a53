"""Whether a card is used: with drivers made by the C compiler and packages called cupy that fail in every way.

Run: pytest tests/coordinator/engine/test_devices.py
"""

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from warmfront.coordinator.engine.devices import reasons as devices
from warmfront.coordinator.engine.devices.reasons import against_attention, against_neurons
from warmfront.coordinator.engine.resolve import resolve_devices
from warmfront.gpu_worker.open import open_device
from warmfront.shared.config import EngineConfig
from warmfront.shared.errors import ResourceError, UsageError

STAND_IN = Path(__file__).parents[2] / "gpu_worker" / "stand_in"
# The stand-in for CuPy with kernels that do nothing.
IDLE = f"""
__file__ = {str(STAND_IN / "cupy.py")!r}
exec(open(__file__).read())
class RawModule:
    def __init__(self, **source): ...
    def get_function(self, name):
        return lambda *arguments, **stream: None
"""
MakeDriver = Callable[..., None]

needs_compiler = pytest.mark.skipif(shutil.which("cc") is None, reason="needs a C compiler")


@pytest.fixture(autouse=True)
def _alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cache of its own; no driver and no packages but those that a test makes."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "packages"))
    monkeypatch.syspath_prepend(tmp_path / "packages")
    monkeypatch.setattr("warmfront.shared.machine.driver._LIBRARY", str(tmp_path / "libcuda.so.1"))


@pytest.fixture
def driver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> MakeDriver:
    """Makes a libcuda.so.1 of one card, unless told what C its cuInit is to run; 0: it says no version."""

    def make(init: str = "return 0;", version: int = 13000) -> None:
        says = f"int cuDriverGetVersion(int *version) {{ *version = {version}; return 0; }}" if version else ""
        source = f"""#include <signal.h>\n#include <unistd.h>\n{says}
            int cuInit(unsigned flags) {{ {init} }}
            int cuDeviceGetCount(int *count) {{ *count = 1; return 0; }}"""
        (tmp_path / "cuda.c").write_text(source)
        target = tmp_path / "libcuda.so.1"
        target.unlink(missing_ok=True)
        subprocess.run(["cc", "-shared", "-fPIC", "-o", target, tmp_path / "cuda.c"], check=True)
        monkeypatch.setenv("LD_LIBRARY_PATH", str(tmp_path))

    return make


@pytest.fixture
def cupy(tmp_path: Path) -> Callable[[str], None]:
    """Makes a package called cupy of this source."""

    def make(source: str) -> None:
        folder = tmp_path / "packages"
        folder.mkdir(exist_ok=True)
        (folder / "cupy.py").write_text(source)

    return make


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The children that were started."""
    started: list[str] = []
    ask = devices._asked

    def noting(module: str, *rest: Any) -> Any:
        started.append(module)
        return ask(module, *rest)

    monkeypatch.setattr(devices, "_asked", noting)
    return started


def test_without_a_driver_nothing_is_started(asked: list[str]) -> None:
    said: list[str] = []
    assert against_neurons(0, said.append) == ""
    chosen = resolve_devices(EngineConfig(), said.append)
    assert chosen == (None, "cpu")
    assert asked == said == []


def test_a_card_that_is_asked_for_without_a_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cupy", None)
    line = r"^cuda:0: CuPy cannot be imported \(.*\): there is no NVIDIA driver here; --gpu host emulates a GPU$"
    with pytest.raises(ResourceError, match=line):
        open_device("cuda:0")


@needs_compiler
@pytest.mark.parametrize(
    ("init", "against"),
    [
        ("return 100;", ""),
        ("return 999;", "the NVIDIA driver does not work: it reports error 999; see nvidia-smi"),
        ("raise(SIGSEGV); return 0;", "the process that checked cuda:0 with cupy was ended by SIGSEGV"),
        ("_exit(0);", "the process that checked cuda:0 with cupy failed"),
        ("for (;;) pause();", "checking cuda:0 with cupy took longer than 1.5 s"),
    ],
)
def test_broken_drivers(driver: MakeDriver, monkeypatch: pytest.MonkeyPatch, init: str, against: str) -> None:
    monkeypatch.setattr(devices, "_PATIENCE_S", 1.5 if "pause" in init else 30.0)
    driver(init)
    assert against_neurons(0, print) == against


@needs_compiler
@pytest.mark.parametrize(
    ("version", "advice"),
    [
        (13020, "run pip install 'warmfront[cuda13]'"),
        (12040, "run pip install 'warmfront[cuda12]'"),
        (11080, "update the NVIDIA driver, which runs no CUDA above 11.8"),
        (0, "run pip install 'warmfront[cuda13]', or 'warmfront[cuda12]' for a driver of CUDA 12"),
    ],
)
def test_without_cupy(driver: MakeDriver, version: int, advice: str) -> None:
    driver(version=version)
    said: list[str] = []
    chosen = resolve_devices(EngineConfig(), said.append)
    assert chosen == (None, "cpu")
    line = f"no GPU is used: cuda:0: CuPy cannot be imported (No module named 'cupy'): {advice}"
    assert said == ["checking cuda:0 with cupy (first use only)", line]


@needs_compiler
@pytest.mark.parametrize("option", ["vram_budget", "plan"])
def test_wishes_of_a_gpu_that_cannot_be_used(driver: MakeDriver, tmp_path: Path, option: str) -> None:
    driver()
    (tmp_path / "plan.json").write_text("{}")
    wish: Any = 1 << 30 if option == "vram_budget" else str(tmp_path / "plan.json")
    with pytest.raises(
        UsageError, match=r"^--[\w-]+, but no GPU can be used \(cuda:0: CuPy .*\): leave it out, or add"
    ):
        resolve_devices(EngineConfig(**{option: wish}), print)


@needs_compiler
@pytest.mark.parametrize(
    ("source", "against"),
    [
        (
            "raise ImportError('libnvrtc.so.13: cannot open')",
            "cannot be imported (libnvrtc.so.13: cannot open): run pip",
        ),
        ("raise ValueError('numpy is too new')", "ValueError: numpy is too new"),
        ("raise SystemExit", "the process that checked cuda:0 with cupy failed"),
        ("import ctypes; ctypes.string_at(0)", "was ended by SIGSEGV"),
        ("print('{}', flush=True); raise ValueError('after noise')", "ValueError: after noise"),
        (IDLE, "cuda:0 CPU stand-in computes wrong numbers"),
        (
            IDLE
            + "def fail(): raise RuntimeError('cudaErrorInsufficientDriver: CUDA driver version is insufficient')\n"
            "cuda.runtime.getDeviceCount = fail",
            "insufficient; run pip install 'warmfront[cuda12]'",
        ),
        (IDLE + "cuda.runtime.getDeviceCount = lambda: 0", "cuda:0: no such CUDA device: 0 visible"),
    ],
)
def test_broken_packages(driver: MakeDriver, cupy: Callable[[str], None], source: str, against: str) -> None:
    driver(version=12080)
    cupy(source)
    assert against in (against_neurons(0, print) or "")


@needs_compiler
def test_what_was_found_is_remembered(
    driver: MakeDriver, cupy: Callable[[str], None], asked: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While driver and package stay; what speaks against the card for an hour."""
    driver()
    cupy(IDLE)
    for _ in range(2):
        assert "wrong numbers" in (against_neurons(0, print) or "")
    assert len(asked) == 1
    started = time.perf_counter()
    against_neurons(0, print)
    assert time.perf_counter() - started < 0.1  # a few ms, where the machine has nothing else to do
    cupy("raise ValueError")
    assert against_neurons(0, print) == "ValueError:"
    driver(version=13010)
    against_neurons(0, print)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    against_neurons(0, print)
    assert len(asked) == 4
    file = tmp_path / "cache" / "warmfront" / "cupy-check.json"
    kept = json.loads(file.read_text())
    file.write_text(json.dumps(kept | {"at": kept["at"] - 3601}))
    against_neurons(0, print)
    assert len(asked) == 5
    file.write_text(json.dumps(kept | {"at": kept["at"] - 3601, "against": None}))
    assert against_neurons(0, print) is None
    for damaged in ("", "[]", "{}", '{"key": 1}'):
        file.write_text(damaged)
        against_neurons(0, print)
    assert len(asked) == 9


@needs_compiler
def test_a_lack_of_memory_is_not_remembered(driver: MakeDriver, cupy: Callable[[str], None], asked: list[str]) -> None:
    driver()
    cupy("raise MemoryError('out of memory')")
    for _ in range(2):
        assert "out of memory" in (against_neurons(0, print) or "")
    assert len(asked) == 2


@needs_compiler
@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
def test_a_card_that_computes_rightly(driver: MakeDriver, cupy: Callable[[str], None]) -> None:
    """The kernels on the CPU in its stead; torch, which sees no card, keeps attention on the CPU."""
    driver()
    cupy(f"__file__ = {str(STAND_IN / 'cupy.py')!r}\nexec(open(__file__).read())")
    said: list[str] = []
    chosen = resolve_devices(EngineConfig(vram_budget=1 << 20), said.append)
    assert chosen == ("cuda:0", "cpu")
    assert len(said) == 3
    assert said[2].startswith("attention stays on the CPU: torch ")
    assert resolve_devices(EngineConfig(selector="lowbit"), said.append).attention == "cpu"
    assert len(said) == 3


@needs_compiler
def test_torch_without_a_card(driver: MakeDriver) -> None:
    driver()
    assert "does not see cuda:99" in (against_attention(99, print) or "")
