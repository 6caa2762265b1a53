"""Whether the memory holds a run, asked before anything is started: later it would be killed, perhaps in mid-answer."""

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from warmfront.coordinator.decode.footprint import cache_bytes, scratch_bytes
from warmfront.coordinator.engine.resolve import RunPlan
from warmfront.coordinator.placement.homes import bytes_by_node
from warmfront.shared.errors import ResourceError
from warmfront.shared.machine.numa import UNBOUND, bindable, ensure_free
from warmfront.shared.machine.topology import read_topology
from warmfront.shared.model.bundle import GROUP
from warmfront.shared.model.store import PackedModel
from warmfront.shared.selector import Source

__all__ = ["bytes_beside_neurons", "check_memory", "check_nodes", "neuron_bytes"]


def check_memory(model: PackedModel, plan: RunPlan, max_tokens: int) -> None:
    """Raise ResourceError unless weights, KV cache, scratch and an emulated GPU fit into what is free."""
    spec, layout = model.spec, model.layout
    neurons, budget = neuron_bytes(model), plan.config.ram_budget
    needs = {"weights": bytes_beside_neurons(model) + (neurons if budget is None else min(budget, neurons))}
    if not plan.attention.startswith("cuda"):
        scratch = scratch_bytes(spec, len(plan.cores.coordinator), max_tokens)
        cache = cache_bytes(spec, plan.cache_kind, plan.context, plan.texts)
        times = f"{plan.texts} times " if plan.texts > 1 else ""
        needs[f"{times}a context of {plan.context} tokens"] = cache + scratch
    if Source.CORE in plan.selector.sources:
        needs["what a prompt's neurons are"] = 2 * spec.layers * max_tokens * layout.groups * GROUP
    if plan.gpu == "host":
        slots = spec.layers * layout.groups * layout.group_bytes
        vram = plan.config.vram_budget
        needs["the emulated GPU"] = slots if vram is None else min(slots, vram)
    need, have = sum(needs.values()), read_topology().available_bytes
    if need > have:
        parts = ", ".join(f"{size / 1e9:.2f} for {what}" for what, size in needs.items())
        raise ResourceError(
            f"{spec.name} needs {need / 1e9:.2f} GB ({parts}), {have / 1e9:.2f} GB of memory are free: "
            "pass a smaller --ctx or --dtype, or use a smaller model"
        )


def check_nodes(model: PackedModel, plan: RunPlan, home: npt.NDArray[np.uint8], say: Callable[[str], None]) -> None:
    """Raise ResourceError for what a NUMA node cannot hold: the kernel would not refuse to bind it, but kill later.

    `home`: uint8 [layers, groups], the worker of each group.
    """
    cores, budget = plan.cores, plan.config.ram_budget
    if not bindable(cores.memory_nodes):
        say(UNBOUND)
        return
    others = bytes_beside_neurons(model)
    group_bytes = (model.layout.group_bytes * home.size if budget is None else budget) // home.size
    for node, need in bytes_by_node(cores, home, group_bytes, others).items():
        ensure_free(node, need)


def neuron_bytes(model: PackedModel) -> int:
    """Bytes of the feed-forward weights."""
    return sum(entry.nbytes for name, entry in model.entries.items() if name.endswith(".ffn"))


def bytes_beside_neurons(model: PackedModel) -> int:
    """Bytes of all other weights."""
    return sum(entry.nbytes for entry in model.entries.values()) - neuron_bytes(model)
