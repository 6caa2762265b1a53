"""From shares of the neurons to bytes of memory, once it is known how large the model is."""

from dataclasses import replace

from warmfront.coordinator.engine.memory import bytes_beside_neurons, neuron_bytes
from warmfront.shared.config import EngineConfig
from warmfront.shared.machine.topology import read_topology
from warmfront.shared.model.store import PackedModel
from warmfront.shared.offload import PRESETS

__all__ = ["with_budgets"]

# Of the memory that is free beside the other weights, for the KV cache and the processes.
_SHARE_OF_FREE = 0.8


def with_budgets(config: EngineConfig, model: PackedModel) -> EngineConfig:
    """`config` with the budgets that its strategy of offloading means for `model`.

    Neurons that all fit are held as without a strategy: a cache that lacks nothing only costs.
    """
    if config.offload is None:
        return config
    strategy = PRESETS[config.offload] if isinstance(config.offload, str) else config.offload
    neurons = neuron_bytes(model)
    if strategy.ram_share is None:
        free = read_topology().available_bytes - bytes_beside_neurons(model)
        budget = max(1, int(free * _SHARE_OF_FREE))
    else:
        budget = int(neurons * strategy.ram_share)
    vram = config.vram_budget
    if strategy.gpu_share is not None and config.gpu != "none" and vram is None:
        vram = int(neurons * strategy.gpu_share)
    return replace(
        config,
        offload=None,
        ram_budget=None if budget >= neurons else budget,
        vram_budget=vram,
        offload_policy=strategy.policy,
        offload_window=strategy.window,
        offload_asynchronous=strategy.asynchronous,
    )
