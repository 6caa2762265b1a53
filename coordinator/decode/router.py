"""Which experts a token uses, and with which weights: scores by a matrix, then the best ones.

Of experts with the same score the first is taken. Scores are sums of float32 products of float32 weights and inputs, in
a prompt too: of a choice between two experts that score alike, a rounded input would make another.
"""

from typing import Any

import numpy as np
import numpy.typing as npt

from warmfront.coordinator.decode.linear import Matrix, linear, packed_input
from warmfront.coordinator.decode.network import DECODE, ROUTER, TOKENS, Network, Router, State
from warmfront.coordinator.decode.row_split import portion
from warmfront.shared.kernels.atomics import address_of
from warmfront.shared.kernels.fetching import MATRIX_ROWS
from warmfront.shared.kernels.jit import kernel
from warmfront.shared.model.architecture import SCORINGS
from warmfront.shared.model.branches import bounds_of, router_rows
from warmfront.shared.model.formats import Kind
from warmfront.shared.model.spec import ModelSpec
from warmfront.shared.wire.handoff import DONE, barrier

__all__ = ["choose_experts", "route", "router_of", "write_mask"]

Floats = npt.NDArray[np.float32]
_F32 = int(Kind.F32)
_SOFTMAX = SCORINGS.index("softmax")


def router_of(spec: ModelSpec) -> Router:
    """The router of every layer, as the compiled pass reads it."""
    experts = spec.architecture.feed_forward.experts
    if experts is None:
        return Router(0, 0, 0, False, 1.0, False, 0, bounds_of(spec))
    return Router(
        experts=experts.number,
        active=experts.active,
        scoring=SCORINGS.index(experts.scoring),
        normalised=experts.normalised,
        scale=experts.scale,
        shared_gate=experts.shared_gate,
        rows=router_rows(spec),
        bounds=bounds_of(spec),
    )


@kernel
def choose_experts(router: Router, scores: Floats, weights: Floats) -> None:
    """The weights [branches] of a token's branches by its `scores` [router.rows]."""
    count = router.experts
    weights[:] = 0
    weights[0] = 1
    top, chosen = np.float64(0), np.float64(0)
    for turn in range(router.active):
        best = -1
        for i in range(count):
            # Not by comparing with a lowest score: scores that are NaN choose some experts too.
            if weights[1 + i] == 0 and (best < 0 or scores[i] > scores[best]):
                best = i
        weights[1 + best] = 1
        if turn == 0:
            top = np.float64(scores[best])
    total = np.float64(0)
    for i in range(count):
        score = np.float64(scores[i])
        # The highest becomes 1: no exponential overflows.
        value = np.exp(score - top) if router.scoring == _SOFTMAX else 1 / (1 + np.exp(-score))
        total += value
        if weights[1 + i] != 0:
            chosen += value
            weights[1 + i] = value
    factor = router.scale
    if router.normalised:
        factor /= chosen
    elif router.scoring == _SOFTMAX:
        factor /= total
    for i in range(count):
        # Those of the others stay 0, whatever the factor is.
        if weights[1 + i] != 0:
            weights[1 + i] *= factor
    if router.shared_gate:
        weights[1 + count] = 1 / (1 + np.exp(-np.float64(scores[count])))


@kernel
def write_mask(router: Router, weights: Floats, words: Any, uses: Any) -> None:
    """Set the words [groups] of the branches that have a weight to all neurons, the others to none; `uses` [branches]
    to 1 and 0."""
    for branch in range(len(weights)):
        uses[branch] = weights[branch] != 0
        word = np.uint32(0xFFFFFFFF) if weights[branch] != 0 else np.uint32(0)
        words[router.bounds[branch] : router.bounds[branch + 1]] = word


@kernel
def route(net: Network, st: State, layer: int, rank: int, panels: int, lanes: int) -> int:
    """Write the weights of each token's branches on the board, of decoded tokens the mask too; all the team takes part.

    Returns DONE or ABORTED. For a single token it is the first thread that has written, which posts the job then.
    """
    router, tokens, rows = net.router, st.job[TOKENS], net.router.rows
    matrix = Matrix(_F32, net.weights[layer, ROUTER], 0, rows, net.hidden, net.ahead[MATRIX_ROWS, _F32])
    low, high = portion(st.cuts, rows, 8, rank)
    x = packed_input(_F32, address_of(st.h[rank]), address_of(st.packed[rank]), net.hidden, panels, lanes)
    linear(matrix, low, high, x, address_of(st.expert_scores), rows, address_of(st.scratch[rank]))
    result = barrier(st.barrier)
    if result != DONE:
        return result
    for token in range(rank, tokens, st.threads):
        first = token // lanes * rows * lanes + token % lanes
        scores, weights = st.expert_scores[first : first + rows * lanes : lanes], st.handoff.routing[token]
        choose_experts(router, scores, weights)
        if st.job[DECODE] != 0:
            write_mask(router, weights, st.handoff.mask[token, layer], st.handoff.uses[token, layer])
    return barrier(st.barrier) if tokens > 1 else DONE
