"""`warmfront info`: what a model is, read from its own files; nothing is packed or started."""

from collections import Counter
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from warmfront.coordinator.engine.resolve import selectors_for
from warmfront.coordinator.models.find import find_model
from warmfront.coordinator.models.open import open_source
from warmfront.coordinator.models.source import Source
from warmfront.coordinator.packing.packer import PackingPlan
from warmfront.shared.config import EngineConfig
from warmfront.shared.model.branches import parts_of
from warmfront.shared.model.spec import ModelSpec

__all__ = ["describe", "render"]


def describe(
    model: str, config: EngineConfig, say: Callable[[str], None], progress: Callable[[str, int, int], None]
) -> dict[str, Any]:
    """Facts about `model` as it would be packed with the weight type of `config`; sizes in bytes."""
    source = open_source(find_model(model, say, progress))
    spec, plan = source.spec, PackingPlan(source, config.dtype)
    if config.activation != "auto":
        spec = spec.activated(config.activation)
    attention = spec.architecture.attention
    sizes: Counter[str] = Counter()
    for name in plan.shapes:
        sizes[_part(name)] += plan.size(name)
    kinds = Counter(kind.name.lower() for name, kind in plan.kinds.items() if _part(name) == "attention")
    return {
        "model": spec.name,
        "architecture": spec.family,
        "layers": spec.layers,
        "hidden": spec.hidden,
        "ffn": spec.ffn,
        "experts": _experts(spec),
        "heads": attention.heads,
        "kv_heads": attention.kv_heads,
        "head_dim": attention.head_dim,
        "vocab": spec.vocab,
        "context": spec.context,
        "activation": spec.activation,
        "sparse": spec.sparse,
        "predictor": _predictor(source),
        "selectors": [selector.name for selector in selectors_for(spec)],
        "dtypes": {
            "attention": "/".join(sorted(kinds)),
            "gate, up": plan.layout.gate_kind.name.lower(),
            "down": plan.layout.down_kind.name.lower(),
            "embedding": plan.kinds["embed"].name.lower(),
        },
        "bytes": dict(sizes),
        "tokenizer": source.tokenizer is not None,
        "chat": source.tokenizer is not None and bool(source.tokenizer.chat_templates),
        "notes": source.notes + ([source.tokenizer.note] if source.tokenizer and source.tokenizer.note else []),
    }


def _experts(spec: ModelSpec) -> dict[str, Any] | None:
    """Of a mixture how many experts a layer has and a token uses, their neurons, and those of the others."""
    experts = spec.architecture.feed_forward.experts
    if experts is None:
        return None
    return {
        "number": experts.number,
        "used": experts.active,
        "neurons": spec.ffn,
        "shared_neurons": experts.shared,
        "dense_layers": list(experts.dense_layers),
        "dense_neurons": experts.dense,
    }


def _neurons(facts: dict[str, Any]) -> str:
    """What a layer's feed-forward is, for people."""
    experts = facts["experts"]
    if experts is None:
        return f"{facts['ffn']} neurons"
    parts = [f"{experts['number']} experts of {experts['neurons']} neurons, {experts['used']} used"]
    if experts["shared_neurons"]:
        parts.append(f"{experts['shared_neurons']} neurons for all tokens")
    if experts["dense_layers"]:
        parts.append(f"{len(experts['dense_layers'])} of the layers {experts['dense_neurons']} neurons instead")
    return "; ".join(parts)


def _predictor(source: Source) -> dict[str, Any] | None:
    """The settings of the predictors, and the smallest and largest rank of a layer; None without predictors."""
    spec = source.spec
    if spec.predictor is None:
        return None
    first = [f"layers.{i}.{parts_of(spec, i)[0].prefix}fc1" for i in range(spec.layers)]
    ranks = [source.tensor(name).shape[0] for name in first]
    return asdict(spec.predictor) | {"rank": [min(ranks), max(ranks)]}


def _part(name: str) -> str:
    if name.endswith(".ffn"):
        return "feed-forward"
    if name in ("embed", "head"):
        return "embedding and head"
    if name.split(".")[2:3] in (["fc1"], ["fc2"]):
        return "predictor"
    return "attention" if name.split(".")[-1] in ("q", "k", "v", "o") else "rest"


def render(facts: dict[str, Any]) -> str:
    """The object of `describe` as lines for people."""
    total = sum(facts["bytes"].values())
    sparse = "zero for most neurons" if facts["sparse"] else "never zero"
    lines = [
        f"{facts['model']} ({facts['architecture']})",
        f"  layers         {facts['layers']} x (hidden {facts['hidden']}, {_neurons(facts)})",
        f"  attention      {facts['heads']} heads of {facts['head_dim']}, {facts['kv_heads']} for keys and values",
        f"  vocabulary     {facts['vocab']}",
        f"  context        {facts['context']} tokens",
        f"  activation     {facts['activation']}, {sparse}",
        f"  selectors      {', '.join(facts['selectors'])}",
        f"  chat template  {'yes' if facts['chat'] else 'no'}",
        "  weights        " + ", ".join(f"{part} {kind}" for part, kind in facts["dtypes"].items()),
    ]
    if facts["predictor"] is not None:
        low, high = facts["predictor"]["rank"]
        ranks = f"rank {low}" if low == high else f"ranks {low} to {high}"
        lines.append(f"  predictor      {ranks}, active above {facts['predictor']['threshold']:g}")
    lines += [f"  {part:<20} {size / 1e6:10.1f} MB {size / total:6.1%}" for part, size in facts["bytes"].items()]
    lines.append(f"  {'in all':<20} {total / 1e6:10.1f} MB")
    lines += [f"  note: {note}" for note in facts["notes"]]
    return "\n".join(lines)
