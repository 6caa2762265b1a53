"""Whether a CUDA device can be used, found out by using it, in a child process with a time limit.

    neurons     gpu_worker/check.py    CuPy and the kernels
    attention   torch_check.py         torch

A broken driver, CuPy or torch may hang, crash or compute nonsense: the child finds out, and the coordinator calls
nothing of theirs. What was found is kept in the cache, and holds while driver, cards, packages and kernels are the
same; what speaks against a device is asked again after an hour. Without a driver nothing is started.
"""

import contextlib
import hashlib
import json
import os
import signal
import subprocess
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

from warmfront.shared.files import make_folder, write_whole
from warmfront.shared.machine.driver import find_driver
from warmfront.shared.machine.process import python_module_command
from warmfront.shared.paths import cache_root

__all__ = ["against_attention", "against_neurons"]

Say = Callable[[str], None]

# Importing torch or CuPy from a cold disk and compiling takes ten seconds or more.
_PATIENCE_S = 60.0
_HOLDS_S = 3600.0
_TOP = Path(__file__).parents[2]
# What decides which cards and libraries a process finds.
_VARIABLES = ("CUDA_VISIBLE_DEVICES", "CUDA_DEVICE_ORDER", "CUDA_PATH", "LD_LIBRARY_PATH", "PYTHONPATH")


def against_neurons(index: int, say: Say) -> str | None:
    """What speaks against a GPU worker on device `index`: None if nothing does, "" where there is no card."""
    sources = ("ffn.cu", "prefill.cu", "cuda.py", "launch.py", "check.py")
    return _against("warmfront.gpu_worker.check", index, "cupy", [_TOP / "gpu_worker" / name for name in sources], say)


def against_attention(index: int, say: Say) -> str | None:
    """What speaks against attention on device `index`, as above."""
    return _against(
        "warmfront.coordinator.engine.devices.torch_check",
        index,
        "torch",
        [Path(__file__).with_name("torch_check.py")],
        say,
    )


def _against(module: str, index: int, package: str, sources: list[Path], say: Say) -> str | None:
    driver = find_driver()
    if driver is None:
        return ""
    parts = [
        module,
        index,
        _version(driver),
        *map(_text, sorted(Path("/proc/driver/nvidia").glob("gpus/*/information"))),
    ]
    parts += [_text(Path("/proc/driver/nvidia/version")), *map(_text, sources), *map(os.environ.get, _VARIABLES)]
    if (spec := find_spec(package)) is not None and spec.origin is not None:
        origin = Path(spec.origin)
        parts += map(_version, (origin, origin.with_name("_version.py"), origin.with_name("version.py")))
    key = hashlib.sha256(json.dumps(parts).encode()).hexdigest()
    file = cache_root() / f"{package}-check.json"
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        kept = json.loads(file.read_bytes())
        if kept["key"] == key and (kept["against"] is None or 0 <= time.time() - kept["at"] < _HOLDS_S):
            return None if kept["against"] is None else str(kept["against"])
    say(f"checking cuda:{index} with {package} (first use only)")
    against, lasts = _asked(module, package, index)
    if lasts:
        with contextlib.suppress(OSError):  # then the next start asks again
            make_folder(file.parent)
            write_whole(file, json.dumps({"key": key, "at": time.time(), "against": against}).encode())
    return against


def _version(path: Path) -> list[str | int]:
    """What tells a file from a later one in its place."""
    try:
        status = path.stat()
    except OSError:
        return [str(path)]
    return [str(path), status.st_size, status.st_mtime_ns]


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _asked(module: str, package: str, index: int) -> tuple[str | None, bool]:
    """What the child says against the device, and whether that lasts."""
    child = subprocess.Popen(
        python_module_command(module, str(index), str(os.getpid())),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        out, _ = child.communicate(timeout=_PATIENCE_S)
        answer = json.loads(out)
        against = answer["against"]
        return None if against is None else " ".join(str(against).split()), bool(answer["lasts"])
    except subprocess.TimeoutExpired:
        return f"checking cuda:{index} with {package} took longer than {_PATIENCE_S:g} s", True
    except (ValueError, KeyError, TypeError):
        how = f"was ended by {signal.Signals(-child.returncode).name}" if child.returncode < 0 else "failed"
        return f"the process that checked cuda:{index} with {package} {how}", True
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)
        with contextlib.suppress(subprocess.TimeoutExpired):  # one that hangs in the driver may outlive its killing
            child.communicate(timeout=2)
