"""What a token is expected to fire and to read of each group of neurons, from the model's profile."""

import numpy as np
import numpy.typing as npt

from warmfront.coordinator.profile.counts import Profile
from warmfront.coordinator.profile.expert_uses import kept_expert_uses
from warmfront.shared.model.branches import bounds_of, groups_of, has_experts
from warmfront.shared.model.bundle import GROUP, BundleLayout
from warmfront.shared.model.store import PackedModel
from warmfront.shared.selector import Selector, Work

__all__ = ["expected_bytes", "firing_of", "load_of", "neurons_of", "use_bytes"]

Floats = npt.NDArray[np.float64]


def neurons_of(layout: BundleLayout) -> npt.NDArray[np.int64]:
    """int64 [groups]: the neurons of each group, without padding."""
    return np.clip(layout.ffn - GROUP * np.arange(layout.groups), 0, GROUP)


def firing_of(model: PackedModel) -> Floats:
    """Neurons that a token fires of each group, float64 [layers, groups]: all of them in a model without a profile."""
    profile = Profile.of(model)
    if profile is not None:
        return profile.group_firing()
    return neurons_of(model.layout) * _use(model)


def _use(model: PackedModel) -> Floats:
    """How often a token uses each group, float64 [layers, groups]: if nothing is known of the experts, all equally
    often."""
    spec = model.spec
    bounds, experts = bounds_of(spec), spec.architecture.feed_forward.experts
    use = np.ones((spec.layers, bounds[-1]))
    counted = None if experts is None else kept_expert_uses(model)
    for layer in range(spec.layers):
        use[layer, groups_of(spec, layer) :] = 0
        if experts is not None and has_experts(spec, layer):
            chances = np.full(experts.number, experts.active / experts.number)
            if counted is not None:
                chances = counted.chances(experts.active)[layer]
            sizes = np.diff(bounds[1 : 2 + experts.number])
            use[layer, bounds[1] : bounds[1 + experts.number]] = np.repeat(chances, sizes)
    return use


def load_of(layout: BundleLayout, selector: Selector, firing: Floats) -> Floats:
    """Bytes that computing each group reads per token, float64 [layers, groups], if `firing` of its neurons fire.

    A predictor is taken to select the neurons that fire and no others.
    """
    gate, rest = layout.gate_bytes, layout.rest_bytes
    if selector.work is Work.MASK:
        return firing * (gate + rest)
    return GROUP * gate + (firing if selector.work is Work.GATES else np.full_like(firing, GROUP)) * rest


def expected_bytes(model: PackedModel, selector: Selector) -> Floats:
    """Bytes that a token is expected to read of each group, by the model's profile: float64 [layers, groups]."""
    return use_bytes(model, selector) * _use(model)


def use_bytes(model: PackedModel, selector: Selector) -> Floats:
    """The same of each group of a token that uses it, which of an expert's not every token does."""
    use = _use(model)
    return load_of(model.layout, selector, firing_of(model) / np.where(use > 0, use, 1))
