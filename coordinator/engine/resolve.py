"""What warmfront decides where the user did not, and what it refuses: everything once, into one frozen plan.

    resolve_devices   before the model is packed: GPU and attention; cores and files that cannot be had
    resolve           once it is packed: cores, selector and context too -> RunPlan

Nothing after it decides again: sessions, runtime, teams and reports read the plan.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

from warmfront.coordinator.balancing.baselines import Core
from warmfront.coordinator.engine.devices.reasons import against_attention, against_neurons
from warmfront.coordinator.hardware.settings import tuned
from warmfront.shared.config import EngineConfig, parse_slow
from warmfront.shared.errors import UsageError
from warmfront.shared.machine.core_plan import CorePlan, plan_cores
from warmfront.shared.machine.topology import read_topology
from warmfront.shared.model.formats import Kind
from warmfront.shared.model.kv_layout import PAGE, pages_of
from warmfront.shared.model.spec import ModelSpec
from warmfront.shared.model.store import PackedModel
from warmfront.shared.selector import (
    ALL,
    CORE,
    CORE_LOWBIT,
    CORE_LOWRANK,
    EXACT,
    LOWBIT,
    LOWRANK,
    Selector,
    Source,
    wished_selector,
)

__all__ = ["DEFAULT_CONTEXT", "Devices", "RunPlan", "resolve", "resolve_devices", "selectors_for"]

# A KV cache for all that a recent model was trained for would take gigabytes that few prompts need.
DEFAULT_CONTEXT = 4096
# By whether neurons are silent: where all have some weight, nearly all of the mass would be nearly all of them.
_RECALL = {True: 0.995, False: 0.9}
Say = Callable[[str], None]


class Devices(NamedTuple):
    """Where the work is done that is not the CPU workers'."""

    gpu: str | None  # of the GPU worker: "cuda:N" or "host"
    attention: str  # of attention, norms, predictors and head: "cpu" (compiled), "cuda:N" or "host" (torch)


@dataclass(frozen=True, slots=True, kw_only=True)
class RunPlan:
    """How one packed model is run, decided in full. Other fields of the configuration need no decision."""

    config: EngineConfig  # as the user gave it, with what `warmfront tune` found
    gpu: str | None
    attention: str
    selector: Selector
    recall: float  # by mass, of the selector lowbit
    look_ahead: bool  # neurons are predicted while the layer before is computed
    context: int  # tokens that the KV cache holds, prompt and answer together
    texts: int  # so long, that it holds
    cache_kind: Kind  # of its keys and values
    speculates: bool  # tokens are guessed and verified in batches
    cores: CorePlan

    @property
    def positions(self) -> int:
        """That the KV cache has."""
        return self.texts * pages_of(self.context) * PAGE

    @property
    def worker_names(self) -> list[str]:
        """Of the worker processes, in the order of the board."""
        return [f"cpu{index}" for index in range(len(self.cores.workers))] + ["gpu0"] * (self.gpu is not None)


def resolve_devices(config: EngineConfig, say: Say) -> Devices:
    """What `auto` stands for as GPU and attention: a CUDA device only if it computes rightly.

    Raises UsageError for wishes that need a GPU where there is none, for a plan file that is not there, and for
    threads that cannot be had: packing may take minutes, and is in vain then.
    """
    _plan_cores(config)
    if config.plan is not None and not Path(config.plan).is_file():
        raise UsageError(f"--plan {config.plan}: there is no such file; make one with `warmfront plan`")
    gpu = None if config.gpu == "none" else config.gpu
    if gpu == "auto":
        against = against_neurons(0, say)
        gpu = "cuda:0" if against is None else None
        for option, wish in (("--vram-budget", config.vram_budget), ("--plan", config.plan)):
            if wish is not None and against is not None:
                lack = f"no GPU can be used ({against})" if against else "there is no CUDA device here"
                raise UsageError(f"{option}, but {lack}: leave it out, or add --gpu host to emulate one")
        if against:
            say(f"no GPU is used: {against}")
    return Devices(gpu, _resolve_attention(config, gpu, say))


def _resolve_attention(config: EngineConfig, gpu: str | None, say: Say) -> str:
    """`auto` goes with the GPU worker to its CUDA device, unless the selector needs the compiled pass."""
    wish, selector = config.attention, wished_selector(config.selector)
    # Torch predicts by the low-rank predictors alone.
    compiled = selector is not None and selector.predicts and selector.sources != {Source.LOWRANK}
    if compiled and wish not in ("auto", "cpu"):
        raise UsageError(f"--attention {wish}, but --selector {selector} predicts on the CPU: pass --attention cpu")
    if wish == "auto":
        if gpu is None or not gpu.startswith("cuda") or compiled:
            return "cpu"
        against = against_attention(int(gpu.partition(":")[2]), say)
        if against:
            say(f"attention stays on the CPU: {against}")
        return gpu if against is None else "cpu"
    if wish.startswith("cuda"):
        _check_attention(wish)
    return wish


def _check_attention(device: str) -> None:
    """Raise UsageError unless torch sees the CUDA device."""
    count, version = _torch_devices()
    if count == 0:
        raise UsageError(
            f"--attention {device}, but this torch sees no CUDA device: it is {version}; install one made for CUDA, "
            "or pass --attention cpu"
        )
    if int(device.partition(":")[2]) >= count:
        raise UsageError(f"--attention {device}, but torch sees {count} CUDA devices: pass --attention cuda:0")


def _torch_devices() -> tuple[int, str]:
    """How many CUDA devices torch sees, and its version."""
    import torch

    return torch.cuda.device_count() if torch.cuda.is_available() else 0, torch.__version__


def resolve(config: EngineConfig, devices: Devices, model: PackedModel, say: Say) -> RunPlan:
    """Decide the rest, now that the model is known.

    Raises UsageError for a selector or a context that the model cannot be run with, and for workers that do not exist.
    """
    config = tuned(config, model.path, devices.gpu, say)
    cores, selector = _plan_cores(config), _resolve_selector(config, model.spec)
    plan = RunPlan(
        config=config,
        gpu=devices.gpu,
        attention=devices.attention,
        selector=selector,
        recall=_RECALL[model.spec.sparse] if config.recall is None else config.recall,
        look_ahead=config.look_ahead or (Source.LOWRANK in selector.sources and _looks_ahead(model.spec)),
        context=_resolve_context(config, model.spec),
        texts=config.parallel,
        cache_kind=_resolve_cache(config, devices, model),
        speculates=_resolve_speculation(config, selector, devices.attention, say),
        cores=cores.with_emulated_gpu() if devices.gpu == "host" else cores,
    )
    names = plan.worker_names
    if unknown := parse_slow(config.slow).keys() - set(names):
        raise UsageError(f"--slow names worker {min(unknown)}, but the only workers are {', '.join(names)}")
    return plan


def _plan_cores(config: EngineConfig) -> CorePlan:
    """Who runs on which cpus, but for an emulated GPU. What is not pinned takes memory from anywhere."""
    plan = plan_cores(
        read_topology(),
        workers=config.workers,
        threads=config.threads,
        coordinator_threads=config.coordinator_threads,
        spins=config.spins,
        force=config.force,
    )
    if config.pin:
        return plan
    return replace(plan, workers=tuple(worker._replace(memory=None) for worker in plan.workers))


def selectors_for(spec: ModelSpec) -> list[Selector]:
    """The selectors that a model can be run with, the one of `auto` first."""
    predicting = [LOWRANK] if spec.predictor is not None else []
    if spec.architecture.feed_forward.experts is not None:
        return [*predicting, *[EXACT] * spec.sparse, ALL]
    able = [*predicting, EXACT, LOWBIT, ALL] if spec.sparse else [*predicting, ALL, LOWBIT]
    return [*able, CORE, *[CORE_LOWRANK] * bool(predicting), CORE_LOWBIT]


def _resolve_selector(config: EngineConfig, spec: ModelSpec) -> Selector:
    """`lowrank` if the model has predictors, else `exact` where it is lossless, else `all`."""
    able = selectors_for(spec)
    chosen = wished_selector(config.selector) or able[0]
    if config.max_loss is not None and chosen.sources == {Source.LOWRANK}:
        raise UsageError(
            f"--max-loss, but what {chosen} loses is not measured: use {LOWBIT} or {CORE}, or leave it out"
        )
    # Of a union each token asks for other neurons: there is nothing to keep on a GPU.
    if config.policy == Core.name and chosen.sources != {Source.CORE}:
        raise UsageError(f"--policy {Core.name}, but the selector is {chosen}: add --selector {CORE}, or leave it out")
    if config.look_ahead and not chosen.predicts:
        raise UsageError(
            f"--look-ahead, but the selector {chosen} predicts nothing: add --selector lowbit, or leave it out"
        )
    if config.look_ahead and spec.architecture.feed_forward.experts is not None:
        raise UsageError(f"--look-ahead, but which experts {spec.name} uses is not known ahead: leave it out")
    if chosen not in able:
        lack = spec.why_unprofiled
        if Source.LOWRANK in chosen.sources and spec.predictor is None:
            lack = "has no predictors"
        elif chosen.sources and spec.architecture.feed_forward.experts is not None:
            lack = "is a mixture of experts"
        others = " or ".join(map(str, able))
        raise UsageError(f"--selector {chosen}, but {spec.name} {lack}: use --selector {others}")
    return chosen


def _looks_ahead(spec: ModelSpec) -> bool:
    """Whether the model's predictors tell of the layer behind."""
    return spec.predictor is not None and spec.predictor.look_ahead


def _resolve_speculation(config: EngineConfig, selector: Selector, attention: str, say: Say) -> bool:
    """As wished, but only the compiled pass computes batches."""
    if config.speculate != "off" and Source.CORE in selector.sources:
        raise UsageError(
            f"--speculate {config.speculate}, but the neurons of --selector {selector} may change within a batch: "
            "leave one of the two out"
        )
    if config.speculate == "off" or attention == "cpu":
        return config.speculate != "off"
    if config.attention != "auto":
        raise UsageError(
            f"--speculate {config.speculate}, but --attention {attention} computes no batches: pass --attention cpu"
        )
    say(f"nothing is speculated: attention on {attention} computes no batches; pass --attention cpu for it")
    return False


def _resolve_context(config: EngineConfig, spec: ModelSpec) -> int:
    if config.context is None:
        return min(spec.context, DEFAULT_CONTEXT)
    if config.context > spec.context:
        raise UsageError(f"--ctx {config.context}, but {spec.name} was trained for {spec.context} tokens: pass no more")
    return config.context


def _resolve_cache(config: EngineConfig, devices: Devices, model: PackedModel) -> Kind:
    """float32 for float32 models, else float16, unless the user says otherwise."""
    if config.kv == "q8" and devices.attention != "cpu":
        raise UsageError(
            f"--kv q8, but attention runs on {devices.attention}, which takes f32 or f16: pass --attention cpu, or "
            "another --kv"
        )
    if config.kv == "auto":
        return Kind.F32 if model.entries["embed"].kind == Kind.F32 else Kind.F16
    return Kind[config.kv.upper()]
