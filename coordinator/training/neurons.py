"""A layer's neurons in torch: whether a token fires them, and what each then weighs.

A neuron's mass is |h_i| * ||down_i||, the length of what it adds to the residual.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from warmfront.coordinator.selectors.calibration import down_norms, neuron_biases
from warmfront.coordinator.selectors.lowbit import groups_of, rows_of
from warmfront.shared.model.architecture import FeedForward
from warmfront.shared.model.store import PackedModel

__all__ = ["Neurons", "margins", "masses", "neurons_of"]


class Neurons(NamedTuple):
    """Weights [neurons, hidden] and biases [neurons] of a layer; without a gate the ups are the gates."""

    how: FeedForward
    gate: Tensor
    gate_bias: Tensor
    up: Tensor | None
    up_bias: Tensor
    # [neurons]: the length of each down row.
    down: Tensor


def neurons_of(model: PackedModel, layer: int, device: str) -> Neurons:
    """Those of a layer in float32, in the packed file's order, without padding."""
    groups, layout, ffn = groups_of(model, layer), model.layout, model.spec.ffn

    def tensor(values: object) -> Tensor:
        return torch.as_tensor(values)[:ffn].to(device)

    return Neurons(
        model.spec.architecture.feed_forward,
        tensor(rows_of(model, groups, 0)),
        tensor(neuron_biases(model, groups, layout.gate_bias_offset)),
        tensor(rows_of(model, groups, layout.up_offset)) if layout.gated else None,
        tensor(neuron_biases(model, groups, layout.up_bias_offset)),
        tensor(down_norms(model, groups)),
    )


def _gates_ups(neurons: Neurons, x: Tensor) -> tuple[Tensor, Tensor | None]:
    gates = torch.addmm(neurons.gate_bias, x, neurons.gate.T)
    return gates, None if neurons.up is None else torch.addmm(neurons.up_bias, x, neurons.up.T)


def margins(neurons: Neurons, x: Tensor) -> Tensor:
    """By how much each neuron is open for `x` [tokens, hidden]: float32 [tokens, neurons], it fires above zero."""
    gates, ups = _gates_ups(neurons, x)
    if neurons.how.activation == "drelu" and ups is not None:
        return torch.minimum(gates, ups)
    return gates.sub_(neurons.how.closed)


def masses(neurons: Neurons, x: Tensor) -> Tensor:
    """The mass of each neuron: float32 [tokens, neurons], zero exactly where it does not fire."""
    gates, ups = _gates_ups(neurons, x)
    fires = gates > neurons.how.closed
    if neurons.how.activation == "drelu" and ups is not None:
        fires &= ups > 0
    mass = gates * ups if ups is not None else gates.clone()
    if neurons.how.activation == "relu2":
        mass *= gates
    # What fires and adds nothing counts as fired all the same.
    return mass.abs_().mul_(neurons.down).clamp_(min=torch.finfo(torch.float32).tiny).mul_(fires)
