"""A family's description made from another's: what differs is said, the rest stays."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType
from typing import Any

from warmfront.shared.model.architecture import Positions
from warmfront.shared.model.spec import ModelSpec

__all__ = ["chosen_layers", "described", "for_layers", "layer_windows", "positions_of"]

_AS_IT_IS: Mapping[str, Any] = MappingProxyType({})


def described(
    spec: ModelSpec,
    *,
    norm: Mapping[str, Any] = _AS_IT_IS,
    attention: Mapping[str, Any] = _AS_IT_IS,
    feed_forward: Mapping[str, Any] = _AS_IT_IS,
    **fields: Any,
) -> ModelSpec:
    """The description with fields of its architecture replaced, and fields of the parts of that."""
    old = spec.architecture
    parts: dict[str, Any] = {
        "norm": replace(old.norm, **norm),
        "attention": replace(old.attention, **attention),
        "feed_forward": replace(old.feed_forward, **feed_forward),
    }
    return replace(spec, architecture=replace(old, **parts, **fields))


def positions_of(_fields: object, spec: ModelSpec, *_more: object) -> Positions:
    """The positions of a description that has them from the start, as learned ones are, which are a tensor."""
    return spec.architecture.positions


def for_layers(positions: Positions, used: Sequence[bool]) -> Positions:
    """One rotary table for the layers that use it."""
    return positions if all(used) else replace(positions, rotary_of_layer=tuple(each - 1 for each in used))


def layer_windows(spec: ModelSpec, window: int, local: Callable[[int], bool]) -> tuple[int, ...]:
    """`window` tokens for the layers that are `local`, 0 for the others; 0 tokens are no windows at all."""
    return tuple(window * local(layer) for layer in _layers(spec)) if window else ()


def chosen_layers(spec: ModelSpec, chosen: Callable[[int], bool]) -> tuple[int, ...]:
    """The layers that are `chosen`."""
    return tuple(filter(chosen, _layers(spec)))


def _layers(spec: ModelSpec) -> range:
    # A hostile file may claim any number of layers, of which the tensors know nothing yet.
    if spec.layers > 1 << 16:
        raise ValueError(f"{spec.layers} layers are more than any model has; the file is damaged")
    return range(spec.layers)
