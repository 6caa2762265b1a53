"""Whether the memory holds a run, asked before anything is started: later it would be killed, perhaps in mid-answer."""

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from warmfront.coordinator.decode.footprint import cache_bytes, scratch_bytes
from warmfront.coordinator.engine.resolve import RunPlan
from warmfront.coordinator.placement.homes import bytes_by_node
from warmfront.shared.errors import ResourceError
from warmfront.shared.machine.core_plan import CorePlan
from warmfront.shared.machine.numa import UNBOUND, bindable, ensure_free
from warmfront.shared.machine.topology import read_topology
from warmfront.shared.model.bundle import GROUP
from warmfront.shared.model.store import PackedModel
from warmfront.shared.selector import Source

__all__ = ["check_memory", "check_nodes"]


def check_memory(model: PackedModel, plan: RunPlan, max_tokens: int) -> None:
    """Raise ResourceError unless weights, KV cache, scratch and an emulated GPU fit into what is free."""
    spec, layout = model.spec, model.layout
    needs = {"weights": _weights_bytes(model)}
    if not plan.attention.startswith("cuda"):
        scratch = scratch_bytes(spec, len(plan.cores.coordinator), max_tokens)
        cache = cache_bytes(spec, plan.cache_kind, plan.context, plan.texts)
        times = f"{plan.texts} times " if plan.texts > 1 else ""
        needs[f"{times}a context of {plan.context} tokens"] = cache + scratch
    if Source.CORE in plan.selector.sources:
        needs["what a prompt's neurons are"] = 2 * spec.layers * max_tokens * layout.groups * GROUP
    if plan.gpu == "host":
        slots = spec.layers * layout.groups * layout.group_bytes
        budget = plan.config.vram_budget
        needs["the emulated GPU"] = slots if budget is None else min(slots, budget)
    need, have = sum(needs.values()), read_topology().available_bytes
    if need > have:
        parts = ", ".join(f"{size / 1e9:.2f} for {what}" for what, size in needs.items())
        raise ResourceError(
            f"{spec.name} needs {need / 1e9:.2f} GB ({parts}), {have / 1e9:.2f} GB of memory are free: "
            "pass a smaller --ctx or --dtype, or use a smaller model"
        )


def check_nodes(model: PackedModel, cores: CorePlan, home: npt.NDArray[np.uint8], say: Callable[[str], None]) -> None:
    """Raise ResourceError for what a NUMA node cannot hold: the kernel would not refuse to bind it, but kill later.

    `home`: uint8 [layers, groups], the worker of each group.
    """
    if not bindable(cores.memory_nodes):
        say(UNBOUND)
        return
    group_bytes = model.layout.group_bytes
    others = max(0, _weights_bytes(model) - home.size * group_bytes)
    for node, need in bytes_by_node(cores, home, group_bytes, others).items():
        ensure_free(node, need)


def _weights_bytes(model: PackedModel) -> int:
    return sum(entry.nbytes for entry in model.entries.values())
