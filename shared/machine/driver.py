"""What the NVIDIA driver says, through ctypes: no GPU package need be installed.

A broken driver may hang or crash its caller. So `find_driver` calls nothing in it, and the other functions are for
processes that may be lost: the GPU worker, and the children that check a card (`answer`).
"""

import ctypes
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path

from warmfront.shared.errors import ResourceError
from warmfront.shared.machine.process import die_with_parent

__all__ = ["answer", "count_devices", "cupy_extra", "find_driver"]

_LIBRARY = "libcuda.so.1"
_NO_DEVICE = 100  # CUDA_ERROR_NO_DEVICE
_LINK_MAP = 2  # RTLD_DI_LINKMAP


class _LinkMap(ctypes.Structure):
    """The head of the loader's struct link_map."""

    _fields_ = (("address", ctypes.c_void_p), ("name", ctypes.c_char_p))


def find_driver() -> Path | None:
    """The driver's library; None where no driver is installed."""
    try:
        library = ctypes.CDLL(_LIBRARY)
    except OSError:
        return None
    found = ctypes.POINTER(_LinkMap)()
    ctypes.CDLL(None).dlinfo(ctypes.c_void_p(library._handle), _LINK_MAP, ctypes.byref(found))
    return Path(found.contents.name.decode()).resolve()


def _driver_version() -> int:
    """The newest CUDA version that the driver runs, such as 12040 for 12.4; 0 if it does not say."""
    version = ctypes.c_int(0)
    try:
        ctypes.CDLL(_LIBRARY).cuDriverGetVersion(ctypes.byref(version))
    except (OSError, AttributeError):
        return 0
    return version.value


def count_devices() -> int:
    """How many CUDA devices the driver shows. Raises ResourceError if it does not work."""
    driver, count = ctypes.CDLL(_LIBRARY), ctypes.c_int(0)
    error = driver.cuInit(0) or driver.cuDeviceGetCount(ctypes.byref(count))
    if error not in (0, _NO_DEVICE):
        raise ResourceError(f"the NVIDIA driver does not work: it reports error {error}; see nvidia-smi")
    return count.value


def cupy_extra() -> str:
    """Advice on how to get a CuPy that fits the driver."""
    if find_driver() is None:
        return "there is no NVIDIA driver here; --gpu host emulates a GPU"
    version = _driver_version()
    if 0 < version < 12000:
        return f"update the NVIDIA driver, which runs no CUDA above {version // 1000}.{version % 1000 // 10}"
    if version == 0:
        return "run pip install 'warmfront[cuda13]', or 'warmfront[cuda12]' for a driver of CUDA 12"
    return f"run pip install 'warmfront[cuda{12 if version < 13000 else 13}]'"


def answer(against: Callable[[int], str | None]) -> None:
    """Be a child that checks a card: `python -m MODULE INDEX PARENT`, see coordinator/engine/devices/reasons.py.

    Prints one line of JSON. "against": the reason not to use the device, as `against` returns or raises it; null if
    there is none, "" where there is no card. "lasts": whether the answer may be remembered for the next start.
    """
    die_with_parent(int(sys.argv[2]))
    out = os.dup(1)
    os.dup2(2, 1)  # what libraries print to stdout is not the answer
    try:
        found, lasts = against(int(sys.argv[1])), True
    except Exception as error:
        found = str(error) if isinstance(error, ResourceError) else f"{type(error).__name__}: {error}"
        lasts = "memory" not in found.lower()
    os.write(out, json.dumps({"against": found, "lasts": lasts}).encode())
