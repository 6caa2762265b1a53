"""Whole groups in tiles against float64 numpy.  pytest tests/shared/kernels/feed_forward/test_whole_groups.py"""

import ctypes

import numpy as np
import pytest

from tests.activations import NAMES, described
from tests.shared.kernels.feed_forward.test_ffn import (
    BFLOAT,
    HIDDEN,
    KINDS,
    NO_IDS,
    QUANTISED,
    SLOTS,
    Input,
    Panels,
    assert_close,
    inputs,
    slots_of,
)
from warmfront.shared.kernels.feed_forward.bundles import Bundles, bundles_at, tile_group
from warmfront.shared.kernels.feed_forward.down_tiles import down_in_tiles
from warmfront.shared.kernels.feed_forward.ffn import whole_groups
from warmfront.shared.kernels.prefill.dense_groups import dense_groups
from warmfront.shared.kernels.prefill.notes import NO_NOTES
from warmfront.shared.machine.memory import address
from warmfront.shared.model.formats import Kind

ORDERS = ([3], [0, 1, 2, 3, 4], [4, 0, 2])


def tiled(
    gate: Kind, down: Kind, activation: str, gated: bool = True, biases: tuple[str, ...] = ()
) -> tuple[Bundles, np.ndarray]:
    """A copy of the slots, in tiles, and the memory it is in; skips what is in rows on this machine."""
    if not (down_in_tiles(gate) and down_in_tiles(down)):
        pytest.skip("in rows on this machine")
    slots = slots_of(gate, down, gated, biases)
    size = slots.layout.group_bytes
    memory = np.full(size * (SLOTS + 2), 0xFF, np.uint8)
    memory[size:-size] = np.frombuffer(ctypes.string_at(slots.at, size * SLOTS), np.uint8)
    bundles = bundles_at(address(memory) + size, slots.layout, described(activation), True)
    assert bundles.tiled
    for slot in range(SLOTS):
        tile_group(bundles, bundles.at + slot * size)
    assert (memory[:size] == 0xFF).all()
    assert (memory[-size:] == 0xFF).all()
    return bundles, memory


@pytest.mark.parametrize("activation", NAMES)
@pytest.mark.parametrize(("gate", "down"), KINDS)
def test_one_token(gate: Kind, down: Kind, activation: str) -> None:
    slots, x = slots_of(gate, down), inputs()
    bundles, _memory = tiled(gate, down, activation)
    for order in ORDERS:
        one = Input(slots, x[0], 0.5, activation)
        whole_groups(bundles, np.array(order, np.int32), 0, len(order), one.batch)
        assert_close(one.sums[0], 0.5 + slots.expect(activation, slots.neurons(order), x)[0], QUANTISED)


@pytest.mark.parametrize(("gate", "down"), KINDS)
def test_several_tokens(gate: Kind, down: Kind) -> None:
    """They are multiplied with the same weights as those of groups in rows."""
    slots, x = slots_of(gate, down), inputs(19)
    bundles, _memory = tiled(gate, down, "silu")
    rows = bundles_at(slots.at, slots.layout, described("silu"))
    for order in ORDERS:
        several, same = Panels(slots, x, 0, "silu"), Panels(slots, x, 0, "silu")
        ids = np.array(order, np.int32)
        dense_groups(bundles, ids, 0, len(ids), several.vectors, several.tokens, NO_IDS, NO_NOTES)
        dense_groups(rows, ids, 0, len(ids), same.vectors, same.tokens, NO_IDS, NO_NOTES)
        assert several.bits() == same.bits()
        expected = slots.expect("silu", slots.neurons(order), x)
        assert several.sums.shape == (32, HIDDEN)
        assert_close(several.sums[: len(x)], expected, BFLOAT)
