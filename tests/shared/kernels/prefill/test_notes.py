"""What is noted of a prompt's neurons, against float64 numpy.  pytest tests/shared/kernels/prefill/test_notes.py"""

import numpy as np
import pytest

from tests.activations import SPARSE, THRESHOLD, described, factors, firing
from tests.shared.kernels.feed_forward.test_ffn import BFLOAT, KINDS, ORDERS, Panels, inputs, slots_of
from warmfront.shared.kernels.feed_forward.bundles import bundles_at
from warmfront.shared.kernels.prefill.dense_groups import dense_groups
from warmfront.shared.kernels.prefill.notes import Notes, noting
from warmfront.shared.machine.memory import address
from warmfront.shared.model.formats import Kind
from warmfront.shared.model.noted import Noted


@pytest.mark.parametrize("activation", SPARSE)
@pytest.mark.parametrize(("gate", "down"), KINDS)
def test_which_tokens_fire_which_neurons(gate: Kind, down: Kind, activation: str) -> None:
    """By the number of the group on the board, not of the slot; what is not asked for stays."""
    slots, groups = slots_of(gate, down), 9
    bundles = bundles_at(slots.at, slots.layout, described(activation))
    told = 0
    for tokens, order in zip((2, 16, 37, 70), ORDERS, strict=True):
        x = inputs(tokens)
        several = Panels(slots, x, 0, activation)
        ids = np.random.default_rng(tokens).permutation(groups)[: len(order)].astype(np.int32)
        low, high = (0, len(order)) if tokens != 37 else (len(order) - 1, len(order))
        noted = np.full((groups, 32, several.count), 0xAAAA, np.uint16)
        notes = Notes(noting(Noted.FIRING), address(noted), several.count)
        dense_groups(bundles, np.array(order, np.int32), low, high, several.vectors, several.tokens, ids, notes)
        for slot, group in zip(order[low:high], ids[low:high].tolist(), strict=True):
            exact, ups = slots.gates_and_ups(np.arange(32 * slot, 32 * slot + 32), x)
            bits = np.unpackbits(noted[group].view(np.uint8), axis=1, bitorder="little").astype(bool)
            # bfloat16 products leave a gate, or an up, at the border to chance.
            slack = (1e-5 if gate == Kind.F32 else BFLOAT) * np.abs(exact).max()
            clear = np.abs(exact - (THRESHOLD if ":" in activation else 0)) > slack
            if activation == "drelu":
                clear &= np.abs(ups) > slack
            assert (firing(activation, exact, ups) == bits[:, :tokens].T)[clear].all()
            assert not bits[:, tokens:].any(), "tokens that are not there fire nothing"
            told += int(clear.sum())
        others = np.setdiff1d(np.arange(groups), ids[low:high])
        assert (noted[others] == 0xAAAA).all()
    assert told > (0.8 if activation == "drelu" else 0.9) * 32 * (2 * 5 + 16 * 3 + 37 + 70 * 2)


@pytest.mark.parametrize("activation", ["silu", "relu"])
def test_how_large_the_factors_are(activation: str) -> None:
    """Within half of the last of bfloat16's 8 bits, and what float32 products differ by; other groups stay."""
    slots, tokens = slots_of(Kind.F32, Kind.F32), 37
    bundles, x = bundles_at(slots.at, slots.layout, described(activation)), inputs(37)
    several, ids = Panels(slots, x, 0, activation), np.array([5, 2], np.int32)
    noted = np.full((48, 6 * 32), 0xAAAA, np.uint16)
    notes = Notes(noting(Noted.MAGNITUDES), address(noted), noted.shape[1])
    dense_groups(bundles, np.array([0, 3], np.int32), 0, 2, several.vectors, several.tokens, ids, notes)
    got = (noted[:tokens].astype(np.uint32) << 16).view(np.float32)
    for slot, group in ((0, 5), (3, 2)):
        expected = np.abs(factors(activation, *slots.gates_and_ups(np.arange(32 * slot, 32 * slot + 32), x)))
        own = got[:, 32 * group : 32 * group + 32]
        np.testing.assert_allclose(own, expected, rtol=2**-8, atol=1e-4 * expected.max())
    assert (np.delete(noted.reshape(48, 6, 32), ids, axis=1) == 0xAAAA).all()
