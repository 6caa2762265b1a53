"""A GPU plan as lines of text with bars, and as a picture."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

__all__ = ["draw", "render"]

_MIN_BAR, _MAX_BAR = 4, 40


def render(figures: dict[str, Any], width: int) -> Iterator[str]:
    """The figures of `cli.plan` as lines for a terminal of `width` columns."""
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
    """Write a PNG: the shares on the GPU by layer, and the predicted time of each layer."""
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
    figure.savefig(path, format="png")
