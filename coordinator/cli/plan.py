"""`warmfront plan`: which groups of neurons the GPU is to get, for a budget of its memory, and what that is worth.

Speeds are predicted from measured costs (`measured_costs.py`) and are of the feed-forward layers alone.
"""

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from warmfront.coordinator.engine.engine import Engine
from warmfront.coordinator.measure.measured_costs import key_of, load_costs, measure_costs, save_costs
from warmfront.coordinator.measure.picture import write_picture
from warmfront.coordinator.placement.expected_load import expected_bytes, firing_of, neurons_of
from warmfront.coordinator.placement.homes import first_groups
from warmfront.coordinator.placement.plan_file import write_plan
from warmfront.coordinator.placement.solver import DeviceCosts, Floats, Mask, layer_ns, solve, solve_exact
from warmfront.shared.model.branches import bounds_of, groups_of, has_experts
from warmfront.shared.model.bundle import BundleLayout
from warmfront.shared.model.spec import ModelSpec

__all__ = ["PlanInputs", "draw", "figures_of", "make_plan", "plan", "plan_inputs", "render"]

_MIN_BAR, _MAX_BAR = 4, 40


class PlanInputs(NamedTuple):
    """What a plan is computed from."""

    layout: BundleLayout
    firing: Floats  # [layers, groups], as `solve` takes it
    load: Floats  # [layers, groups], as `solve` takes it
    costs: DeviceCosts
    budget: int  # bytes of GPU memory
    ledger: dict[str, int]  # what the GPU worker allocates of it, bytes by purpose; "slots" holds groups
    spec: ModelSpec

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
        facts = {"model": name, "selector": engine.plan.selector.name, "device": engine.statistics.workers()[-1].device}
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
    load = expected_bytes(model, engine.plan.selector)
    return PlanInputs(model.layout, firing_of(model), load, costs, budget, ledger, model.spec)


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
    # Of layers without experts some groups have no weights.
    weighty = [np.arange(layout.groups) < groups_of(inputs.spec, layer) for layer in range(len(gpu))]
    neurons = neurons_of(layout) * np.array(weighty)
    shares = {
        "neurons": (np.sum(neurons, axis=1, where=gpu), neurons.sum(1)),
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
        **experts_of(inputs.spec, gpu),
    }


def experts_of(spec: ModelSpec, gpu: Mask) -> dict[str, Any]:
    """How many experts the groups `gpu` hold whole and in part, and what part of shared ones; empty without any."""
    experts, bounds = spec.architecture.feed_forward.experts, bounds_of(spec)
    if experts is None:
        return {}
    gpu = gpu[[layer for layer in range(len(gpu)) if has_experts(spec, layer)]]
    before = np.zeros((len(gpu), gpu.shape[1] + 1), np.int64)
    np.cumsum(gpu, axis=1, out=before[:, 1:])
    held, sizes = before[:, bounds[1:]] - before[:, bounds[:-1]], np.diff(bounds)
    # The first branch and the one behind the experts are what is shared, or empty.
    routed = np.arange(len(sizes)) % (experts.number + 1) > 0
    shared = float(held[:, ~routed].sum() / max(1, len(gpu) * sizes[~routed].sum()))
    return {
        "experts": {
            "whole": int((held == sizes)[:, routed].sum()),
            "part": int(((held > 0) & (held < sizes))[:, routed].sum()),
            "of": len(gpu) * experts.number,
            "shared": shared if experts.shared else None,
        }
    }


def render(figures: dict[str, Any], width: int) -> Iterator[str]:
    """The figures as lines for a terminal of `width` columns."""
    yield f"{figures['model']} · {figures['selector']} · {figures['device']}"
    yield f"  {'GPU memory':<14} {_mb(figures['vram_budget'])}"
    for purpose, size in figures["ledger"].items():
        note = f" = {figures['slots']} x {figures['group_bytes']} bytes" if purpose == "slots" else ""
        yield f"  {purpose:<14} {_mb(size)}{note}"
    yield f"  {'left':<14} {_mb(figures['left_bytes'])}"
    for side in ("cpu", "gpu"):
        job, byte = (figures["times"][f"{side}_{what}_ns"] for what in ("job", "byte"))
        yield f"  {f'{side.upper()} speed':<14} {job / 1e3:.1f} us a layer and {byte * 1e3:.1f} us a MB, measured"
    yield from _bars(figures, width)
    shares = f"{figures['neurons']:.1%} of the neurons, {figures['firing']:.1%} of the firing"
    yield f"on the GPU: {figures['groups']} groups, {shares}"
    if experts := figures.get("experts"):
        whole = f"{experts['whole']} of {experts['of']} experts whole, {experts['part']} in part"
        shared = "" if experts["shared"] is None else f"; of the shared ones {experts['shared']:.0%}"
        yield f"  {whole}{shared}"
    if not figures["groups"]:
        slow = figures["times"]["gpu_byte_ns"] >= figures["times"]["cpu_byte_ns"]
        why = "it takes as long for a byte as the CPU" if slow else "in no layer it saves more than its job takes"
        yield f"nothing pays on this GPU: {why}"
    elif figures["groups"] < figures["slots"]:
        yield f"{figures['slots'] - figures['groups']} slots stay empty: with more the GPU would be the slower side"
    yield f"feed-forward, predicted: {_ms(figures['plan_ns'])} a token"
    for name, what in (("cpu", "CPU alone"), ("uniform", "as many groups in every layer")):
        ns = figures[f"{name}_ns"]
        yield f"  {what}: {_ms(ns)}, {ns / max(figures['plan_ns'], 1):.2f}x as long"
    if exact := figures.get("exact"):
        above = f"this plan is at most {max(exact['plan_above'], 0):.2%} above the optimum"
        yield f"  exact solver: {_ms(exact['ns'])}; {above}"


def _mb(size: int) -> str:
    return f"{size / 1e6:12,.2f} MB"


def _ms(ns: float) -> str:
    return f"{ns / 1e6:.3f} ms"


def _bars(figures: dict[str, Any], width: int) -> Iterator[str]:
    """A line for each layer: the share of its neurons that is on the GPU, and of its firing."""
    bar = min(max((width - len("layer   100.0%   100.0%")) // 2, _MIN_BAR), _MAX_BAR)
    heads = [f"{name:<{bar + 7}}"[: bar + 7] for name in ("neurons on the GPU", "firing on the GPU")]
    yield f"layer  {heads[0]}  {heads[1]}".rstrip()
    for number, layer in enumerate(figures["layers"]):
        columns = (f"{_bar(layer[name], bar)} {layer[name]:6.1%}" for name in ("neurons", "firing"))
        yield f"{number:5}  {'  '.join(columns)}"


def _bar(share: float, width: int) -> str:
    filled = round(share * width)
    return "#" * filled + "." * (width - filled)


def draw(figures: dict[str, Any], path: Path) -> None:
    """Write a picture (`picture.py`): the shares on the GPU by layer, and the predicted time of each layer."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    layers = range(len(figures["layers"]))
    figure = Figure(figsize=(11, 4.5), layout="constrained")
    left, right = figure.subplots(1, 2)
    for offset, name in ((-0.2, "neurons"), (0.2, "firing")):
        values = [100 * layer[name] for layer in figures["layers"]]
        left.bar([number + offset for number in layers], values, 0.4, label=name)
    left.set(xlabel="layer", ylabel="on the GPU, %", ylim=(0, 100))
    for name, label in (("cpu", "CPU alone"), ("uniform", "as many groups in every layer"), ("plan", "plan")):
        right.plot(layers, [layer[f"{name}_ns"] / 1e3 for layer in figures["layers"]], ".-", label=label)
    right.set(xlabel="layer", ylabel="feed-forward, us a token, predicted")
    right.set_ylim(bottom=0)
    for panel in (left, right):
        panel.xaxis.set_major_locator(MaxNLocator(integer=True))
        panel.legend()
    figure.suptitle(f"{figures['model']}: {figures['vram_budget'] / 1e6:,.0f} MB of GPU memory")
    write_picture(figure, path)
