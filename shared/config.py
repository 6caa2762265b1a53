"""What a user can wish for, as frozen dataclasses; the CLI reads its defaults from here.

    EngineConfig   how the model is loaded and run     Engine.load(model, **overrides), every command
    Sampling       how the next token is chosen        engine.generate(prompt, sampling=...), generate, chat

Both check themselves and raise UsageError.
"""

import operator
import re
from dataclasses import dataclass, fields
from numbers import Integral, Real
from typing import Any, get_args

from warmfront.shared.errors import UsageError
from warmfront.shared.offload import OFFLOAD_POLICIES, PRESETS, OffloadStrategy
from warmfront.shared.selector import wished_selector

__all__ = [
    "ACTIVATIONS",
    "ATTENTION_PATTERN",
    "BITS",
    "CORE_SCORES",
    "DTYPES",
    "GPU_PATTERN",
    "KV_TYPES",
    "MIN_REFRESH",
    "POLICIES",
    "SPECULATIONS",
    "THREADING",
    "EngineConfig",
    "Sampling",
    "parse_size",
    "parse_slow",
    "whole_number",
]

# Of a weight in the selector lowbit's copies.
BITS = (1, 2, 4)
# Of the feed-forward layers, as `FeedForward.activation_name` has it.
ACTIVATIONS = ("auto", "silu", "relu", "gelu", "gelu_tanh", "relu2", "drelu", "fatrelu:T", "swiglu_oai:T")
_ACTIVATION_PATTERN = re.compile("|".join(ACTIVATIONS).replace(":T", r":-?\d+(\.\d+)?([eE]-?\d+)?"))
# How tokens score the neurons of a core, and the fewest of them between two choices.
CORE_SCORES = ("norm", "positive")
MAX_PARALLEL = 64
MIN_REFRESH = 8
DTYPES = ("auto", "f32", "f16", "bf16", "q8", "q4", "q4f")
# Of the keys and values in the KV cache.
KV_TYPES = ("auto", "f32", "f16", "q8")
# How tokens are guessed that are computed before they are known to come.
SPECULATIONS = ("ngram", "off")
# How groups move between the workers; the names of coordinator/balancing/policies.py.
POLICIES = ("balance", "static", "by-layer", "prompt", "lru", "ema", "ema-published", "core")
# The wishes that say which threads run.
THREADING = ("workers", "threads", "coordinator_threads", "spins", "force", "pin")
GPU_PATTERN = re.compile(r"auto|none|host|cuda:\d+")
ATTENTION_PATTERN = re.compile(r"auto|cpu|host|cuda:\d+")
_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12, "ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}


def parse_size(text: str) -> int:
    """Bytes of "512MB", "1.5GiB", "8G" or "4096". Raises UsageError if it is none of these."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kmgt]i?)?b?", text.strip().lower())
    if match is None:
        raise UsageError(f"{text!r} is not a size: write it like 512MB, 1.5GiB or 8G")
    return int(float(match[1]) * _UNITS[match[2] or ""])


def parse_slow(text: str | None) -> dict[str, float]:
    """How many times slower which CPU workers are to seem, from "cpu0:4,cpu1:1.5". Raises UsageError for other text."""
    slow = {}
    for part in text.split(",") if text else ():
        match = re.fullmatch(r"(cpu\d+):(\d+(?:\.\d+)?)", part.strip())
        if match is None or float(match[2]) < 1:
            raise UsageError(f"{part!r} slows no worker down: write it like cpu0:4, with a factor of 1 or more")
        slow[match[1]] = float(match[2])
    return slow


def _check_types(config: Any) -> None:
    """Raise UsageError for a field that is of another type than declared; numpy's numbers are numbers too."""
    kinds: dict[type, tuple[type, ...]] = {int: (Integral,), float: (Real,)}
    for field in fields(config):
        allowed, value = get_args(field.type) or (field.type,), getattr(config, field.name)
        if isinstance(value, bool) and bool not in allowed:
            good = False  # for Python it is a number
        else:
            good = any(isinstance(value, kinds.get(kind, kind)) for kind in allowed)
        if not good:
            names = " or ".join("None" if kind is type(None) else kind.__name__ for kind in allowed)
            raise UsageError(f"{field.name}={value!r}: it must be of type {names}")


def whole_number(what: str, value: object, least: int | None = None) -> int:
    """`value` as an int. Raises UsageError if it is not a whole number, or below `least`."""
    try:
        number = operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        number = None
    if number is None or (least is not None and number < least):
        wish = "a whole number" if least is None else f"a whole number, {least} or more"
        raise UsageError(f"{what} is {value!r}: it must be {wish}")
    return number


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    """How to load and run a model; "auto" and None leave the choice to warmfront."""

    # Of the weights in memory.
    dtype: str = "auto"
    # Of the feed-forward layers.
    activation: str = "auto"
    # Which neurons are computed. For lowbit: bits of a weight in its copies, and the recall by mass for which its
    # thresholds are calibrated.
    selector: str = "auto"
    bits: int = 2
    recall: float | None = None
    # What lowbit or a core may lose, in nats of KL divergence a token, before it gives way to what loses nothing.
    max_loss: float | None = None
    # For lowrank: a file of `warmfront train-predictor` instead of the model's own predictors.
    predictor: str | None = None
    # For core: the share of a layer's neurons that it keeps; how tokens score neurons; and after how many tokens of an
    # answer it is chosen again, 0: never.
    keep: float = 0.4
    core_score: str = "norm"
    refresh: int = 0
    # CPU worker processes, one for each NUMA node; compute threads in all, one for each core; threads of the
    # coordinator's team, as many as the workers'.
    workers: int | None = None
    threads: int | None = None
    coordinator_threads: int | None = None
    # Rounds that a thread spins at a barrier before it yields its core.
    spins: int | None = None
    # More threads than cores are meant.
    force: bool = False
    # Threads stay on their cores, and memory on its node.
    pin: bool = True
    # Take what `warmfront tune` found, where none of these is given, and measure how memory is best read.
    tuning: bool = True
    # Of the GPU worker; bytes of device memory for it.
    gpu: str = "auto"
    vram_budget: int | None = None
    # Bytes of memory for the neurons of the CPU workers, which then cache the packed file; None: they hold all. Which
    # neurons go first, and the tokens of the policy `window`.
    ram_budget: int | None = None
    offload_policy: str = "balance"
    offload_window: int = 5
    # What is there is computed while the rest is read.
    offload_asynchronous: bool = True
    # Instead: shares of the neurons, or the name of a preset (`offload.py`).
    offload: str | OffloadStrategy | None = None
    # Where attention, predictors and head run: on the CPU, or on a device of torch's.
    attention: str = "auto"
    # How neurons move between the workers.
    policy: str = "balance"
    # How tokens are guessed that are computed before they are known to come.
    speculate: str = "off"
    # A file of `warmfront plan` to begin with.
    plan: str | None = None
    # Tokens that the KV cache holds, and the type of its keys and values.
    context: int | None = None
    kv: str = "auto"
    # How many texts as long as that it holds.
    parallel: int = 1
    # Compare the selected neurons with those that fire, for one token of 64.
    measure: bool = False
    # Check for every token that each selected neuron was computed exactly once.
    verify: bool = False
    # Predict a layer's neurons from the input of the layer before, while that one is computed.
    look_ahead: bool = False
    # A file to write a Chrome trace to.
    trace: str | None = None
    # An emulation: CPU workers that are to seem slower than they are, such as "cpu0:4".
    slow: str | None = None

    def __post_init__(self) -> None:
        _check_types(self)
        if self.dtype not in DTYPES:
            raise UsageError(f"no weight type {self.dtype!r}: use one of {', '.join(DTYPES)}")
        if not _ACTIVATION_PATTERN.fullmatch(self.activation):
            raise UsageError(
                f"no activation {self.activation!r}: use one of {', '.join(ACTIVATIONS)}, T being a number such as 0.01"
            )
        wished_selector(self.selector)
        if self.kv not in KV_TYPES:
            raise UsageError(f"no type {self.kv!r} of keys and values: use one of {', '.join(KV_TYPES)}")
        if self.bits not in BITS:
            raise UsageError(f"low-bit copies of {self.bits} bits: use 1, 2 or 4")
        if self.recall is not None and not 0.5 <= self.recall < 1:
            raise UsageError(f"a recall of {self.recall}: it must be at least 0.5 and below 1")
        if self.max_loss is not None and not 0 <= self.max_loss < float("inf"):
            raise UsageError(f"a loss of {self.max_loss}: it must be 0 or more nats")
        if not 0 < self.keep <= 1:
            raise UsageError(f"a core that keeps {self.keep} of the neurons: it must be above 0, up to 1")
        if self.core_score not in CORE_SCORES:
            raise UsageError(f"no score {self.core_score!r}: use one of {', '.join(CORE_SCORES)}")
        if self.refresh != 0 and self.refresh < MIN_REFRESH:
            raise UsageError(
                f"a core refreshed every {self.refresh} tokens: pass --refresh {MIN_REFRESH} or more, or 0"
            )
        if not GPU_PATTERN.fullmatch(self.gpu):
            raise UsageError(f"no GPU {self.gpu!r}: use auto, none, host or cuda:N")
        if not ATTENTION_PATTERN.fullmatch(self.attention):
            raise UsageError(f"no device {self.attention!r} for attention: use auto, cpu, host or cuda:N")
        if self.policy not in POLICIES:
            raise UsageError(f"no policy {self.policy!r}: use one of {', '.join(POLICIES)}")
        if self.ram_budget is not None and self.ram_budget < 1:
            raise UsageError(f"a RAM budget of {self.ram_budget} bytes: pass --ram-budget with a size such as 4GB")
        if self.offload_policy not in OFFLOAD_POLICIES:
            raise UsageError(
                f"no policy {self.offload_policy!r} of offloading: use one of {', '.join(OFFLOAD_POLICIES)}"
            )
        if self.offload_window < 0:
            raise UsageError(f"a window of {self.offload_window} tokens: pass --offload-window 0 or more")
        if isinstance(self.offload, str) and self.offload not in PRESETS:
            raise UsageError(f"no preset {self.offload!r} of offloading: use one of {', '.join(PRESETS)}")
        if self.offload is not None and self.ram_budget is not None:
            raise UsageError("--offload with --ram-budget: leave one of the two out")
        if self.speculate not in SPECULATIONS:
            raise UsageError(f"no speculation {self.speculate!r}: use one of {', '.join(SPECULATIONS)}")
        for option, wish in (("--vram-budget", self.vram_budget), ("--plan", self.plan)):
            if wish is not None and self.gpu == "none":
                raise UsageError(f"{option} with --gpu none: leave one of the two out")
        if self.plan is not None and self.policy == "by-layer":
            raise UsageError("--plan with --policy by-layer, which begins with whole layers: leave one of the two out")
        parse_slow(self.slow)
        if self.spins is not None and not 0 <= self.spins <= 1_000_000:
            raise UsageError(f"{self.spins} rounds of spinning: pass --spins 0 to 1000000")
        if self.context is not None and self.context < 1:
            raise UsageError(f"a context of {self.context} tokens: pass --ctx 1 or more")
        if not 1 <= self.parallel <= MAX_PARALLEL:
            raise UsageError(f"{self.parallel} texts side by side: pass --parallel 1 to {MAX_PARALLEL}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How the next token is chosen: greedy at temperature 0, else drawn from what the filters leave.

    The filters act in this order: repetition penalty, temperature, top_k, top_p, min_p. Without a seed the draw
    differs from run to run.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None

    def __post_init__(self) -> None:
        _check_types(self)
        for name, good, wish in (
            ("temperature", 0 <= self.temperature < float("inf"), "0 or more"),
            ("top_k", self.top_k >= 0, "0 (off) or more"),
            ("top_p", 0 < self.top_p <= 1, "above 0, up to 1"),
            ("min_p", 0 <= self.min_p <= 1, "between 0 and 1"),
            ("repetition_penalty", 0.01 <= self.repetition_penalty <= 100, "between 0.01 and 100"),
            ("seed", self.seed is None or self.seed >= 0, "0 or more"),
        ):
            if not good:
                raise UsageError(f"{name} is {getattr(self, name)}: it must be {wish}")
