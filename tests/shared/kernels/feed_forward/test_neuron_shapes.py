"""Neurons without a gate, and with biases, against float64 numpy: by every way that computes them.

Run: pytest tests/shared/kernels/feed_forward/test_neuron_shapes.py
"""

import numpy as np
import pytest

from tests.activations import described, firing
from tests.shared.kernels.feed_forward.test_ffn import (
    BFLOAT,
    EVERY,
    KINDS,
    NO_IDS,
    QUANTISED,
    SLOTS,
    Input,
    Panels,
    Slots,
    assert_close,
    bits_of,
    inputs,
    run_listed,
    slots_of,
    with_gates_apart,
)
from tests.shared.kernels.feed_forward.test_whole_groups import tiled
from warmfront.shared.kernels.feed_forward.bundles import bundles_at
from warmfront.shared.kernels.feed_forward.ffn import open_gates, open_neurons, open_ups, whole_groups
from warmfront.shared.kernels.prefill.dense_groups import dense_groups
from warmfront.shared.kernels.prefill.notes import NO_NOTES
from warmfront.shared.model.formats import Kind

ORDER = np.array([4, 0, 2], np.int32)
# Whether there is a gate, which biases, an activation.
SHAPES = [
    (False, (), "relu"),
    (False, ("up",), "gelu_tanh"),
    (False, ("up",), "relu2"),
    (True, ("up",), "silu"),
    (True, ("gate", "up"), "drelu"),
]
by_shape = pytest.mark.parametrize(("gated", "biases", "activation"), SHAPES)
by_kind = pytest.mark.parametrize(("gate", "down"), KINDS)


def dense(bundles: object, slots: Slots, x: np.ndarray, activation: str) -> Panels:
    several = Panels(slots, x, 0.5, activation)
    dense_groups(bundles, ORDER, 0, len(ORDER), several.vectors, several.tokens, NO_IDS, NO_NOTES)
    return several


@by_shape
@by_kind
def test_in_rows(gate: Kind, down: Kind, gated: bool, biases: tuple[str, ...], activation: str) -> None:
    slots, x = slots_of(gate, down, gated, biases), inputs(19)
    bundles, neurons = bundles_at(slots.at, slots.layout, described(activation)), slots.neurons(ORDER.tolist())
    expected = 0.5 + slots.expect(activation, neurons, x)
    one = Input(slots, x[0], 0.5, activation)
    run_listed(bundles, ORDER, range(len(neurons)), one)
    assert_close(one.sums[0], expected[0], QUANTISED)
    exact = gate == down == Kind.F32
    parted, _memory = with_gates_apart(slots, activation)
    for laid_out in (bundles, parted):
        assert_close(dense(laid_out, slots, x, activation).sums[: len(x)], expected, 2e-5 if exact else BFLOAT)


@by_shape
@by_kind
def test_those_that_fire(gate: Kind, down: Kind, gated: bool, biases: tuple[str, ...], activation: str) -> None:
    slots, x = slots_of(gate, down, gated, biases), inputs()
    plain, neurons = bundles_at(slots.at, slots.layout, described(activation)), slots.neurons(ORDER.tolist())
    parted, _memory = with_gates_apart(slots, activation)
    exact, ups = (values[0] for values in slots.gates_and_ups(neurons, x))
    found = np.flatnonzero(firing(activation, exact, ups)).tolist()
    for bundles in (plain, parted):
        gates, opened = np.zeros(len(neurons), np.float32), np.zeros(len(neurons), np.int32)
        one, words = Input(slots, x[0], 0, activation), np.zeros((1, SLOTS), np.uint32)
        count = open_gates(bundles, ORDER, 0, len(ORDER), one.batch, EVERY, gates, opened)
        assert_close(gates[:count], exact[opened[:count]], QUANTISED)
        assert open_ups(bundles, ORDER, opened, count, one.batch) == len(found)
        assert open_neurons(bundles, ORDER, gates, opened, 0, count, one.batch, words) == len(found)
        assert bits_of(words[0]) == found
        assert_close(one.sums[0], slots.expect(activation, neurons, x)[0], QUANTISED)


@by_shape
@by_kind
def test_in_tiles(gate: Kind, down: Kind, gated: bool, biases: tuple[str, ...], activation: str) -> None:
    slots, x = slots_of(gate, down, gated, biases), inputs(19)
    bundles, _memory = tiled(gate, down, activation, gated, biases)
    several = Input(slots, x[:5], 0.5, activation)
    whole_groups(bundles, ORDER, 0, len(ORDER), several.batch)
    assert_close(several.sums, 0.5 + slots.expect(activation, slots.neurons(ORDER.tolist()), x[:5]), QUANTISED)
    rows = bundles_at(slots.at, slots.layout, described(activation))
    assert dense(bundles, slots, x, activation).bits() == dense(rows, slots, x, activation).bits()
