"""A layer's feed-forward as a sum of branches, each of which takes part in a token with a weight, or not at all.

    branch 0              what every token uses, with weight 1: all there is in a model without experts; else the shared
                          expert, unless that has a gate
    branch 1 + e          expert e: the router's weight for the tokens for which it picks that expert, else 0
    last branch           a shared expert with a gate: the sigmoid of its score

The neurons of a branch are a run of whole groups, the last of which is padded; the branches follow each other in this
order. So to place and to move experts is to place and to move groups of neurons.

A layer without experts in a mixture has its neurons where others have their first branches, as many as they take, and
every token uses all of those, with weight 1. The groups of the branches behind them are in all tables, but have no
weights, and nothing uses them.
"""

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from warmfront.shared.model.bundle import GROUP, BundleLayout
from warmfront.shared.model.formats import Kind
from warmfront.shared.model.panels import LANES
from warmfront.shared.model.spec import ModelSpec

__all__ = [
    "Branch",
    "bounds_of",
    "branches_of",
    "dense_branches",
    "groups_of",
    "has_experts",
    "layout_of",
    "parts_of",
    "predictors_of",
    "router_rows",
    "used_neurons",
]


class Branch(NamedTuple):
    """One branch of every layer."""

    # What is before the names of its matrices, behind that of the layer: "", "shared." or "experts.7." (`tensors.py`).
    prefix: str
    # May be 0, of branch 0.
    neurons: int


def branches_of(spec: ModelSpec) -> list[Branch]:
    """The branches, in their order."""
    experts = spec.architecture.feed_forward.experts
    if experts is None:
        return [Branch("", spec.ffn)]
    shared = Branch("shared.", experts.shared)
    routed = [Branch(f"experts.{number}.", spec.ffn) for number in range(experts.number)]
    return [Branch("", 0), *routed, shared] if experts.shared_gate else [shared, *routed]


def bounds_of(spec: ModelSpec) -> npt.NDArray[np.int64]:
    """int64 [branches + 1]: the first group of each branch, and how many groups there are."""
    groups = [-(-branch.neurons // GROUP) for branch in branches_of(spec)]
    return np.cumsum([0, *groups], dtype=np.int64)


def has_experts(spec: ModelSpec, layer: int) -> bool:
    """Whether a layer has experts."""
    experts = spec.architecture.feed_forward.experts
    return experts is not None and layer not in experts.dense_layers


def parts_of(spec: ModelSpec, layer: int) -> list[Branch]:
    """What has neurons in a layer, in the order of its groups."""
    experts = spec.architecture.feed_forward.experts
    if experts is not None and not has_experts(spec, layer):
        return [Branch("", experts.dense)]
    return [branch for branch in branches_of(spec) if branch.neurons]


def predictors_of(spec: ModelSpec) -> int:
    """Predictors of a layer of a model that has any: one, or one for each expert."""
    experts = spec.architecture.feed_forward.experts
    return 1 if experts is None else experts.number


def dense_branches(spec: ModelSpec) -> int:
    """How many branches the neurons of a layer without experts take; more than there are, if they do not fit."""
    experts = spec.architecture.feed_forward.experts
    return 0 if experts is None else int(np.searchsorted(bounds_of(spec), -(-experts.dense // GROUP)))


def groups_of(spec: ModelSpec, layer: int) -> int:
    """The groups of a layer that have weights."""
    bounds, experts = bounds_of(spec), spec.architecture.feed_forward.experts
    return int(bounds[-1] if experts is None or has_experts(spec, layer) else bounds[dense_branches(spec)])


def layout_of(spec: ModelSpec, gate_kind: Kind, down_kind: Kind) -> BundleLayout:
    """The layout of a layer's bundles with rows of these types. With experts, what pads a branch counts as neurons."""
    feed_forward = spec.architecture.feed_forward
    return BundleLayout(
        hidden=spec.hidden,
        ffn=spec.ffn if feed_forward.experts is None else int(bounds_of(spec)[-1]) * GROUP,
        gate_kind=gate_kind,
        down_kind=down_kind,
        gated=feed_forward.gated,
        biases=feed_forward.neuron_biases,
    )


def router_rows(spec: ModelSpec) -> int:
    """Rows of a layer's packed router, 0 without experts: a score for each branch but the first; whole tiles, so that
    every kernel can multiply them."""
    return -(-(len(branches_of(spec)) - 1) // LANES) * LANES


def used_neurons(spec: ModelSpec) -> float:
    """The most neurons that a token uses in a layer, each times the largest weight that it may have."""
    experts = spec.architecture.feed_forward.experts
    if experts is None:
        return spec.ffn
    # A softmax and a sigmoid stay below one, and so do weights that are scaled to sum to one.
    return max(experts.active * spec.ffn * experts.scale + experts.shared, experts.dense)
