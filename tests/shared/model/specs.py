"""A small model's description, and ways to change it deep inside."""

import json
from dataclasses import replace
from typing import Any

from warmfront.shared.model.architecture import Architecture, Attention, FeedForward, Norm, Positions, Rotary
from warmfront.shared.model.spec import ModelSpec

SPEC = ModelSpec(
    family="llama",
    name="by hand",
    layers=2,
    hidden=32,
    ffn=70,
    vocab=5,
    context=64,
    architecture=Architecture(
        norm=Norm(epsilon=1e-5),
        positions=Positions(rotary=(Rotary(frequencies=tuple(0.5**i for i in range(8))),)),
        attention=Attention(heads=2, kv_heads=1, head_dim=16),
        feed_forward=FeedForward(activation="relu"),
    ),
)


def changed(spec: Any, path: str, value: Any) -> Any:
    """The dataclass with the field at `path`, such as "architecture.norm.bias", replaced."""
    field, _, rest = path.partition(".")
    return replace(spec, **{field: changed(getattr(spec, field), rest, value) if rest else value})


def edited(spec: ModelSpec, path: str, value: Any) -> str:
    """Its JSON with the field at `path` replaced, or added, whatever the value; ... removes it."""
    whole: Any = json.loads(spec.to_json())
    *parents, field = path.split(".")
    at = whole
    for name in parents:
        at = at[int(name)] if isinstance(at, list) else at[name]
    if value is ...:
        del at[field]
    else:
        at[field] = value
    return json.dumps(whole)


def uncomputed(spec: ModelSpec) -> Any:
    """The same with what can be described and is not computed: a "parallel residual with post-norm"."""
    return changed(changed(spec, "architecture.norm.placement", "post"), "architecture.residual", "parallel")
