"""`warmfront bench`: prefill and decode over contexts and selectors, against what the memory's bandwidth allows.

A decoded token reads every weight that it needs once, and the keys and values of all tokens before it:

    tok/s <= bandwidth / (attention + active feed-forward + predictor + head + KV)

What is read is printed beside the bandwidth: each share is of what was measured around that decode. Weights that fit
the last cache come faster, and their share may exceed 100 %. Prefill uses each weight for many tokens: arithmetic binds
it.

With a RAM budget the disk is a bound too: tok/s <= its bandwidth for reads of the run's size / bytes that a token reads
from it. What the decode read is counted without the prompt's reads, and past the page cache.
"""

import statistics
from collections.abc import Callable, Iterator, Sequence
from textwrap import wrap
from typing import Any, NamedTuple

from warmfront.coordinator.decode.footprint import attended_bytes
from warmfront.coordinator.engine.engine import Engine
from warmfront.coordinator.hardware.bandwidth import Bandwidth
from warmfront.coordinator.hardware.disk import disk_bandwidth
from warmfront.coordinator.measure.selector_wishes import overrides_of
from warmfront.shared.errors import UsageError

__all__ = ["measure", "render"]


class Sample(NamedTuple):
    """One prefill and decode: rates, and the disk's part of it."""

    rates: dict[str, float]
    disk: dict[str, float]


# Prompts are token ids from the vocabulary in turn: speed does not depend on them, but on a real model firing may.
_FIRST_ID, _STEP = 300, 7


def measure(
    model: str,
    overrides: dict[str, Any],
    selectors: Sequence[str],
    contexts: Sequence[int],
    tokens: int,
    rounds: int,
    say: Callable[[str], None],
    progress: Callable[[str, int, int], None],
) -> dict[str, Any]:
    """The object that is printed: settings, and a row for each of `selectors` (`selector_wishes.py`) and context."""
    rows: list[dict[str, Any]] = []
    for selector in selectors:
        options = overrides | overrides_of(selector) | {"context": max(contexts) + tokens + 1}
        with Engine.load(model, say=say, progress=progress, **options) as engine:
            if max(contexts) + tokens >= engine.plan.context:
                raise UsageError(
                    f"a context of {max(contexts)} and {tokens} tokens: the model has {engine.plan.context}"
                )
            bandwidth = Bandwidth(engine.plan.cores.coordinator)
            say(f"measuring selector {engine.plan.selector}")
            list(engine.generate(_prompt(engine, contexts[0]), max_new_tokens=8))
            samples: dict[int, list[Sample]] = {context: [] for context in contexts}
            for _ in range(rounds):
                for context in contexts:
                    samples[context].append(_sample(engine, bandwidth, context, tokens))
            for context, several in samples.items():
                label = engine.plan.selector.name if selector == "auto" else selector
                rows.append({"selector": label, "context": context} | _row(engine, context, tokens, several))
            settings = {
                "model": model,
                "name": engine.model.spec.name,
                "dtype": engine.plan.config.dtype,
                "threads": len(engine.plan.cores.coordinator),
                "workers": len(engine.statistics.workers()),
                "tokens": tokens,
                "rounds": rounds,
            }
    return settings | {"rows": rows}


def _prompt(engine: Engine, context: int) -> list[int]:
    vocab = engine.model.spec.vocab
    return [(_FIRST_ID + _STEP * i) % vocab for i in range(context)]


def _sample(engine: Engine, bandwidth: Bandwidth, context: int, tokens: int) -> Sample:
    """One prefill and decode of which the text's own end is ignored."""
    before = bandwidth.measure()
    engine.reset()
    read = _bytes_read(engine)
    engine.decode_ids(_prompt(engine, context), tokens)
    stats, neurons = engine.stats, (_bytes_read(engine) - read) / tokens
    rates = {
        "prefill_tps": stats.prefill_tps,
        "decode_tps": stats.decode_tps,
        "feed_forward": neurons,
        "bandwidth": (before + bandwidth.measure()) / 2,
    }
    return Sample(rates, _disk(engine, tokens))


def _disk(engine: Engine, tokens: int) -> dict[str, float]:
    """What the decode read from the disk, and what the disk gives to such reads now; empty without a RAM budget."""
    cache = engine.stats.cache
    if cache is None:
        return {}
    # Without a miss the size of reads is what a neuron may be.
    size = cache.bytes_read // cache.requests if cache.requests else engine.model.layout.bundle_bytes
    bandwidth, read = disk_bandwidth(engine.model.path, size), cache.bytes_read / tokens
    return {
        "hit_share": cache.hit_share,
        "miss_share_p99": cache.miss_share(0.99),
        "bytes_per_token": read,
        "reads_per_token": cache.requests / tokens,
        "stall_ms_per_token": cache.stall_ns / 1e6 / tokens,
        "bandwidth": bandwidth,
        "roofline_tps": bandwidth / max(read, 1),
    }


def _bytes_read(engine: Engine) -> int:
    return sum(worker.bytes for worker in engine.statistics.workers())


def _row(engine: Engine, context: int, tokens: int, several: Sequence[Sample]) -> dict[str, Any]:
    samples = [sample.rates for sample in several]
    parts = engine.statistics.coordinator_bytes() | {
        "feed_forward": statistics.median(sample["feed_forward"] for sample in samples),
        "kv": attended_bytes(engine.model.spec, engine.plan.cache_kind, context + tokens // 2),
    }
    total = sum(parts.values())
    shares = [sample["decode_tps"] * total / 1e9 / sample["bandwidth"] for sample in samples]
    columns = {name: [sample[name] for sample in samples] for name in ("prefill_tps", "decode_tps", "bandwidth")}
    return {
        **{name: round(statistics.median(values), 2) for name, values in columns.items()},
        "decode_range": [round(min(columns["decode_tps"]), 2), round(max(columns["decode_tps"]), 2)],
        "read": round(statistics.median(sample["decode_tps"] for sample in samples) * total / 1e9, 2),
        "roofline_share": round(statistics.median(shares), 3),
        "bytes_per_token": {name: round(size) for name, size in parts.items()},
        "disk": {
            name: round(statistics.median(sample.disk[name] for sample in several), 4) for name in several[0].disk
        },
    }


def render(result: dict[str, Any], width: int) -> Iterator[str]:
    """The table for people, or a paragraph for each row where the terminal's `width` columns do not hold it."""
    yield f"{result['name']} · {result['dtype']} · {result['threads']} threads · medians of {result['rounds']}"
    head = "selector   context   prefill    decode   (range)            reads   of GB/s    share   MB a token"
    lines = [head, *_table(result)]
    yield from lines if max(map(len, lines)) <= width else _paragraphs(result)
    for row in result["rows"]:
        if row["disk"]:
            yield from wrap(_from_disk(row), width, subsequent_indent="  ")


def _from_disk(row: dict[str, Any]) -> str:
    disk = row["disk"]
    return (
        f"{row['selector']}, context {row['context']}, from the disk: {disk['bytes_per_token'] / 1e6:.1f} MB a token "
        f"in {disk['reads_per_token']:.0f} reads, of which it gives {disk['bandwidth'] / 1e6:.0f} MB/s: at most "
        f"{disk['roofline_tps']:.1f} tok/s · {disk['hit_share']:.1%} of the neurons were in memory, of 99 % of the "
        f"tokens {1 - disk['miss_share_p99']:.0%} or more · waited {disk['stall_ms_per_token']:.1f} ms a token"
    )


def _table(result: dict[str, Any]) -> Iterator[str]:
    for row in result["rows"]:
        low, high = row["decode_range"]
        yield (
            f"{row['selector']:<10} {row['context']:7} {row['prefill_tps']:9.1f} {row['decode_tps']:9.1f}"
            f"   {f'({low:.1f} to {high:.1f})':<17} {row['read']:6.1f} {row['bandwidth']:9.1f}"
            f" {row['roofline_share']:8.0%}   {', '.join(_parts(row))}"
        )


def _paragraphs(result: dict[str, Any]) -> Iterator[str]:
    for row in result["rows"]:
        low, high = row["decode_range"]
        yield f"selector {row['selector']}, context {row['context']}"
        yield f"  prefill {row['prefill_tps']:.1f} tok/s"
        yield f"  decode {row['decode_tps']:.1f} ({low:.1f} to {high:.1f})"
        yield f"  reads {row['read']:.1f} of {row['bandwidth']:.1f} GB/s: {row['roofline_share']:.0%}"
        yield from (f"  {part} MB a token" for part in _parts(row))


def _parts(row: dict[str, Any]) -> list[str]:
    return [f"{name} {size / 1e6:.1f}" for name, size in row["bytes_per_token"].items() if size]
