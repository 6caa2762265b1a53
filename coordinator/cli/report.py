"""What `generate --json` and `--stats` say of an answer."""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from warmfront.coordinator.engine.engine import Engine
from warmfront.coordinator.engine.stats import Token, WorkerStats
from warmfront.shared.selector import ALL, EXACT, Source

__all__ = ["as_object", "as_text", "fault_of", "rates"]


def as_object(engine: Engine, model: str, prompt_ids: Sequence[int], tokens: Sequence[Token]) -> dict[str, Any]:
    """The object that `generate --json` prints."""
    workers, stats, selection = engine.statistics.workers(), engine.stats, engine.statistics.selection()
    uses, core, cache = engine.statistics.expert_uses(), engine.statistics.core(), engine.statistics.cache()
    facts = {
        "text": "".join(token.text for token in tokens),
        "token_ids": [token.id for token in tokens],
        "prompt_ids": list(prompt_ids),
        "finish_reason": stats.finish_reason,
        "load_s": round(stats.load_s, 4),
        "prefill_tps": round(stats.prefill_tps, 2),
        "decode_tps": round(stats.decode_tps, 2),
        "drafted": stats.drafted,
        "accepted": stats.accepted,
        "active_fraction": engine.statistics.active_fraction(workers),
        "selection": selection._asdict() if selection is not None else None,
        "cores": core._asdict() if core is not None else None,
        "cache": cache.facts() if cache is not None else None,
        "expert_uses": uses.tolist() if uses is not None else None,
        "workers": [asdict(worker) for worker in workers],
        "selector": engine.plan.selector.name,
        "dtype": engine.plan.config.dtype,
        "activation": engine.model.spec.activation,
        "model": model,
    }
    if any(token.logprob is not None for token in tokens):
        facts["logprobs"] = [
            _logprob(engine, token.id, token.logprob) | {"top": [_logprob(engine, *top) for top in token.top]}
            for token in tokens
        ]
    return facts


def _logprob(engine: Engine, token: int, logprob: float | None) -> dict[str, Any]:
    return {"id": token, "text": engine.tokenizer.decode([token]), "logprob": logprob}


def fault_of(engine: Engine) -> str | None:
    """What makes the answers worthless, if it can be seen: predictors that have chosen nothing at all."""
    if (
        Source.LOWRANK not in engine.plan.selector.sources
        or engine.statistics.active_fraction(engine.statistics.workers()) != 0
    ):
        return None
    other = EXACT if engine.model.spec.sparse else ALL
    return f"the predictors of {engine.model.spec.name} chose no neuron for any token: pass --selector {other}"


def rates(engine: Engine) -> str:
    """One line of times and rates of the last answer."""
    stats = engine.stats
    guessed = f" · {stats.accepted} of {stats.drafted} guessed tokens came true" if engine.plan.speculates else ""
    return (
        f"load {stats.load_s:.2f} s · prefill {stats.prefilled} tokens in {stats.prefill_s:.2f} s "
        f"({stats.prefill_tps:.0f} tok/s) · decode {stats.new_tokens} tokens in {stats.decode_s:.2f} s "
        f"({stats.decode_tps:.1f} tok/s){guessed}"
    )


def as_text(engine: Engine) -> str:
    """The lines that `generate --stats` prints."""
    workers, busy = engine.statistics.workers(), engine.statistics.busy_shares(engine.stats.decode_s)
    lines = [rates(engine)]
    active = engine.statistics.active_fraction(workers)
    if active is not None:
        lines.append(f"selector {engine.plan.selector} · {active:.1%} of the neurons computed")
    selection = engine.statistics.selection()
    if selection is not None:
        lines.append(
            f"{selection.fired:.1%} of the neurons fired, {selection.selected:.1%} were predicted · "
            f"recall {selection.recall:.1%} · precision {selection.precision:.1%} (sampled)"
        )
    cache = engine.statistics.cache()
    if cache is not None:
        lines.append(cache.described())
    core = engine.statistics.core()
    if core is not None:
        alike = "" if core.overlap is None else f" · its halves {core.overlap:.0%} alike"
        drift = "" if core.drift is None else f" · {core.drift:.4f} nats lost"
        lines.append(f"core chosen {core.chosen} times, given up {core.given_up} times{alike}{drift}")
    uses = engine.statistics.expert_uses()
    # None are chosen where no layer has experts, as a file may say.
    if uses is not None and uses.any():
        busiest = max(1, uses.shape[1] // 10)
        shares = [np.sort(layer)[-busiest:].sum() / layer.sum() for layer in uses if layer.any()]
        lines.append(
            f"the {busiest} busiest of {uses.shape[1]} experts took {np.mean(shares):.1%} of the choices "
            f"(by layer {min(shares):.1%} to {max(shares):.1%})"
        )
    for worker in workers:
        per_token = worker.neurons / max(1, worker.jobs // engine.model.spec.layers)
        lines.append(
            f"{worker.name} ({worker.device}, pid {worker.pid}) · busy {busy[worker.name]:.0%} of the decode time · "
            f"{worker.groups} groups · {per_token:.0f} neurons a token{_places(worker)}"
        )
    return "\n".join(lines)


def _places(worker: WorkerStats) -> str:
    """The NUMA nodes that hold a worker's weights."""
    total = sum(worker.nodes.values())
    if not total:
        return ""
    return " · memory on " + ", ".join(f"{node} {size / total:.0%}" for node, size in worker.nodes.items())
