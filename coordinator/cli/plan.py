"""`warmfront plan`: which groups of neurons the GPU is to get, for a budget of its memory, and what that is worth.

Speeds are predicted from measured costs (`measured_costs.py`) and are of the feed-forward layers alone.
"""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from warmfront.coordinator.engine.engine import Engine
from warmfront.coordinator.measure.measured_costs import key_of, load_costs, measure_costs, save_costs
from warmfront.coordinator.placement.expected_load import expected_bytes, firing_of, neurons_of
from warmfront.coordinator.placement.homes import first_groups
from warmfront.coordinator.placement.plan_file import write_plan
from warmfront.coordinator.placement.solver import DeviceCosts, Floats, Mask, layer_ns, solve, solve_exact
from warmfront.shared.model.bundle import BundleLayout

__all__ = ["PlanInputs", "figures_of", "make_plan", "plan", "plan_inputs"]


class PlanInputs(NamedTuple):
    """What a plan is computed from."""

    layout: BundleLayout
    firing: Floats  # [layers, groups], as `solve` takes it
    load: Floats  # [layers, groups], as `solve` takes it
    costs: DeviceCosts
    budget: int  # bytes of GPU memory
    ledger: dict[str, int]  # what the GPU worker allocates of it, bytes by purpose; "slots" holds groups

    @property
    def slots(self) -> int:
        """Groups that the GPU holds."""
        return self.ledger["slots"] // self.layout.group_bytes


def plan(
    model: str,
    overrides: dict[str, Any],
    exact: bool,
    out: Path | None,
    say: Callable[[str], None],
    progress: Callable[[str, int, int], None],
) -> dict[str, Any]:
    """Make the plan for `model`, write it to `out`, by default to MODEL-name.plan.json here; returns what to say of it.

    `overrides`: those of `Engine.load`, with a vram_budget.
    """
    with Engine.load(model, say=say, progress=progress, policy="static", **overrides) as engine:
        inputs = plan_inputs(engine, say)
        name = engine.model.spec.name
        path = out or Path(re.sub(r"[^\w.-]+", "-", name) + ".plan.json")
        facts = {"model": name, "selector": engine.plan.selector, "device": engine.statistics.workers()[-1].device}
        gpu, figures = make_plan(inputs, exact)
        figures = facts | figures
        write_plan(path, engine.model, inputs.budget, gpu, figures)
        say(f"the plan is in {path}")
    return figures | {"file": str(path)}


def plan_inputs(engine: Engine, say: Callable[[str], None]) -> PlanInputs:
    """The inputs of a plan for an engine with a GPU; costs that are not known are measured."""
    key = key_of(engine)
    costs = load_costs(key)
    if costs is None:
        say("measuring the workers (first use only)")
        costs = measure_costs(engine)
        save_costs(key, costs)
    model, budget = engine.model, engine.plan.config.vram_budget
    ledger = engine.statistics.device_memory()
    budget = sum(ledger.values()) if budget is None else budget
    return PlanInputs(
        model.layout, firing_of(model), expected_bytes(model, engine.plan.selector), costs, budget, ledger
    )


def make_plan(inputs: PlanInputs, exact: bool) -> tuple[Mask, dict[str, Any]]:
    """The groups for the GPU, bool [layers, groups], and their figures; `exact`: the optimum's too."""
    gpu = solve(inputs.firing, inputs.load, inputs.slots, inputs.costs)
    figures = figures_of(inputs, gpu)
    if exact:
        best, bound = solve_exact(inputs.load, inputs.slots, inputs.costs)
        figures["exact"] = {
            "ns": float(layer_ns(inputs.load, best, inputs.costs).sum()),
            "bound_ns": bound,
            "plan_above": figures["plan_ns"] / max(bound, 1.0) - 1,
        }
    return gpu, figures


def figures_of(inputs: PlanInputs, gpu: Mask) -> dict[str, Any]:
    """The share of the groups `gpu` in all neurons and all firing, and the time of a token with and without them."""
    layout, firing, load, costs = inputs.layout, inputs.firing, inputs.load, inputs.costs
    shares = {
        "neurons": (gpu @ neurons_of(layout), np.full(len(gpu), layout.ffn)),
        "firing": (np.sum(firing, axis=1, where=gpu), firing.sum(1)),
    }
    spent = {
        "plan": layer_ns(load, gpu, costs),
        "cpu": layer_ns(load, np.zeros_like(gpu), costs),
        "uniform": layer_ns(load, first_groups(layout.groups, len(gpu), inputs.slots), costs),
    }
    layers = [{"groups": int(row.sum())} for row in gpu]
    columns = {name: part / np.maximum(whole, 1e-12) for name, (part, whole) in shares.items()}
    for name, values in (columns | {f"{name}_ns": values for name, values in spent.items()}).items():
        for layer, value in zip(layers, values.tolist(), strict=True):
            layer[name] = value
    return {
        "vram_budget": inputs.budget,
        "ledger": inputs.ledger,
        "left_bytes": inputs.budget - sum(inputs.ledger.values()),
        "group_bytes": layout.group_bytes,
        "slots": inputs.slots,
        "groups": int(gpu.sum()),
        **{name: float(part.sum() / max(whole.sum(), 1e-12)) for name, (part, whole) in shares.items()},
        **{f"{name}_ns": float(values.sum()) for name, values in spent.items()},
        "times": costs._asdict(),
        "layers": layers,
    }
