"""The description of mixtures of experts from the fields of a GGUF file."""

from dataclasses import replace

from warmfront.coordinator.models.described import chosen_layers, described, for_layers, layer_windows
from warmfront.coordinator.models.fields import Fields
from warmfront.coordinator.models.gguf.config import Factors, Found, llama, rotary
from warmfront.shared.model.architecture import Experts, Positions
from warmfront.shared.model.spec import ModelSpec

__all__ = [
    "glm4moe",
    "gpt_oss",
    "gpt_oss_rotary",
    "mixture",
    "normalised_mixture",
    "smallthinker",
    "smallthinker_rotary",
]

# The scoring by the value of a field of llama.cpp's.
_SCORINGS = {1: "softmax", 2: "sigmoid"}
# Of so many layers of a SmallThinker with windows the first has none, and no positions.
_SMALLTHINKER_PATTERN = 4


def mixture(
    fields: Fields, found: Found, *, normalised: bool = False, scorings: tuple[str, ...] = ("softmax",)
) -> ModelSpec:
    """A Llama with experts; `normalised`: whether the weights of the active ones sum to one; `scorings`: the family's.

    Files say that only of some families: of the others it is what llama.cpp takes them to be.
    """
    spec = llama(fields, found)
    keys, shapes = fields.under(f"{spec.family}."), found.shapes
    known = {number: scoring for number, scoring in _SCORINGS.items() if scoring in scorings}
    gating = keys.count("expert_gating_func", 1)
    if gating not in known:
        expected = f"{' or '.join(map(str, known))}, a {' or a '.join(scorings)}, which a {spec.family} model has"
        raise keys.wrong("expert_gating_func", expected)
    # Some files give the size of the experts in one field, some in the other, and old ones in none.
    (ffn, *_), (shared, *_) = (
        next((shape for name, shape in shapes.items() if name.endswith(part)), (usual,))
        for part, usual in ((".experts.0.gate", spec.ffn), (".shared.gate", 0))
    )
    dense = chosen_layers(spec, lambda layer: f"layers.{layer}.gate" in shapes)
    experts = Experts(
        number=keys.count("expert_count"),
        active=keys.count("expert_used_count"),
        scoring=known[gating],
        normalised=keys.flag("expert_weights_norm", normalised),
        scale=keys.positive("expert_weights_scale", 1.0),
        shared=shared,
        shared_gate=any(name.endswith(".shared_router") for name in shapes),
        corrected=any(name.endswith(".correction.bias") for name in shapes),
        groups=keys.count("expert_group_count", 1),
        active_groups=keys.count("expert_group_used_count", 1),
        dense_layers=dense,
        dense=spec.ffn if dense else 0,
    )
    return described(replace(spec, ffn=ffn), feed_forward={"experts": experts})


def normalised_mixture(fields: Fields, found: Found) -> ModelSpec:
    """The same, of a family whose files need not say that the weights sum to one."""
    return mixture(fields, found, normalised=True)


def smallthinker(fields: Fields, found: Found) -> ModelSpec:
    """A Llama with experts that are chosen by the layer's input; with a window in three layers of four or in none."""
    spec = mixture(fields, found, normalised=True, scorings=("softmax", "sigmoid"))
    experts = spec.architecture.feed_forward.experts
    assert experts is not None
    window = max(spec.architecture.attention.windows, default=0)
    attention = {"windows": layer_windows(spec, window, _has_positions)}
    return described(spec, attention=attention, feed_forward={"experts": replace(experts, early=True)})


def smallthinker_rotary(fields: Fields, spec: ModelSpec, factors: Factors) -> Positions:
    """One table, for the layers with a window where there are any."""
    windows = spec.architecture.attention.windows
    return for_layers(rotary(fields, spec, factors), [window > 0 for window in windows])


def _has_positions(layer: int) -> bool:
    return layer % _SMALLTHINKER_PATTERN != 0


def glm4moe(fields: Fields, found: Found) -> ModelSpec:
    """A Llama whose layers but the first have experts that biases help to choose."""
    return mixture(fields, found, scorings=("sigmoid",))


def gpt_oss(fields: Fields, found: Found) -> ModelSpec:
    """A Llama with experts, biases everywhere, sinks, and windows in every other layer."""
    spec = normalised_mixture(fields, found)
    experts = spec.architecture.feed_forward.experts
    assert experts is not None
    window = fields.count(f"{spec.family}.attention.sliding_window", 128, low=0)
    return described(
        spec,
        attention={"sinks": True, "windows": layer_windows(spec, window, lambda layer: layer % 2 == 0)},
        feed_forward={"biases": ("gate", "up", "down"), "experts": replace(experts, bias=True)},
    )


def gpt_oss_rotary(fields: Fields, spec: ModelSpec, factors: Factors) -> Positions:
    """One table; gpt-oss was trained with YaRN's bounds as they are, not as whole pairs (`truncate` false)."""
    return rotary(fields, spec, factors, whole=False)
