"""What warmfront chooses where the user did not, and what it refuses: device, selector, context."""

from warmfront.shared.config import EngineConfig
from warmfront.shared.errors import UsageError
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


def choose_selector(config: EngineConfig, model: PackedModel) -> str:
    """`lowrank` if the model has predictors, else `exact` where it is lossless, else `all`."""
    spec, wish = model.spec, config.selector
    if wish == "auto":
        return "lowrank" if spec.predictor is not None else "exact" if spec.sparse else "all"
    if wish in ("exact", "lowbit") and not spec.sparse:
        raise UsageError(
            f"selector {wish} needs a ReLU-like model, {spec.name} uses {spec.activation}: use --selector all"
        )
    if wish == "lowrank" and spec.predictor is None:
        raise UsageError(
            f"selector lowrank needs predictors, {spec.name} has none: give it a predictor.safetensors, or use "
            + ("--selector exact" if spec.sparse else "--selector all")
        )
    return wish


def choose_context(config: EngineConfig, model: PackedModel) -> int:
    if config.context is None:
        return min(model.spec.context, DEFAULT_CONTEXT)
    if config.context > model.spec.context:
        raise UsageError(
            f"--ctx {config.context}, but {model.spec.name} was trained for {model.spec.context} tokens: pass no more"
        )
    return config.context
