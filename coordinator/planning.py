"""`warmfront plan`: which groups of neurons the GPU is to get, for a budget of its memory, and what that is worth.

Speeds are predicted from measured unit times (`unit_times.py`) and are of the feed-forward layers alone.
"""

from typing import Any, NamedTuple

import numpy as np

from warmfront.coordinator.placement import first_groups
from warmfront.coordinator.solver import Mask, Rates, Times, layer_times, solve, solve_exact
from warmfront.shared.bundle import GROUP, BundleLayout
from warmfront.shared.config import PREDICTING

__all__ = ["Grounds", "figures_of", "load_of", "make_plan"]


class Grounds(NamedTuple):
    """What a plan rests on.

    firing, load: float64 [layers, groups], as `solve` takes them; budget: bytes of GPU memory; ledger: what the GPU
    worker allocates of it, bytes by purpose, of which "slots" holds groups.
    """

    layout: BundleLayout
    firing: Rates
    load: Rates
    times: Times
    budget: int
    ledger: dict[str, int]

    @property
    def slots(self) -> int:
        """Groups that the GPU holds."""
        return self.ledger["slots"] // self.layout.group_bytes


def load_of(layout: BundleLayout, selector: str, firing: Rates) -> Rates:
    """Bytes that computing each group reads per token, float64 [layers, groups], if `firing` of its neurons fire.

    A predictor is taken to select the neurons that fire and no others.
    """
    gate, rest = layout.gate_row_bytes, layout.gate_row_bytes + layout.down_row_bytes
    if selector in PREDICTING:
        return firing * (gate + rest)
    return GROUP * gate + (firing if selector == "exact" else np.full_like(firing, GROUP)) * rest


def make_plan(grounds: Grounds, exact: bool) -> tuple[Mask, dict[str, Any]]:
    """The groups for the GPU, bool [layers, groups], and what is to be said of them; `exact`: the optimum too."""
    gpu = solve(grounds.firing, grounds.load, grounds.slots, grounds.times)
    figures = figures_of(grounds, gpu)
    if exact:
        best, bound = solve_exact(grounds.load, grounds.slots, grounds.times)
        figures["exact"] = {
            "ns": float(layer_times(grounds.load, best, grounds.times).sum()),
            "bound_ns": bound,
            "plan_above": figures["plan_ns"] / max(bound, 1.0) - 1,
        }
    return gpu, figures


def figures_of(grounds: Grounds, gpu: Mask) -> dict[str, Any]:
    """What the groups of `gpu` make of all neurons and of all firing, and how long a token takes in each case."""
    layout, firing, load, times = grounds.layout, grounds.firing, grounds.load, grounds.times
    neurons = np.clip(layout.ffn - GROUP * np.arange(layout.groups), 0, GROUP)
    shares = {
        "neurons": (gpu @ neurons, np.full(len(gpu), layout.ffn)),
        "firing": (np.sum(firing, axis=1, where=gpu), firing.sum(1)),
    }
    spent = {
        "plan": layer_times(load, gpu, times),
        "cpu": layer_times(load, np.zeros_like(gpu), times),
        "uniform": layer_times(load, first_groups(layout.groups, len(gpu), grounds.slots), times),
    }
    layers = [{"groups": int(row.sum())} for row in gpu]
    columns = {name: part / np.maximum(whole, 1e-12) for name, (part, whole) in shares.items()}
    for name, values in (columns | {f"{name}_ns": values for name, values in spent.items()}).items():
        for layer, value in zip(layers, values.tolist(), strict=True):
            layer[name] = value
    return {
        "vram_budget": grounds.budget,
        "ledger": grounds.ledger,
        "left_bytes": grounds.budget - sum(grounds.ledger.values()),
        "group_bytes": layout.group_bytes,
        "slots": grounds.slots,
        "groups": int(gpu.sum()),
        **{name: float(part.sum() / max(whole.sum(), 1e-12)) for name, (part, whole) in shares.items()},
        **{f"{name}_ns": float(values.sum()) for name, values in spent.items()},
        "times": times._asdict(),
        "layers": layers,
    }
