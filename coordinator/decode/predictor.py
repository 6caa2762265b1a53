"""Which neurons will fire, guessed in the compiled pass before the workers are asked.

    lowrank   fc2 . act(fc1 . x) > threshold, with x the residual before the norm or the normed input (Deja Vu;
              PowerInfer's files): costs r * (hidden + neurons) weights instead of hidden * neurons
    lowbit    the dot of a low-bit copy of the gate row with the normed input > the neuron's threshold, which was
              calibrated for a given recall; where no gate is ever closed, |activation(gate) * up| of copies of both
              (`coordinator/selectors/lowbit.py`); needs no training

The guess is a mask on the board, a word of 32 neurons for each group and token of the batch. With experts each has a
low-rank predictor of its own; those that are used are asked, once the router has chosen.
"""

from typing import Any

import numpy as np
from numba import carray

from warmfront.coordinator.decode.linear import Matrix, linear, packed_input
from warmfront.coordinator.decode.network import FC1, FC1_BIAS, FC2, LOWBIT, TOKENS, Network, State
from warmfront.coordinator.decode.row_split import portion
from warmfront.shared.kernels.activation import activate_times
from warmfront.shared.kernels.atomics import address_of, floats_at
from warmfront.shared.kernels.byte_dot import quantise_batch
from warmfront.shared.kernels.feed_forward.branches import uses_branch
from warmfront.shared.kernels.fetching import LOWBIT_ROWS, MATRIX_ROWS
from warmfront.shared.kernels.jit import kernel
from warmfront.shared.kernels.lowbit import lowbit_dot
from warmfront.shared.kernels.multi_rows import ROWS, dot_rows
from warmfront.shared.kernels.rows import prefetch, row_stride
from warmfront.shared.kernels.tiles import in_tiles
from warmfront.shared.model.bundle import GROUP
from warmfront.shared.wire.handoff import DONE, barrier

__all__ = ["predict_lowbit", "predict_lowrank"]


@kernel
def _word(scores: Any, thresholds: Any) -> Any:
    """Bit i: scores[i] is above its threshold."""
    word = np.uint32(0)
    for i in range(GROUP):
        if scores[i] > thresholds[i]:
            word |= np.uint32(1) << np.uint32(i)
    return word


@kernel
def predict_lowrank(net: Network, st: State, layer: int, rank: int) -> int:
    """Write the mask of each token's neurons on the board.

    The first matrix, split over the team; then this thread's groups of the second; of each predictor that is used.
    A row of the second matrix is short, hundreds of weights: 16 are multiplied at once, with the input in registers.
    Ahead of its layer it takes the input of the one before, which is much like its own: a layer adds little to the
    residual (Deja Vu). Returns DONE or ABORTED.
    """
    input_at = address_of(st.h[rank]) if net.normed else address_of(st.x[rank])
    router, routing = net.router, st.handoff.routing
    inner, kind, tokens = net.ranks[layer], net.kinds[layer, FC1], st.job[TOKENS]
    low, high = portion(st.cuts, inner, 8, rank)
    x = packed_input(kind, input_at, address_of(st.packed[rank]), net.hidden, tokens, 1)
    at, bias_at, predictors = net.weights[layer, FC1], net.weights[layer, FC1_BIAS], max(router.experts, 1)
    first = Matrix(kind, at, bias_at, predictors * inner, net.hidden, net.ahead[MATRIX_ROWS, kind])
    for number in range(predictors):
        if uses_branch(routing, min(router.experts, 1 + number), tokens):
            begin, row = number * tokens * inner, number * inner
            linear(st, first, row + low, row + high, x, address_of(st.inner) + (begin - row) * 4, inner, 0)
            if net.rectified:
                for token in range(tokens):
                    for i in range(begin + token * inner + low, begin + token * inner + high):
                        st.inner[i] = max(st.inner[i], np.float32(0))
    result = barrier(st.barrier)
    if result != DONE:
        return result
    kind, at = net.kinds[layer, FC2], net.weights[layer, FC2]
    second = Matrix(kind, at, 0, net.groups * GROUP, inner, net.ahead[MATRIX_ROWS, kind])
    for number in range(predictors):
        branch = min(router.experts, 1 + number)
        if uses_branch(routing, branch, tokens):
            start, end = router.bounds[branch], router.bounds[branch + 1]
            low, high = portion(st.cuts, end - start, 1, rank)
            inner_at = address_of(st.inner) + number * tokens * inner * 4
            _fire(net, st, second, layer, branch, (start + low, start + high), rank, inner_at)
    return barrier(st.barrier)


@kernel
def _fire(
    net: Network, st: State, second: Matrix, layer: int, branch: int, groups: tuple[int, int], rank: int, inner_at: int
) -> None:
    """Write the words of some groups of a branch, for the tokens that use it; `inner_at`: float32 [tokens, inner]."""
    kind, inner, tokens = second.kind, second.cols, st.job[TOKENS]
    x = packed_input(kind, inner_at, address_of(st.packed[rank]), inner, tokens, 1)
    stride = row_stride(kind, inner)
    scores_at = address_of(st.scores[rank])
    scores = carray(floats_at(scores_at), (tokens, GROUP))
    for group in range(groups[0], groups[1]):
        row = group * GROUP
        if in_tiles(kind):
            linear(st, second, row, row + GROUP, x, scores_at - row * 4, GROUP, 0)
        else:
            for first_row in range(row, row + GROUP, ROWS):
                row_at = second.at + first_row * stride
                if second.ahead != 0:
                    prefetch(row_at + second.ahead, ROWS * stride, 64)
                for token in range(tokens):
                    out_at = scores_at + (token * GROUP + first_row - row) * 4
                    dot_rows(kind, row_at, stride, inner_at + token * inner * 4, inner, out_at)
        for token in range(tokens):
            if branch == 0 or st.handoff.routing[token, branch] != 0:
                word = _word(scores[token], net.thresholds[layer, 0, row : row + GROUP])
                st.handoff.mask[token, layer, group] = word


@kernel
def _weigh(net: Network, layer: int, group: int, products: Any) -> None:
    """Replace a group's first products, of its gates or of both gates and ups, by its neurons' scores."""
    parts = net.thresholds.shape[1] - 1
    for part in range(parts):
        for i in range(GROUP):
            products[part * GROUP + i] += net.thresholds[layer, 1 + part, group * GROUP + i]
    if parts == 1:
        products[GROUP : 2 * GROUP] = 1
    at = address_of(products)
    activate_times(net.activation, at, at + GROUP * 4, GROUP)
    for i in range(GROUP):
        products[i] = abs(products[i])


@kernel
def predict_lowbit(net: Network, st: State, layer: int, rank: int) -> int:
    """The same by the copies, of gates or of gates and ups. Returns DONE or ABORTED."""
    bits, at, tokens = net.kinds[layer, LOWBIT], net.weights[layer, LOWBIT], st.job[TOKENS]
    q_at, q_row = quantise_batch(address_of(st.h[rank]), address_of(st.packed[rank]), net.hidden, tokens)
    stride, ahead = net.lowbit_stride, net.ahead[LOWBIT_ROWS, bits]
    weighs = net.thresholds.shape[1] > 1
    rows = GROUP * max(net.thresholds.shape[1] - 1, 1)
    scores = st.scores[rank]
    low, high = portion(st.cuts, net.groups, 1, rank)
    for group in range(low, high):
        for token in range(tokens):
            for i in range(rows):
                row_at = at + (group * rows + i) * stride
                if ahead != 0 and token == 0:
                    prefetch(row_at + ahead, stride, 64)
                scores[i] = lowbit_dot(bits, row_at, q_at + token * q_row, net.hidden)
            if weighs:
                _weigh(net, layer, group, scores)
            word = _word(scores, net.thresholds[layer, 0, group * GROUP : (group + 1) * GROUP])
            st.handoff.mask[token, layer, group] = word
    return barrier(st.barrier)
