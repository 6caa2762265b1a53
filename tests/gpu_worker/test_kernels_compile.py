"""ffn.cu compiles for real cards, without a warning, in every combination of weight types. Nothing is run.

By nvcc down to machine code, and by NVRTC, which CuPy uses, down to PTX; each is skipped where it is not installed.

Run: pytest tests/gpu_worker/test_kernels_compile.py
"""

import ctypes
import shutil
import subprocess
from importlib.util import find_spec
from itertools import product
from pathlib import Path

import pytest

from tests.activations import NAMES, described
from warmfront.gpu_worker import launch
from warmfront.shared.model.bundle import BundleLayout
from warmfront.shared.model.formats import Kind

CARDS = ("80", "90")
KERNELS = ("gate_up", "down", "reduce", "gate_up_many", "down_many")


def options(gate: Kind, down: Kind, hidden: int = 576) -> tuple[str, ...]:
    """An activation by turns, and a kind of neurons: with a gate, without, with biases."""
    activation, number = NAMES[(gate + down) % len(NAMES)], gate + down
    gated = number % 3 != 1 or activation.startswith(("drelu", "swiglu_oai"))
    biases = ("up",) if number % 3 else ()
    layout = BundleLayout(hidden=hidden, ffn=1536, gate_kind=gate, down_kind=down, gated=gated, biases=biases)
    return launch.options(layout, described(activation))


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc, of the CUDA toolkit, in PATH")
@pytest.mark.parametrize(("gate", "down"), list(product([kind for kind in Kind if kind != Kind.Q4C], Kind)))
def test_nvcc(gate: Kind, down: Kind, tmp_path: Path) -> None:
    source, target = tmp_path / "ffn.cu", tmp_path / "ffn.fatbin"
    source.write_text(launch.source())
    targets = [f"-gencode=arch=compute_{card},code=sm_{card}" for card in CARDS]
    command = ["nvcc", "-fatbin", "-Werror", "all-warnings", "-Xptxas=-v", *targets, *options(gate, down)]
    result = subprocess.run([*command, str(source), "-o", str(target)], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert result.stderr.count("Compiling entry function") == len(CARDS) * len(KERNELS)
    assert result.stderr.count(" 0 bytes spill stores") == len(CARDS) * len(KERNELS), result.stderr


def nvrtc() -> ctypes.CDLL | None:
    """NVRTC as the wheels nvidia-cuda-nvrtc install it."""
    package = find_spec("nvidia")
    folders = package.submodule_search_locations if package else None
    found = [path for folder in folders or () for path in Path(folder).glob("cu*/lib/libnvrtc.so.*")]
    return ctypes.CDLL(str(found[0])) if found else None


@pytest.mark.parametrize("card", CARDS)
@pytest.mark.parametrize("kind", [kind for kind in Kind if kind != Kind.Q4C])
def test_nvrtc(kind: Kind, card: str) -> None:
    library = nvrtc()
    if library is None:
        pytest.skip("needs NVRTC: pip install nvidia-cuda-nvrtc")
    program = ctypes.c_void_p()
    code = launch.source().encode()
    assert library.nvrtcCreateProgram(ctypes.byref(program), code, b"ffn.cu", 0, None, None) == 0
    arguments = [f"--gpu-architecture=compute_{card}".encode(), *(text.encode() for text in options(kind, kind))]
    status = library.nvrtcCompileProgram(program, len(arguments), (ctypes.c_char_p * len(arguments))(*arguments))
    texts = {}
    for part in ("ProgramLog", "PTX"):
        size = ctypes.c_size_t()
        getattr(library, f"nvrtcGet{part}Size")(program, ctypes.byref(size))
        text = ctypes.create_string_buffer(size.value)
        getattr(library, f"nvrtcGet{part}")(program, text)
        texts[part] = text.value.decode()
    library.nvrtcDestroyProgram(ctypes.byref(program))
    assert status == 0, texts["ProgramLog"]
    assert texts["ProgramLog"] == ""
    assert all(f".entry {kernel}(" in texts["PTX"] for kernel in KERNELS)
