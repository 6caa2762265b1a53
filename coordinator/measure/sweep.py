"""`warmfront bench --sweep`: speed and memory over selectors, with their shares, and over limits of the GPU's memory.

Every point is an engine of its own; all take turns, so that whatever else the machine does meets all alike. The prompt
is text, since speed depends on what fires. What a selector loses is not told here, but by `warmfront eval`.
"""

import os
import statistics
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from warmfront.coordinator.engine.engine import Engine
from warmfront.coordinator.engine.load import sample_ids
from warmfront.coordinator.measure.picture import write_picture
from warmfront.coordinator.measure.selector_wishes import overrides_of
from warmfront.shared.errors import UsageError

__all__ = ["draw", "render", "sweep"]

# Tokens before those that count.
_WARM = 4
Say = Callable[[str], None]


class _Point(NamedTuple):
    """`budget`: bytes of the GPU's memory, 0: no GPU; None: as the other options have it."""

    selector: str
    budget: int | None


class _Sample(NamedTuple):
    decode_tps: float
    prefill_tps: float
    kept: float
    memory: int
    device_memory: int


def sweep(
    model: str,
    overrides: dict[str, Any],
    wishes: Sequence[str],
    budgets: Sequence[int | None],
    lengths: tuple[int, int],
    rounds: int,
    say: Say,
    progress: Callable[[str, int, int], None],
) -> dict[str, Any]:
    """The object that is printed: a row for each of `wishes` (`selector_wishes.py`) and `budgets`.

    `lengths`: tokens of the prompt and of the answer. Raises UsageError for what the model cannot be run with.
    """
    context, tokens = lengths
    points = [_Point(wish, budget) for wish in dict.fromkeys(wishes) for budget in dict.fromkeys(budgets)]
    options = {point: _options(overrides, point, context + tokens + 1) for point in points}
    samples: dict[_Point, list[_Sample]] = {point: [] for point in points}
    facts: dict[str, Any] = {}
    prompt: list[int] = []
    for turn in range(rounds):
        # The order turns, so that none always runs behind the same.
        start = turn % len(points)
        for point in points[start:] + points[:start]:
            with Engine.load(model, say=say if not turn else _quiet, progress=progress, **options[point]) as engine:
                say(f"round {turn + 1} of {rounds}: {_name(point)}")
                # The same for all: a model without words for the sample text writes its own, as the selector has it.
                prompt = prompt or _prompt(engine, context, tokens)
                samples[point].append(_sample(engine, prompt, tokens))
                facts = {"name": engine.model.spec.name, "dtype": engine.plan.config.dtype}
                facts["threads"] = len(engine.plan.cores.coordinator)
    rows = [_row(point, several) for point, several in samples.items()]
    return {"model": model, **facts, "context": context, "tokens": tokens, "rounds": rounds, "rows": rows}


def _quiet(_line: str) -> None:
    pass


def _options(overrides: dict[str, Any], point: _Point, context: int) -> dict[str, Any]:
    chosen = overrides | overrides_of(point.selector) | {"context": context}
    if point.budget is None:
        return chosen
    if point.budget == 0:
        return chosen | {"gpu": "none", "vram_budget": None}
    return chosen | {"vram_budget": point.budget}


def _name(point: _Point) -> str:
    if point.budget is None:
        return point.selector
    return f"{point.selector}, {'no GPU' if point.budget == 0 else f'{point.budget / 1e6:.0f} MB on the GPU'}"


def _prompt(engine: Engine, context: int, tokens: int) -> list[int]:
    if context + tokens >= engine.plan.context:
        raise UsageError(f"a context of {context} and {tokens} tokens: the model has {engine.plan.context}")
    ids = sample_ids(engine.session)
    return (ids * (1 + context // len(ids)))[:context]


def _sample(engine: Engine, prompt: list[int], tokens: int) -> _Sample:
    engine.decode_ids(prompt, _WARM)
    engine.reset()
    engine.decode_ids(prompt, tokens)
    workers, device = engine.statistics.workers(), sum(engine.statistics.device_memory().values())
    resident = sum(_proportional(pid) for pid in (os.getpid(), *(worker.pid for worker in workers)))
    return _Sample(
        decode_tps=engine.stats.decode_tps,
        prefill_tps=engine.stats.prefill_tps,
        kept=engine.statistics.active_fraction(workers) or 0.0,
        # What an emulated GPU has is memory of its process.
        memory=resident - device if engine.plan.gpu == "host" else resident,
        device_memory=device,
    )


def _proportional(pid: int) -> int:
    """Bytes of memory of a process, what it shares with others divided among them."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:"))


def _row(point: _Point, samples: Sequence[_Sample]) -> dict[str, Any]:
    rates = [sample.decode_tps for sample in samples]
    return {
        "selector": point.selector,
        "vram_budget": point.budget,
        "decode_tps": round(statistics.median(rates), 2),
        "decode_range": [round(min(rates), 2), round(max(rates), 2)],
        "prefill_tps": round(statistics.median(sample.prefill_tps for sample in samples), 2),
        "computed": round(statistics.median(sample.kept for sample in samples), 5),
        "memory": round(statistics.median(sample.memory for sample in samples)),
        "device_memory": round(statistics.median(sample.device_memory for sample in samples)),
    }


def render(result: dict[str, Any]) -> Iterator[str]:
    """The table for people."""
    yield (
        f"{result['name']} · {result['dtype']} · {result['threads']} threads · {result['tokens']} tokens behind "
        f"{result['context']} · medians of {result['rounds']}"
    )
    width = max(len("selector"), *(len(row["selector"]) for row in result["rows"]))
    yield f"{'selector':<{width}}  GPU limit    decode   (range)            prefill  computed    memory    on GPU"
    for row in result["rows"]:
        low, high = row["decode_range"]
        limit = "" if row["vram_budget"] is None else _megabytes(row["vram_budget"])
        yield (
            f"{row['selector']:<{width}}  {limit:>9} {row['decode_tps']:9.1f}   {f'({low:.1f} to {high:.1f})':<17}"
            f" {row['prefill_tps']:8.1f}  {row['computed']:8.1%} {_megabytes(row['memory']):>9} "
            f"{_megabytes(row['device_memory']):>9}"
        )


def _megabytes(size: int) -> str:
    return f"{size / 1e6:.0f} MB"


def draw(result: dict[str, Any], path: Path) -> None:
    """Write a picture (`picture.py`): tok/s and memory of each selector, a bar for each limit."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.5), layout="constrained")
    speeds, memories = figure.subplots(1, 2)
    selectors, budgets = ([*dict.fromkeys(row[key] for row in result["rows"])] for key in ("selector", "vram_budget"))
    for number, budget in enumerate(budgets):
        rows = [row for row in result["rows"] if row["vram_budget"] == budget]
        at = [selectors.index(row["selector"]) + (number - (len(budgets) - 1) / 2) * 0.8 / len(budgets) for row in rows]
        label = None if budget is None else f"GPU limit {_megabytes(budget)}"
        rates = [row["decode_tps"] for row in rows]
        below = [row["decode_tps"] - row["decode_range"][0] for row in rows]
        above = [row["decode_range"][1] - row["decode_tps"] for row in rows]
        width = 0.75 / len(budgets)
        speeds.bar(at, rates, width, yerr=[below, above], capsize=3, label=label)
        memories.bar(at, [(row["memory"] + row["device_memory"]) / 1e6 for row in rows], width, label=label)
    for panel, what in ((speeds, "tok/s, decoding"), (memories, "memory in all, MB")):
        panel.set(ylabel=what, title=f"{result['name']}, {result['dtype']}")
        panel.set_xticks(range(len(selectors)), selectors, rotation=30, ha="right")
    if budgets != [None]:
        speeds.legend(fontsize="small")
    write_picture(figure, path)
