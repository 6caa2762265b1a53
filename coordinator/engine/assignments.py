"""What each worker is told to do: its groups, its cpus, its memory."""

import os
from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from warmfront.coordinator.engine.resolve import RunPlan
from warmfront.shared.config import parse_slow
from warmfront.shared.errors import ResourceError
from warmfront.shared.kernels.fetching import Distances
from warmfront.shared.model.store import PackedModel
from warmfront.shared.wire.messages import Assignment, Hello

__all__ = ["make_assignments"]

# Share of a GPU's free memory that is filled when no budget is given.
_VRAM_SHARE = 0.9
# Spare slots of a CPU worker for each of its groups, where there are several workers: groups move into them. They take
# memory only once they are used.
_SPARE_SHARE = 1 / 2


def make_assignments(
    model: PackedModel,
    plan: RunPlan,
    home: Mapping[str, npt.NDArray[np.uint8]],
    distances: Distances,
    hellos: Mapping[str, Hello],
    attention_bytes: int,
) -> dict[str, Assignment]:
    """One for each worker that said Hello.

    `home`: for each, uint8 [layers, groups], where the groups' homes are; `distances`: how far ahead rows are fetched;
    `attention_bytes`: that attention will yet take on the GPU.
    Raises ResourceError for a budget that the GPU does not have.
    """
    slow, cores = parse_slow(plan.config.slow), plan.cores
    assignments = {}
    for name, hello in hellos.items():
        index, on_gpu = plan.worker_names.index(name), name.startswith("gpu")
        movable = len(cores.workers) > 1 and not on_gpu and plan.config.ram_budget is None
        own = int(np.count_nonzero(home[name] == index))
        memory = None if on_gpu else cores.workers[index].memory
        assignments[name] = Assignment(
            index=index,
            model=os.fspath(model.path),
            neuron_order=model.order,
            cpus=list(cores.gpu if on_gpu else cores.workers[index].cpus),
            selector=plan.selector.name,
            home=home[name].tobytes(),
            spare_slots=int(own * _SPARE_SHARE) + 1 if movable else 0,
            slowdown=slow.get(name, 1.0),
            vram_budget=_budget(plan, hello, attention_bytes) if on_gpu else 0,
            ram_budget=0 if on_gpu else _ram_budget(plan, own, home[name].size),
            offload_policy=plan.config.offload_policy,
            offload_window=plan.config.offload_window,
            offload_asynchronous=plan.config.offload_asynchronous,
            memory_node=-1 if memory is None else memory,
            pinned=plan.config.pin,
            spins=cores.spins,
            activation=model.spec.activation,
            distances=distances.tobytes(),
        )
    return assignments


def _ram_budget(plan: RunPlan, own: int, groups: int) -> int:
    """Bytes that the neurons of a CPU worker may take which has `own` of so many groups; 0: there is no budget."""
    budget = plan.config.ram_budget
    return 0 if budget is None else max(1, int(budget * own / groups))


def _budget(plan: RunPlan, gpu: Hello, attention_bytes: int) -> int:
    """Bytes of device memory that the GPU worker may take."""
    budget, shared = plan.config.vram_budget, gpu.device.partition(" ")[0] == plan.attention
    free = max(0, gpu.free_bytes - attention_bytes if shared else gpu.free_bytes)
    if budget is None:
        return int(free * _VRAM_SHARE)
    if budget > free:
        beside = " beside the attention" if shared else ""
        raise ResourceError(
            f"a VRAM budget of {budget / 1e9:.2f} GB, but {gpu.device} has {free / 1e9:.2f} GB free{beside}: "
            "pass a smaller --vram-budget"
        )
    return budget
