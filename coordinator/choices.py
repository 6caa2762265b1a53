"""What warmfront chooses where the user did not, and what it refuses: device, selector, context."""

from warmfront.shared.config import PREDICTING, EngineConfig
from warmfront.shared.errors import UsageError
from warmfront.shared.model import ModelSpec
from warmfront.shared.store import PackedModel

__all__ = ["DEFAULT_CONTEXT", "choose_context", "choose_gpu", "choose_selector"]

DEFAULT_CONTEXT = 4096


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
