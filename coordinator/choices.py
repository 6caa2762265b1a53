"""What warmfront chooses where the user did not, and what it refuses: device, selector, context."""

from dataclasses import replace

from warmfront.shared.config import PREDICTING, EngineConfig
from warmfront.shared.core_plan import CorePlan, plan_cores
from warmfront.shared.errors import UsageError
from warmfront.shared.model import ModelSpec
from warmfront.shared.store import PackedModel
from warmfront.shared.topology import read_topology

__all__ = ["DEFAULT_CONTEXT", "choose_attention", "choose_context", "choose_cores", "choose_gpu", "choose_selector"]

DEFAULT_CONTEXT = 4096


def choose_cores(config: EngineConfig) -> CorePlan:
    """Who runs on which cpus, but for an emulated GPU. What is not pinned takes memory from anywhere."""
    plan = plan_cores(
        read_topology(), config.workers, config.threads, config.coordinator_threads, config.spins, config.force
    )
    if config.pin:
        return plan
    return replace(plan, workers=tuple(worker._replace(memory=None) for worker in plan.workers))


def choose_gpu(config: EngineConfig) -> str | None:
    """The device of the GPU worker, None for none."""
    if config.gpu == "none":
        return None
    if config.gpu != "auto":
        return config.gpu
    from warmfront.coordinator.devices import cuda_devices

    if cuda_devices() > 0:
        return "cuda:0"
    if config.vram_budget is not None:
        raise UsageError(
            "--vram-budget, but there is no CUDA device here: leave it out, or add --gpu host to emulate one"
        )
    return None


def choose_attention(config: EngineConfig, selector: str) -> str:
    """Where attention, norms, predictor and head run: "cpu" for the compiled team, else a device of torch's or "host".

    `auto` takes the first CUDA device that torch sees, unless no GPU is wanted or the selector needs the compiled team.
    """
    wish = config.attention
    if selector == "lowbit" and wish not in ("auto", "cpu"):
        raise UsageError(f"--attention {wish}, but --selector lowbit predicts on the CPU: pass --attention cpu")
    if wish == "auto":
        from warmfront.coordinator.devices import cuda_devices

        able = config.gpu != "none" and selector != "lowbit" and cuda_devices() > 0
        return "cuda:0" if able and _torch_devices()[0] > 0 else "cpu"
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
