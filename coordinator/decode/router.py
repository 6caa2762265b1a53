"""Which experts a token uses, and with which weights: scores by a matrix, then the best ones.

Of experts with the same score the first is taken. Scores are sums of float32 products of float32 weights and inputs, in
a prompt too: of a choice between two experts that score alike, a rounded input would make another.
"""

from typing import Any

import numpy as np
import numpy.typing as npt
from numba import carray

from warmfront.coordinator.decode.linear import Matrix, add_bias, linear, packed_input
from warmfront.coordinator.decode.network import (
    CORRECTION,
    DECODE,
    DOWN_BIAS,
    ROUTER,
    ROUTER_BIAS,
    TOKENS,
    Network,
    Router,
    State,
)
from warmfront.coordinator.decode.row_split import portion
from warmfront.shared.kernels.atomics import address_of, floats_at
from warmfront.shared.kernels.fetching import MATRIX_ROWS
from warmfront.shared.kernels.jit import inlined, kernel
from warmfront.shared.model.architecture import SCORINGS
from warmfront.shared.model.branches import bounds_of, dense_branches, router_rows
from warmfront.shared.model.formats import Kind
from warmfront.shared.model.panels import LANES
from warmfront.shared.model.spec import ModelSpec
from warmfront.shared.wire.handoff import DONE, barrier

__all__ = [
    "add_down_biases",
    "choose_experts",
    "route",
    "router_of",
    "use_dense",
    "write_mask",
]

Floats = npt.NDArray[np.float32]
_F32 = int(Kind.F32)
_SOFTMAX = SCORINGS.index("softmax")


def router_of(spec: ModelSpec) -> Router:
    """The router of every layer, as the compiled pass reads it."""
    experts = spec.architecture.feed_forward.experts
    if experts is None:
        return Router(0, 0, 0, False, 1.0, 1, 1, False, False, 0, 0, bounds_of(spec))
    return Router(
        experts=experts.number,
        active=experts.active,
        scoring=SCORINGS.index(experts.scoring),
        normalised=experts.normalised,
        scale=experts.scale,
        groups=experts.groups,
        active_groups=experts.active_groups,
        shared_gate=experts.shared_gate,
        early=experts.early,
        dense=dense_branches(spec),
        rows=router_rows(spec),
        bounds=bounds_of(spec),
    )


@kernel
def _leave_groups(router: Router, keys: Floats) -> None:
    """Set the keys [experts] of the worst groups to the lowest."""
    size = router.experts // router.groups
    sums = np.empty(router.groups, np.float32)
    for group in range(router.groups):
        first, second = np.float32(-np.inf), np.float32(-np.inf if size > 1 else 0)
        for i in range(group * size, (group + 1) * size):
            if keys[i] > first:
                first, second = keys[i], max(first, second)
            elif keys[i] > second:
                second = keys[i]
        sums[group] = first + second
    for _ in range(router.groups - router.active_groups):
        worst = -1
        for group in range(router.groups):
            # Of equal ones the last is left.
            if not np.isnan(sums[group]) and (worst < 0 or sums[group] <= sums[worst]):
                worst = group
        if worst >= 0:
            sums[worst] = np.nan
            keys[worst * size : (worst + 1) * size] = -np.inf


@kernel
def choose_experts(router: Router, scores: Floats, correction: Floats, weights: Floats) -> None:
    """The weights [branches] of a token's branches by its `scores` [router.rows]; `correction`: [experts], or empty."""
    count = router.experts
    weights[:] = 0
    weights[0] = 1
    top, total = np.float64(scores[0]), np.float64(0)
    for i in range(1, count):
        top = max(top, np.float64(scores[i]))
    values, keys = np.empty(count), np.empty(count, np.float32)
    for i in range(count):
        score = np.float64(scores[i])
        # The highest becomes 1: no exponential overflows.
        values[i] = np.exp(score - top) if router.scoring == _SOFTMAX else 1 / (1 + np.exp(-score))
        total += values[i]
    if router.scoring == _SOFTMAX:
        values /= total
    for i in range(count):
        # Scores tell apart what is the same once it has become a weight.
        keys[i] = values[i] + correction[i] if len(correction) > 0 else scores[i]
    if router.groups > 1:
        _leave_groups(router, keys)
    chosen = np.float64(0)
    for _ in range(router.active):
        best = -1
        for i in range(count):
            # Not by comparing with a lowest key: scores that are NaN choose some experts too.
            if weights[1 + i] == 0 and (best < 0 or keys[i] > keys[best]):
                best = i
        weights[1 + best] = 1
        chosen += values[best]
    # Sigmoids may all be 0, which is no reason for 0 / 0; as transformers has it.
    factor = router.scale / (chosen + 1e-20) if router.normalised else router.scale
    for i in range(count):
        # Those of the others stay 0, whatever the factor is.
        if weights[1 + i] != 0:
            weights[1 + i] = values[i] * factor
    if router.shared_gate:
        weights[1 + count] = 1 / (1 + np.exp(-np.float64(scores[count])))


@kernel
def use_dense(router: Router, weights: Floats) -> None:
    """The weights [branches] of a layer without experts."""
    weights[:] = 0
    weights[: router.dense] = 1


@kernel
def write_mask(router: Router, weights: Floats, words: Any, uses: Any) -> None:
    """Set the words [groups] of the branches that have a weight to all neurons, the others to none; `uses` [branches]
    to 1 and 0."""
    for branch in range(len(weights)):
        uses[branch] = weights[branch] != 0
        word = np.uint32(0xFFFFFFFF) if weights[branch] != 0 else np.uint32(0)
        words[router.bounds[branch] : router.bounds[branch + 1]] = word


@inlined
def _score_experts(net: Network, st: State, layer: int, rank: int, values: Floats, panels: int, lanes: int) -> None:
    """This thread's share of the scores of x [panels, hidden, lanes], `values`, in a layer with a router."""
    if net.weights[layer, ROUTER] == 0:
        return
    rows = net.router.rows
    at, bias_at = net.weights[layer, ROUTER], net.weights[layer, ROUTER_BIAS]
    matrix = Matrix(_F32, at, bias_at, rows, net.hidden, net.ahead[MATRIX_ROWS, _F32])
    low, high = portion(st.cuts, rows, 8, rank)
    x = packed_input(_F32, address_of(values), address_of(st.packed[rank]), net.hidden, panels, lanes)
    linear(st, matrix, low, high, x, address_of(st.expert_scores), rows, address_of(st.scratch[rank]))


@inlined
def _note_experts(net: Network, st: State, layer: int, rank: int, lanes: int) -> None:
    """Write the weights of this thread's tokens' branches on the board, of decoded tokens the mask too, by the scores.

    A single token is the first thread's, which posts the job too.
    """
    router, tokens, rows = net.router, st.job[TOKENS], net.router.rows
    at = net.weights[layer, CORRECTION]
    correction = carray(floats_at(at), (router.experts if at != 0 else 0,))
    for token in range(rank, tokens, st.threads):
        first = token // lanes * rows * lanes + token % lanes
        scores, weights = st.expert_scores[first : first + rows * lanes : lanes], st.handoff.routing[token]
        if net.weights[layer, ROUTER] != 0:
            choose_experts(router, scores, correction, weights)
        else:
            use_dense(router, weights)
        for branch in range(len(weights)):
            st.uses[rank, layer, branch] += weights[branch] != 0
        if st.job[DECODE] != 0:
            write_mask(router, weights, st.handoff.mask[token, layer], st.handoff.uses[token, layer])


@kernel
def route(net: Network, st: State, layer: int, rank: int) -> int:
    """Both for the feed-forward's inputs, or early for the layer's; all the team takes part. Returns DONE or ABORTED.

    Once all have come to the barrier, nobody reads the routing of the layer before any more.
    """
    lanes = 1 if st.job[DECODE] != 0 else LANES
    values = st.x[rank] if net.router.early else st.h[rank]
    _score_experts(net, st, layer, rank, values, (st.job[TOKENS] + lanes - 1) // lanes, lanes)
    result = barrier(st.barrier)
    if result != DONE:
        return result
    _note_experts(net, st, layer, rank, lanes)
    # A single token is the first thread's, which posts the job too; but all ask its experts' predictors.
    return barrier(st.barrier) if st.job[TOKENS] > 1 or net.predicts else DONE


@kernel
def add_down_biases(net: Network, st: State, layer: int, y: Floats, panels: int, lanes: int) -> None:
    """Add the bias of down to y [panels, hidden, lanes], of each branch that a token uses times its weight."""
    at, hidden, branches = net.weights[layer, DOWN_BIAS], net.hidden, len(net.router.bounds) - 1
    if at == 0 or branches == 1:
        add_bias(at, 0, hidden, address_of(y), hidden, panels, lanes)
        return
    biases = carray(floats_at(at), (branches, hidden))
    for token in range(st.job[TOKENS]):
        first = token // lanes * hidden * lanes + token % lanes
        for branch in range(branches):
            weight = st.handoff.routing[token, branch]
            if weight != 0:
                for k in range(hidden):
                    y[first + k * lanes] += weight * biases[branch, k]
