"""Tries warmfront on a CUDA card and measures it: one command, no network.

    scripts/gpu_acceptance [--gpu cuda:0 | --gpu host] [--steps tokens,moves] [--minutes 8]

Checks driver, CuPy and torch; runs the tests that need a card; compares greedy float32 tokens with the CPU's, also
while groups move and after the GPU worker was killed; measures calls, copies, kernels, decode and prefill. Each step is
a process with its own time limit, which is killed with all that it started; one that fails does not stop the others.
The last line is JSON, the exit code 1 if a step failed. What was measured on a card is added to
docs/gpu-measurements.md.

`--gpu host` does the same on the device emulated on the CPU, and says so in each line: its figures are not a card's,
and are not written down.
"""

import argparse
import datetime
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from steps import STEPS, Job, Skipped

ROOT = Path(__file__).parents[2]
MEASUREMENTS = ROOT / "docs" / "gpu-measurements.md"


def child(name: str, job: Job) -> None:
    """Run a step in this process; the last line of stdout is its result."""
    try:
        found = {"state": "ok", "figures": STEPS[name].run(job)}
    except Skipped as reason:
        found = {"state": "skipped", "reason": str(reason)}
    except Exception as error:
        found = {"state": "failed", "reason": " ".join(f"{type(error).__name__}: {error}".split())}
    print("\n" + json.dumps(found))


def run(name: str, job: Job, left_s: float) -> dict[str, Any]:
    """Run a step in a process group of its own; returns its state, its reason or figures, and seconds."""
    if job.emulated and STEPS[name].on_card:
        return {"state": "skipped", "reason": "needs a CUDA card", "seconds": 0.0}
    limit = min(STEPS[name].limit_s, left_s)
    if limit < 1:
        return {"state": "failed", "reason": "no time was left", "seconds": 0.0}
    started = time.monotonic()
    with tempfile.TemporaryFile() as out:
        process = subprocess.Popen(
            [sys.executable, __file__, "--child", name, "--gpu", job.gpu, "--folder", str(job.folder)],
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            process.wait(limit)
            how = f"it ended with exit code {process.returncode}"
        except subprocess.TimeoutExpired:
            how = f"it took longer than {limit:.0f} s"
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            with suppress(subprocess.TimeoutExpired):  # one that hangs in the driver may outlive SIGKILL
                process.wait(5)
        out.seek(0)
        lines = out.read().decode(errors="replace").strip().splitlines()
    found = {"state": "failed", "reason": f"{how}: {lines[-1][:300] if lines else 'it said nothing'}"}
    if how.endswith("code 0"):
        with suppress(ValueError, IndexError):
            found = json.loads(lines[-1])
    return found | {"seconds": round(time.monotonic() - started, 1)}


def shown(value: object) -> str:
    """A figure with four digits."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def table(name: str, found: dict[str, Any], emulated: bool) -> str:
    """The lines of a step for people."""
    mark = "emulated on the CPU | " if emulated else ""
    head = f"{mark}{found['state']:8} {name:18} {found['seconds']:6.1f} s  {found.get('reason', '')}".rstrip()
    rows = (f"{mark}{'':8} {key:28} {shown(value)}" for key, value in found.get("figures", {}).items())
    return "\n".join((head, *rows))


def note(results: dict[str, dict[str, Any]], command: str) -> None:
    """Add a row to the measurements of runs on a card."""
    figures = {key: value for found in results.values() for key, value in found.get("figures", {}).items()}
    failed = [name for name, found in results.items() if found["state"] == "failed"]
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, encoding="utf-8", check=False
    )
    cells = (
        f"{datetime.datetime.now(datetime.UTC):%Y-%m-%d %H:%M}",
        str(figures.get("device", "unknown")),
        f"`{command}` at {commit.stdout.strip() or 'an unknown commit'}",
        "; ".join(f"{key} {shown(value)}" for key, value in figures.items() if key != "device") or "none",
        ", ".join(failed) or "none",
    )
    with MEASUREMENTS.open("a", encoding="utf-8") as file:
        file.write(f"| {' | '.join(cell.replace('|', '/') for cell in cells)} |\n")


def main() -> int:
    """Run the steps; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="gpu_acceptance", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--gpu", default="cuda:0", help="cuda:N, or host: the emulated device")
    parser.add_argument("--steps", default=",".join(STEPS), help="default: %(default)s")
    parser.add_argument("--minutes", type=float, default=8, help="for all steps together")
    parser.add_argument("--child", choices=STEPS, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        child(options.child, Job(options.gpu, options.folder))
        return 0
    names = options.steps.split(",")
    if unknown := [name for name in names if name not in STEPS]:
        parser.error(f"no step {unknown[0]!r}: there are {', '.join(STEPS)}")
    if options.gpu != "host" and not options.gpu.startswith("cuda:"):
        parser.error(f"no device {options.gpu!r}: use cuda:N or host")
    names.append("environment")  # it names the card
    if any(STEPS[name].needs_models for name in names):
        names.append("models")
    deadline, results = time.monotonic() + 60 * options.minutes, dict[str, dict[str, Any]]()
    with tempfile.TemporaryDirectory(prefix="warmfront-acceptance-") as folder:
        os.environ["XDG_CACHE_HOME"] = cache(Path(folder))
        job = Job(options.gpu, Path(folder))
        for name in (name for name in STEPS if name in names):
            if STEPS[name].needs_models and results["models"]["state"] != "ok":
                results[name] = {"state": "failed", "reason": "there are no models", "seconds": 0.0}
            else:
                results[name] = run(name, job, deadline - time.monotonic())
            print(table(name, results[name], job.emulated), flush=True)
    if not job.emulated and any("figures" in found for found in results.values()):
        note(results, " ".join(["scripts/gpu_acceptance", *sys.argv[1:]]))
    print(json.dumps({"gpu": options.gpu, "emulated": job.emulated, "steps": results}))
    return int(any(found["state"] == "failed" for found in results.values()))


def cache(folder: Path) -> str:
    """A cache for the models in the folder, which is removed; the compiled kernels stay in the user's cache."""
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "warmfront" / "kernels"
    home.mkdir(parents=True, exist_ok=True)
    (folder / "cache" / "warmfront").mkdir(parents=True)
    (folder / "cache" / "warmfront" / "kernels").symlink_to(home)
    return str(folder / "cache")


if __name__ == "__main__":
    sys.exit(main())
