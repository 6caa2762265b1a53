"""Sums that do not depend on who adds what, in which order.  pytest tests/shared/kernels/test_exact_sums.py"""

import math
from itertools import pairwise

import numpy as np
import pytest

from tests.activations import NAMES, SPARSE, described
from tests.shared.kernels.feed_forward.test_ffn import (
    HIDDEN,
    KINDS,
    NO_IDS,
    SLOTS,
    Input,
    Panels,
    Slots,
    inputs,
    slots_of,
)
from warmfront.shared.kernels.exact_sums import inverse_unit, merge_sums, round_to_sums
from warmfront.shared.kernels.feed_forward.bundles import bundles_at
from warmfront.shared.kernels.feed_forward.ffn import Selection, listed_neurons, open_gates, open_neurons
from warmfront.shared.kernels.feed_forward.neuron_lists import group_start, list_masked
from warmfront.shared.kernels.prefill.dense_groups import dense_groups
from warmfront.shared.kernels.prefill.notes import NO_NOTES
from warmfront.shared.model.formats import Kind

PARTITIONS = 20


@pytest.mark.parametrize("degree", [0, 1, 2, 3])
def test_the_unit_is_a_power_of_two_with_which_nothing_overflows(degree: int) -> None:
    rng = np.random.default_rng(0)
    reaches = [2.0**e * f for e in range(-140, 100, 7) for f in (1, 1 + 2**-52, 2 - 2**-52, 1.37)]
    for reach in reaches:
        for magnitude in (1.0, 2.0**-20, 3e4, float(rng.uniform(1, 1000))):
            bound = reach * magnitude**degree
            inverse = float(inverse_unit(reach, degree, magnitude))
            if bound >= 2.0**100:
                assert math.isnan(inverse)
                continue
            mantissa, exponent = math.frexp(inverse)
            assert mantissa == 0.5
            assert bound * inverse < 2.0**62
            # And not coarser than need be.
            assert bound * inverse > 2.0**60 or exponent - 1 == 100


@pytest.mark.parametrize("bad", [math.nan, math.inf, 1e200, 2.0**60])
def test_a_token_that_is_not_finite_or_too_large_has_no_unit(bad: float) -> None:
    assert math.isnan(inverse_unit(1.0, 2, bad))
    assert math.isnan(inverse_unit(bad * bad, 2, 1.0))
    if bad > 2.0**60:
        assert math.isnan(inverse_unit(1.0, 0, bad))


def test_tokens_and_matrices_of_zeros_have_a_unit() -> None:
    for reach, magnitude in ((0.0, 1.0), (1.0, 0.0), (0.0, 0.0), (5e-324, 1.0), (1.0, 1e-38), (1e-300, 1e-45)):
        inverse = float(inverse_unit(reach, 2, magnitude))
        assert math.frexp(inverse)[0] == 0.5
        assert reach * magnitude * magnitude * inverse < 2.0**62


def test_merging_one_token() -> None:
    rng = np.random.default_rng(1)
    sums = rng.integers(-(1 << 61), 1 << 61, 96)
    x = rng.standard_normal(96).astype(np.float32)
    for exponent in (61, 30, -39, 100):
        inverse, merged = np.array([2.0**exponent], np.float32), x.copy()
        merge_sums(sums, inverse, merged)
        np.testing.assert_array_equal(merged, x + (sums * 2.0**-exponent).astype(np.float32))


def test_merging_panels_takes_each_token_by_its_own_unit() -> None:
    """A token without a unit is NaN as a whole, those beside it are as ever."""
    rng = np.random.default_rng(2)
    sums, x = rng.integers(-(1 << 61), 1 << 61, (96, 16)), rng.standard_normal((96, 16)).astype(np.float32)
    inverse = (2.0 ** rng.integers(-39, 100, 16)).astype(np.float32)
    inverse[[3, 15]] = np.nan
    merged = x.copy()
    merge_sums(sums.reshape(-1), inverse, merged.reshape(-1))
    with np.errstate(invalid="ignore"):
        expected = x + (sums / inverse.astype(np.float64)).astype(np.float32)
    np.testing.assert_array_equal(merged, expected)
    assert np.isnan(merged[:, [3, 15]]).all()
    assert np.isfinite(np.delete(merged, [3, 15], 1)).all()


@pytest.mark.parametrize("lanes", [1, 16])
def test_rounding_what_a_device_added_up(lanes: int) -> None:
    """To the nearest multiple of each token's unit, the even one of two."""
    rng = np.random.default_rng(3)
    values = rng.standard_normal((3, 64, lanes)).astype(np.float32)
    inverse = (2.0 ** rng.integers(-3, 45, 3 * lanes)).astype(np.float32)
    out = np.full(values.size, -1, np.int64)
    round_to_sums(values.reshape(-1), inverse, lanes, out)
    scaled = values.astype(np.float64) * inverse.reshape(3, 1, lanes)
    np.testing.assert_array_equal(out.reshape(values.shape), np.rint(scaled).astype(np.int64))
    halves = np.array([0.5, 1.5, 2.5, -0.5, -1.5, 0.49999997], np.float32)
    out = np.zeros(6, np.int64)
    round_to_sums(halves, np.ones(1, np.float32), 1, out)
    assert out.tolist() == [0, 2, 2, 0, -2, 0]


def workers_and_threads(rng: np.random.Generator) -> list[np.ndarray]:
    """The slots that each of up to three workers owns, in an order of their own; some own none."""
    owner = rng.integers(0, rng.integers(1, 4), SLOTS)
    return [rng.permutation(np.flatnonzero(owner == worker)).astype(np.int32) for worker in range(3)]


def cuts(rng: np.random.Generator, count: int) -> list[int]:
    """Where up to four threads' shares begin and end; some are empty."""
    inner = np.sort(rng.integers(0, count + 1, rng.integers(0, 4)))
    return [0, *inner.tolist(), count]


def added(parts: list[Input] | list[Panels]) -> bytes:
    """All threads' sums as one."""
    total = sum(np.frombuffer(part.bits(), np.int64) for part in parts)
    assert np.count_nonzero(total) > 0.9 * HIDDEN
    return np.asarray(total).tobytes()


def one_token(slots: Slots, activation: str, words: np.ndarray, seed: int, way: str) -> bytes:
    """The sums of the masked neurons for one token, shared out by chance; way: "listed", "skip" or "open"."""
    rng, x = np.random.default_rng(seed), inputs()[0]
    bundles = bundles_at(slots.at, slots.layout, described(activation))
    parts = [Input(slots, x, 0, activation)]
    for ids in workers_and_threads(rng):
        listed, computed = np.zeros(SLOTS * 32, np.int32), np.zeros((1, SLOTS), np.uint32)
        selection = Selection(~computed, way == "skip", computed)
        gates = np.zeros(SLOTS * 32, np.float32)
        if way == "open":
            count = open_gates(bundles, ids, 0, len(ids), parts[0].batch, ~computed, gates, listed)
        else:
            count = list_masked(np.ascontiguousarray(words[ids]), len(ids), listed)
        starts = [group_start(listed, count, at) for at in cuts(rng, count)]
        for low, high in pairwise(starts):
            parts.append(Input(slots, x, 0, activation))
            if way == "open":
                open_neurons(bundles, ids, gates, listed, low, high, parts[-1].batch, computed)
            else:
                listed_neurons(bundles, ids, listed, low, high, selection, parts[-1].batch)
    return added(parts)


@pytest.mark.parametrize("activation", NAMES)
@pytest.mark.parametrize(("gate", "down"), KINDS)
def test_one_token_shared_out_in_any_way(gate: Kind, down: Kind, activation: str) -> None:
    slots = slots_of(gate, down)
    words = np.random.default_rng(5).integers(0, 1 << 32, SLOTS, np.uint32)
    words[1] = 0
    for some in (np.full(SLOTS, 0xFFFFFFFF, np.uint32), words):
        assert len({one_token(slots, activation, some, seed, "listed") for seed in range(PARTITIONS)}) == 1


@pytest.mark.parametrize("activation", SPARSE)
@pytest.mark.parametrize(("gate", "down"), KINDS)
def test_closed_gates_left_out_in_any_way(gate: Kind, down: Kind, activation: str) -> None:
    """Selected neurons whose gates are looked at on the way, and gates first: the same sums to the bit."""
    slots, whole = slots_of(gate, down), np.full(SLOTS, 0xFFFFFFFF, np.uint32)
    seeds = range(PARTITIONS)
    found = {one_token(slots, activation, whole, seed, way) for seed in seeds for way in ("skip", "open")}
    assert len(found) == 1


def several_tokens(slots: Slots, activation: str, x: np.ndarray, seed: int) -> bytes:
    rng = np.random.default_rng(seed)
    bundles = bundles_at(slots.at, slots.layout, described(activation))
    parts = [Panels(slots, x, 0, activation)]
    for ids in workers_and_threads(rng):
        shares = cuts(rng, len(ids))
        for low, high in pairwise(shares):
            parts.append(Panels(slots, x, 0, activation))
            dense_groups(bundles, ids, low, high, parts[-1].vectors, parts[0].tokens, NO_IDS, NO_NOTES)
    return added(parts)


@pytest.mark.parametrize("activation", NAMES)
@pytest.mark.parametrize(("gate", "down"), KINDS)
def test_several_tokens_shared_out_in_any_way(gate: Kind, down: Kind, activation: str) -> None:
    slots, x = slots_of(gate, down), inputs(37)
    assert len({several_tokens(slots, activation, x, seed) for seed in range(PARTITIONS)}) == 1


def test_more_groups_than_a_batch() -> None:
    """Over the bound of a batch the sums are those of the groups one by one; slots are listed more than once for it."""
    slots, x = slots_of(Kind.Q4, Kind.Q4C), inputs(20)
    bundles = bundles_at(slots.at, slots.layout, described("relu"))
    ids = np.random.default_rng(6).integers(0, SLOTS, 150).astype(np.int32)
    whole = Panels(slots, x, groups=len(ids))
    dense_groups(bundles, ids, 0, len(ids), whole.vectors, whole.tokens, NO_IDS, NO_NOTES)
    parts = []
    for slot in ids:
        parts.append(Panels(slots, x))
        dense_groups(bundles, np.array([slot]), 0, 1, parts[-1].vectors, whole.tokens, NO_IDS, NO_NOTES)
    assert whole.bits() == added(parts)
    assert whole.sums.shape == (32, HIDDEN)
