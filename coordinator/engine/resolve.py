"""What warmfront chooses where the user did not, and what it refuses: device, selector, context."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from warmfront.coordinator.engine.devices import against_attention, against_neurons
from warmfront.shared.config import PREDICTING, EngineConfig
from warmfront.shared.errors import UsageError
from warmfront.shared.machine.core_plan import CorePlan, plan_cores
from warmfront.shared.machine.topology import read_topology
from warmfront.shared.model.spec import ModelSpec
from warmfront.shared.model.store import PackedModel

__all__ = [
    "DEFAULT_CONTEXT",
    "choose_attention",
    "choose_context",
    "choose_cores",
    "choose_devices",
    "choose_selector",
]

DEFAULT_CONTEXT = 4096


def choose_cores(config: EngineConfig) -> CorePlan:
    """Who runs on which cpus, but for an emulated GPU. What is not pinned takes memory from anywhere."""
    plan = plan_cores(
        read_topology(), config.workers, config.threads, config.coordinator_threads, config.spins, config.force
    )
    if config.pin:
        return plan
    return replace(plan, workers=tuple(worker._replace(memory=None) for worker in plan.workers))


def choose_devices(config: EngineConfig, say: Callable[[str], None]) -> EngineConfig:
    """`config` with what `auto` stands for as GPU and attention: a CUDA device only if it computes rightly.

    Raises UsageError for wishes that need a GPU where there is none.
    """
    gpu = config.gpu
    if config.plan is not None and not Path(config.plan).is_file():
        raise UsageError(f"--plan {config.plan}: there is no such file; make one with `warmfront plan`")
    if gpu == "auto":
        against = against_neurons(0, say)
        gpu = "cuda:0" if against is None else "none"
        for option, wish in (("--vram-budget", config.vram_budget), ("--plan", config.plan)):
            if wish is not None and against is not None:
                lack = f"no GPU can be used ({against})" if against else "there is no CUDA device here"
                raise UsageError(f"{option}, but {lack}: leave it out, or add --gpu host to emulate one")
        if against:
            say(f"no GPU is used: {against}")
    attention = choose_attention(replace(config, gpu=gpu), config.selector)
    if config.attention == "auto" and attention != "cpu":
        against = against_attention(int(attention.partition(":")[2]), say)
        if against:
            say(f"attention stays on the CPU: {against}")
        if against is not None:
            attention = "cpu"
    return replace(config, gpu=gpu, attention=attention)


def choose_attention(config: EngineConfig, selector: str) -> str:
    """Where attention, norms, predictor and head run: "cpu" for the compiled team, else a device of torch's or "host".

    `auto` goes with the GPU worker to its CUDA device, unless the selector needs the compiled team.
    """
    wish = config.attention
    if selector == "lowbit" and wish not in ("auto", "cpu"):
        raise UsageError(f"--attention {wish}, but --selector lowbit predicts on the CPU: pass --attention cpu")
    if wish == "auto":
        return config.gpu if config.gpu.startswith("cuda") and selector != "lowbit" else "cpu"
    if wish.startswith("cuda"):
        count, version = _torch_devices()
        if count == 0:
            raise UsageError(
                f"--attention {wish}, but this torch sees no CUDA device: it is {version}; install one made for CUDA, "
                "or pass --attention cpu"
            )
        if int(wish.partition(":")[2]) >= count:
            raise UsageError(f"--attention {wish}, but torch sees {count} CUDA devices: pass --attention cuda:0")
    return wish


def _torch_devices() -> tuple[int, str]:
    """How many CUDA devices torch sees, and its version."""
    import torch

    return torch.cuda.device_count() if torch.cuda.is_available() else 0, torch.__version__


def selectors_for(spec: ModelSpec) -> list[str]:
    """The selectors that a model can be run with, the one of `auto` first."""
    predicting = ["lowrank"] if spec.predictor is not None else []
    return [*predicting, "exact", "lowbit", "all"] if spec.sparse else [*predicting, "all"]


def choose_selector(config: EngineConfig, model: PackedModel) -> str:
    """`lowrank` if the model has predictors, else `exact` where it is lossless, else `all`."""
    spec, wish = model.spec, config.selector
    able = selectors_for(spec)
    chosen = able[0] if wish == "auto" else wish
    if config.look_ahead and chosen not in PREDICTING:
        raise UsageError(
            f"--look-ahead, but the selector {chosen} predicts nothing: add --selector lowbit, or leave it out"
        )
    if chosen not in able:
        lack = "has no predictors" if wish == "lowrank" else f"is not ReLU-like: it uses {spec.activation}"
        raise UsageError(f"--selector {wish}, but {spec.name} {lack}: use --selector {' or '.join(able)}")
    return chosen


def choose_context(config: EngineConfig, model: PackedModel) -> int:
    if config.context is None:
        return min(model.spec.context, DEFAULT_CONTEXT)
    if config.context > model.spec.context:
        raise UsageError(
            f"--ctx {config.context}, but {model.spec.name} was trained for {model.spec.context} tokens: pass no more"
        )
    return config.context
