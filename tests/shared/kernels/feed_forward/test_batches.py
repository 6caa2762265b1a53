"""Tokens of a batch against each of them alone, bit for bit.

Run: pytest tests/shared/kernels/feed_forward/test_batches.py
"""

from collections.abc import Callable

import numpy as np
import pytest

from tests.activations import described
from tests.shared.kernels.feed_forward.test_ffn import (
    KINDS,
    SLOTS,
    Input,
    Slots,
    assert_close,
    bits_of,
    inputs,
    slots_of,
)
from warmfront.shared.kernels.feed_forward.bundles import bundles_at, tile_group
from warmfront.shared.kernels.feed_forward.ffn import (
    Selection,
    listed_neurons,
    open_gates,
    open_neurons,
    whole_groups,
)
from warmfront.shared.kernels.feed_forward.neuron_lists import list_masked
from warmfront.shared.model.formats import Kind

IDS = np.array([3, 0, 4, 1], np.int32)
TOKENS = inputs(7)
# Some neurons of some groups for each token, none of one group for any, none at all for one token.
MASKS = np.random.default_rng(1).integers(0, 1 << 32, (len(TOKENS), len(IDS)), np.uint32)
MASKS[:, 2] = MASKS[4] = 0


def assert_each_alone(slots: Slots, run: Callable[[Input, np.ndarray], list[list[int]]]) -> Input:
    """`run` computes tokens by their masks and returns the neurons that were computed for each."""
    together = Input(slots, TOKENS)
    computed = run(together, MASKS)
    for token, x in enumerate(TOKENS):
        alone = Input(slots, x)
        assert run(alone, MASKS[token : token + 1]) == [computed[token]]
        assert together.bits(token) == alone.bits()
    return together


@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize(("gate", "down"), KINDS)
def test_neurons_of_masks(gate: Kind, down: Kind, skip: bool) -> None:
    slots = slots_of(gate, down)
    bundles = bundles_at(slots.at, slots.layout, described("relu"))

    def run(batch: Input, words: np.ndarray) -> list[list[int]]:
        listed, computed = np.zeros(32 * len(IDS), np.int32), np.zeros_like(words)
        count = list_masked(np.bitwise_or.reduce(words, 0), len(IDS), listed)
        assert (
            listed_neurons(bundles, IDS, listed, 0, count, Selection(words, skip, computed), batch.batch)
            == np.bitwise_count(computed).sum()
        )
        return [bits_of(each) for each in computed]

    sums = assert_each_alone(slots, run).sums
    for token, words in enumerate(MASKS):
        neurons = slots.neurons(IDS.tolist())[bits_of(words)]
        assert_close(sums[token], slots.expect("relu", neurons, TOKENS[token : token + 1])[0], 2e-4)


@pytest.mark.parametrize(("gate", "down"), KINDS)
def test_open_gates(gate: Kind, down: Kind) -> None:
    """Of the groups of which a token wants any neuron."""
    slots = slots_of(gate, down)
    bundles = bundles_at(slots.at, slots.layout, described("relu"))

    def run(batch: Input, words: np.ndarray) -> list[list[int]]:
        tokens, neurons = len(words), 32 * len(IDS)
        gates, opened = np.zeros(neurons * tokens, np.float32), np.zeros(neurons, np.int32)
        count = open_gates(bundles, IDS, 0, len(IDS), batch.batch, words, gates, opened)
        fires = gates[: count * tokens].reshape(count, tokens) > 0
        assert fires.any(1).all()
        computed = np.zeros_like(words)
        assert open_neurons(bundles, IDS, gates, opened, 0, count, batch.batch, computed) == fires.sum()
        assert ((computed != 0) == (words != 0)).all()
        return [bits_of(each) for each in computed]

    assert_each_alone(slots, run)


@pytest.mark.parametrize(("gate", "down"), KINDS)
def test_whole_groups(gate: Kind, down: Kind) -> None:
    slots = Slots(gate, down)
    bundles = bundles_at(slots.at, slots.layout, described("silu"), whole=True)
    if not bundles.tiled:
        pytest.skip("not in tiles on this machine")
    for slot in range(SLOTS):
        tile_group(bundles, slots.at + slot * slots.layout.group_bytes)

    def run(batch: Input, words: np.ndarray) -> list[list[int]]:
        whole_groups(bundles, IDS, 0, len(IDS), batch.batch)
        return [[]] * len(words)

    sums = assert_each_alone(slots, run).sums
    assert_close(sums, slots.expect("silu", slots.neurons(IDS.tolist()), TOKENS), 2e-4)
