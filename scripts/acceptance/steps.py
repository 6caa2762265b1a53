"""The steps of the acceptance: each runs in a process of its own and returns its figures, or raises what is wrong.

A step may raise `Skipped`. Tokens are compared with those of the CPU alone. The names of the figures say what is
measured (docs/gpu-measurements.md).
"""

import importlib.util
import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from model import Shape, prompt, write_model

__all__ = ["STEPS", "Job", "Skipped", "Step"]

Figures = dict[str, Any]

# The first is compared token by token in float32, the second measured in float16 (a smaller one on an emulated card).
SMALL = Shape(hidden=256, layers=4, ffn=1024, vocab=512)
LARGE = Shape(hidden=2048, layers=8, ffn=8192, vocab=4096)
TOKENS = 96
# What the product imports to load a Hugging Face folder.
NEEDED = ("numpy", "numba", "msgpack", "click", "zmq", "tokenizers", "safetensors", "gguf", "torch")
JOB = 288  # tokens of the largest prefill job


class Skipped(Exception):
    """Why this step cannot say anything here."""


class Job(NamedTuple):
    """What a step works with."""

    gpu: str  # cuda:N, or host
    folder: Path  # shared by all steps

    @property
    def emulated(self) -> bool:
        return self.gpu == "host"

    @property
    def large(self) -> Shape:
        return SMALL._replace(ffn=2048) if self.emulated else LARGE


class Step(NamedTuple):
    """A step of the acceptance."""

    run: Callable[[Job], Figures]
    limit_s: float  # after which it is killed
    on_card: bool = False  # nothing of it can be emulated
    needs_models: bool = False  # those that `models` writes


def environment(job: Job) -> Figures:
    """Versions of all that is needed; raises RuntimeError for what cannot be imported."""
    versions, missing = {"python": sys.version.split()[0]}, []
    for name in (*NEEDED, *(() if job.emulated else ("cupy", "pytest"))):
        try:
            versions[name] = getattr(importlib.import_module(name), "__version__", "there")
        except ImportError as error:
            missing.append(f"{name} ({error})")
    if missing:
        raise RuntimeError(f"missing: {', '.join(missing)}; docs/gpu-measurements.md tells which wheels to bring")
    if not job.emulated:
        from warmfront.shared.machine.driver import find_driver

        versions["driver"] = str(find_driver())
        import cupy
        import torch

        versions["cuda"] = str(cupy.cuda.runtime.driverGetVersion())
        if not torch.cuda.is_available():
            raise RuntimeError(f"torch {torch.__version__} sees no CUDA device")
    versions["device"] = _device(job).name
    return versions


def choice(job: Job) -> Figures:
    """`--gpu auto` and `--attention auto` take the card."""
    from warmfront.coordinator.engine.resolve import resolve_devices
    from warmfront.shared.config import EngineConfig

    if job.gpu != "cuda:0":
        raise Skipped("auto only takes cuda:0")
    said: list[str] = []
    chosen = resolve_devices(EngineConfig(), said.append)
    if (chosen.gpu, chosen.attention) != ("cuda:0", "cuda:0"):
        raise RuntimeError(
            f"auto takes {chosen.gpu}, attention on {chosen.attention}; it said: {' / '.join(said) or 'nothing'}"
        )
    started = time.perf_counter()
    resolve_devices(EngineConfig(), said.append)
    return {"warm_choice_ms": (time.perf_counter() - started) * 1e3}


def tests(job: Job) -> Figures:
    """The tests that need a card."""
    root, files = Path(__file__).parents[2], ["tests/gpu_worker"]
    if importlib.util.find_spec("transformers") is not None:  # it makes their models
        files += ["tests/coordinator/decode/test_torch_team.py", "tests/integration/test_card.py"]
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", *files]
    done = subprocess.run(command, cwd=root, capture_output=True, encoding="utf-8", check=False)
    last = (done.stdout.strip().splitlines() or [done.stderr.strip()[-200:]])[-1]
    if done.returncode != 0 or "passed" not in last or "skipped" in last:
        raise RuntimeError(f"pytest -m gpu: {last}")
    return {"pytest": last}


def models(job: Job) -> Figures:
    """Write both models; keep the CPU's tokens of the small one."""
    write_model(job.folder / "small", SMALL, np.float32)
    write_model(job.folder / "large", job.large, np.float16)
    with _engine(job, "small", gpu="none", attention="cpu") as engine:
        expected = [engine.decode_ids(prompt(SMALL, length, topic), TOKENS) for topic, length in ((0, 300), (1, 5))]
    if min(len(set(answer)) for answer in expected) < 5:
        raise RuntimeError("the model of the test repeats itself: its tokens would show nothing")
    (job.folder / "expected.json").write_text(json.dumps(expected), encoding="utf-8")
    with _engine(job, "large", gpu="none", attention="cpu") as engine:
        return {"large_model_load_s": engine.stats.load_s}


def tokens(job: Job) -> Figures:
    """Attention on the CPU: greedy tokens at four budgets."""
    return _compare(job, "cpu")


def tokens_attention(job: Job) -> Figures:
    """Attention on the card, or emulated."""
    return _compare(job, job.gpu)


def _compare(job: Job, attention: str) -> Figures:
    for share in (0.25, 0.5, 0.75, 1.0):
        with _engine(job, "small", share, attention=attention) as engine:
            _assert_tokens(job, engine, f"with {share:.0%} of the groups")
            if engine.statistics.workers()[-1].neurons == 0:
                raise RuntimeError(f"the GPU worker computed nothing with {share:.0%} of the groups")
    return {"budgets": 4}


def moves(job: Job) -> Figures:
    """A load that shifts from topic to topic: groups move, each neuron is computed once, the tokens are the same.

    The CPU worker is slowed down, so that moving pays with a small model too.
    """
    figures = {}
    for policy in ("balance", "ema"):
        with _engine(job, "small", 0.25, policy=policy, slow="cpu0:8", verify=True) as engine:
            for _ in range(3):
                _assert_tokens(job, engine, f"while {policy} moves groups")
            figures[f"{policy}_moves"] = engine.ownership.flow.moves
    if min(figures.values()) == 0:
        raise RuntimeError(f"nothing moved: {figures}")
    return figures


def killed(job: Job) -> Figures:
    """The GPU worker is killed within an answer: the tokens are the same, and another worker is started."""
    expected = json.loads((job.folder / "expected.json").read_text(encoding="utf-8"))[1]
    said: list[str] = []
    with _engine(job, "small", 0.5, say=said.append) as engine:
        first = engine.statistics.workers()[-1].pid
        answer = []
        for token in engine.generate(prompt(SMALL, 5, 1), max_new_tokens=TOKENS):
            answer.append(token.id)
            if len(answer) == 10:
                os.kill(first, signal.SIGKILL)
                died = time.monotonic()
        if answer != expected[:TOKENS]:
            raise RuntimeError("the tokens differ from the CPU's after the GPU worker was killed")
        while not (back := any("is back" in line for line in said)) and time.monotonic() < died + 30:
            engine.decode_ids(prompt(SMALL, 5, 1), 20)
        if not back or engine.statistics.workers()[-1].pid == first:
            raise RuntimeError("no GPU worker has come back within 30 s")
        took = time.monotonic() - died
        _assert_tokens(job, engine, "after the GPU worker came back")
    return {"worker_back_s": took}


def device(job: Job) -> Figures:
    """The device alone: a call, copies to slots, kernels against the bandwidth of its memory."""
    from warmfront.shared.model.formats import Kind

    memory = None if job.emulated else _memory_gb_s()
    figures: Figures = {} if memory is None else {"memory_gb_s": memory}
    for kind, down in ((Kind.F16, Kind.F16), (Kind.Q8, Kind.Q8), (Kind.Q4, Kind.Q4C)):
        for name, value in _kernels(job, kind, down).items():
            figures[f"{kind.name.lower()}_{name}"] = value
            if memory is not None and name == "decode_gb_s":
                figures[f"{kind.name.lower()}_share_of_memory"] = value / memory
    return figures


def _kernels(job: Job, kind: int, down: int) -> Figures:
    """A layer of these weight types: compiling, copying, a call of one group, one token, a job of the most tokens."""
    from warmfront.shared.model.architecture import FeedForward
    from warmfront.shared.model.bundle import GROUP, BundleLayout

    hidden, groups = (256, 32) if job.emulated else (4096, 344)
    layout = BundleLayout(hidden=hidden, ffn=groups * GROUP, gate_kind=kind, down_kind=down)
    card, slots = _device(job), np.arange(groups, dtype=np.int32)
    compiled = _wall(lambda: card.reserve(layout, FeedForward(activation="relu"), groups, JOB))
    copied = []
    for at in range(0, groups, card.batch):
        chunk = slots[at : at + card.batch]
        # These bytes are a small positive weight in all types: every gate is open, everything is read.
        card.staging(len(chunk))[:] = 0x22
        copied.append(len(chunk) * layout.group_bytes / card.fill(chunk, card.staging(len(chunk))))
    x = np.abs(np.random.default_rng(1).standard_normal((JOB, hidden), np.float32))
    out, inverse = np.empty(x.shape, np.int64), np.full(JOB, 2.0**20, np.float32)
    x_panels, out_panels = (vectors.reshape(-1, hidden, 16) for vectors in (x, out))
    one = (x[:1], inverse[:1], True, out[:1])
    read = groups * GROUP * (layout.gate_bytes + layout.rest_bytes)
    figures = {
        "compile_s": compiled / 1e9,
        "copy_gb_s": max(copied),
        "call_us": _median(lambda: _wall(lambda: card.execute(slots[:1], *one))) / 1e3,
        "decode_gb_s": read / _median(lambda: card.execute(slots, *one)[1]),
        "prefill_tflop_s": 6e-3
        * groups
        * GROUP
        * hidden
        * JOB
        / _median(lambda: card.execute_many(slots, x_panels, inverse, JOB, out_panels)[1]),
    }
    card.close()
    return figures


def handover(job: Job) -> Figures:
    """What a job of a single group takes in the running engine, from its announcement to its answer."""
    with _engine(job, "small", 0, policy="static", attention="cpu") as engine:
        engine.decode_ids(prompt(SMALL, 5), 200)
        worker = engine.statistics.workers()[-1]
    return {"job_us": worker.busy_s / worker.jobs * 1e6}


def speed(job: Job) -> Figures:
    """Decode and prefill of the larger model, with half of its groups on the GPU, by policy."""
    ways: dict[str, dict[str, Any]] = {"cpu": {"gpu": "none", "attention": "cpu"}}
    ways |= {policy: {"policy": policy, "attention": "cpu"} for policy in ("static", "balance", "ema")}
    ways["balance_attention"] = {"policy": "balance", "attention": job.gpu}
    figures: Figures = {}
    for name, overrides in ways.items():
        with _engine(job, "large", None if name == "cpu" else 0.5, **overrides) as engine:
            engine.decode_ids(prompt(job.large, 16), 64)
            engine.reset()
            rates = []
            for topic in (0, 1, 0):
                engine.decode_ids(prompt(job.large, 2 * JOB, topic), 64)
                rates.append((engine.stats.decode_tps, engine.stats.prefill_tps))
        decode, prefill = np.median(rates, axis=0)
        figures |= {f"{name}_decode_tok_s": float(decode), f"{name}_prefill_tok_s": float(prefill)}
    return figures


STEPS = {
    "environment": Step(environment, 90),
    "choice": Step(choice, 120, on_card=True),
    "models": Step(models, 200),
    "tokens": Step(tokens, 150, needs_models=True),
    "tokens_attention": Step(tokens_attention, 150, needs_models=True),
    "moves": Step(moves, 90, needs_models=True),
    "killed": Step(killed, 90, needs_models=True),
    "device": Step(device, 120),
    "handover": Step(handover, 60, needs_models=True),
    "speed": Step(speed, 150, needs_models=True),
    "tests": Step(tests, 240, on_card=True),
}


def _device(job: Job) -> Any:
    from warmfront.gpu_worker.open import open_device

    return open_device(job.gpu)


@contextmanager
def _engine(
    job: Job, name: str, share: float | None = None, *, say: Callable[[str], None] = print, **overrides: Any
) -> Iterator[Any]:
    """An engine of a model, the GPU holding `share` of its groups, at least one."""
    from warmfront.coordinator import Engine
    from warmfront.shared.model.bundle import BundleLayout
    from warmfront.shared.model.formats import Kind

    shape, kind, dtype = (SMALL, Kind.F32, "f32") if name == "small" else (job.large, Kind.F16, "f16")
    overrides = {"gpu": job.gpu, "attention": "cpu", "dtype": dtype, "context": shape.context} | overrides
    if share is not None:
        layout = BundleLayout(hidden=shape.hidden, ffn=shape.ffn, gate_kind=kind, down_kind=kind)
        slots = max(1, math.ceil(share * shape.layers * layout.groups))
        overrides["vram_budget"] = sum(_device(job).ledger(layout, slots, JOB).values())
    with Engine.load(str(job.folder / name), say=say, **overrides) as engine:
        yield engine


def _assert_tokens(job: Job, engine: Any, when: str) -> None:
    for topic, expected in enumerate(json.loads((job.folder / "expected.json").read_text(encoding="utf-8"))):
        answer = engine.decode_ids(prompt(SMALL, (300, 5)[topic], topic), TOKENS)
        if answer != expected:
            at = next(i for i, pair in enumerate(zip(answer, expected, strict=True)) if pair[0] != pair[1])
            raise RuntimeError(f"token {at} differs from the CPU's {when}: {answer[at]}, not {expected[at]}")


def _wall(call: Callable[[], object]) -> int:
    started = time.perf_counter_ns()
    call()
    return time.perf_counter_ns() - started


def _median(measure: Callable[[], int], rounds: int = 20) -> float:
    """The median of `rounds` calls after two to warm up, in ns."""
    return float(np.median([measure() for _ in range(rounds + 2)][2:]))


def _memory_gb_s() -> float:
    """Bandwidth of the card's memory: a copy within it reads and writes each byte."""
    import cupy

    size, cuda = 1 << 30, cupy.cuda
    one, other = (cuda.memory.Memory(size) for _ in range(2))
    begin, end, stream = cuda.Event(), cuda.Event(), cuda.get_current_stream()

    def copy() -> int:
        begin.record()
        cuda.runtime.memcpyAsync(other.ptr, one.ptr, size, cuda.runtime.memcpyDeviceToDevice, stream.ptr)
        end.record()
        end.synchronize()
        return round(cuda.get_elapsed_time(begin, end) * 1e6)

    return 2 * size / _median(copy)
