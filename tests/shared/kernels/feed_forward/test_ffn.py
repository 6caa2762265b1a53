"""The feed-forward kernels against float64 numpy.  pytest tests/shared/kernels/feed_forward/test_ffn.py"""

import math
from collections.abc import Iterable
from functools import cache
from itertools import product

import numpy as np
import pytest

from tests.activations import NAMES, SPARSE, THRESHOLD, described, factors, firing
from warmfront.shared.kernels.byte_dot import quantise_batch, quantised_bytes
from warmfront.shared.kernels.exact_sums import inverse_unit
from warmfront.shared.kernels.feed_forward.bundles import Bundles, Vectors, arrange_group, bundles_at
from warmfront.shared.kernels.feed_forward.ffn import (
    Batch,
    Selection,
    batch_scratch_bytes,
    listed_neurons,
    open_gates,
    open_neurons,
    open_ups,
)
from warmfront.shared.kernels.feed_forward.neuron_lists import group_start
from warmfront.shared.kernels.prefill.dense_groups import dense_groups, scratch_bytes
from warmfront.shared.kernels.prefill.notes import NO_NOTES, Notes, noting
from warmfront.shared.machine.memory import address
from warmfront.shared.model.bundle import BundleLayout
from warmfront.shared.model.formats import Kind, join_nibbles, pack, unpack
from warmfront.shared.model.noted import Noted

HIDDEN, SLOTS = 96, 5
KINDS = [
    *((kind, kind) for kind in Kind if kind != Kind.Q4C),
    (Kind.Q4, Kind.Q8),
    (Kind.F16, Kind.Q4),
    (Kind.Q8, Kind.F32),
    (Kind.Q4S, Kind.Q4),
    (Kind.Q4, Kind.Q4C),
    (Kind.Q4S, Kind.Q4C),
    (Kind.F32, Kind.Q4C),
]
ORDERS = [[0, 1, 2, 3, 4], [4, 2, 0], [3], [1, 1]]
# Words of a token that wants all neurons.
EVERY = np.full((1, SLOTS), 0xFFFFFFFF, np.uint32)


class Slots:
    """Random groups [slots, group_bytes], surrounded by NaN, and what they hold in float64."""

    def __init__(self, gate_kind: Kind, down_kind: Kind, gated: bool = True, biases: tuple[str, ...] = ()) -> None:
        rng = np.random.default_rng(3)
        self.layout = BundleLayout(
            hidden=HIDDEN, ffn=SLOTS * 32, gate_kind=gate_kind, down_kind=down_kind, gated=gated, biases=biases
        )
        size = self.layout.group_bytes
        self._memory = np.full((SLOTS + 2) * size, 0xFF, np.uint8)
        self.groups = groups = self._memory[size:-size].reshape(SLOTS, size)
        bundles = groups[:, : self.layout.tail_offset].reshape(SLOTS, 32, -1)
        self.at = address(groups)
        starts = (0, self.layout.up_offset, self.layout.down_offset)
        self.gate, self.up, self.down = (np.zeros((SLOTS * 32, HIDDEN)) for _ in range(3))
        parts = [*zip(starts, (gate_kind, gate_kind, down_kind), (self.gate, self.up, self.down), strict=True)]
        for start, kind, part in parts if gated else (parts[0], parts[2]):
            if kind == Kind.Q4C:
                q = rng.integers(0, 16, (SLOTS * 32, HIDDEN // 32, 32), dtype=np.uint8)
                tail = rng.normal(0, 0.03, (SLOTS, 2, HIDDEN)).astype(np.float16)
                offset = self.layout.tail_offset
                groups[:, offset : offset + 4 * HIDDEN] = tail.view(np.uint8).reshape(SLOTS, -1)
                rows = join_nibbles(q)
                scale, minimum = np.repeat(tail.astype(np.float64), 32, 0).swapaxes(0, 1)
                part[:] = q.reshape(SLOTS * 32, HIDDEN) * scale + minimum
            else:
                rows = pack(rng.normal(0, 0.2, part.shape).astype(np.float32), kind)
                part[:] = unpack(rows, kind, HIDDEN)
            bundles[:, :, start : start + rows.shape[1]] = rows.reshape(SLOTS, 32, -1)
        # Of the gate and of the up; without a gate every up is 1.
        self.biases = np.zeros((2, SLOTS * 32))
        self.biases[1] = not gated
        for values, at in zip(self.biases, (self.layout.gate_bias_offset, self.layout.up_bias_offset), strict=True):
            if at:
                values[:] = floats = rng.normal(0, 1, len(values)).astype(np.float32)
                bundles[:, :, at : at + 4] = floats.view(np.uint8).reshape(SLOTS, 32, 4)

    def inverse(self, x: np.ndarray, activation: str = "relu") -> np.ndarray:
        """1 / unit of the sums of float [tokens, hidden]."""
        gate, up = (
            max(np.abs(m).max(), np.abs(b).max()) for m, b in zip((self.gate, self.up), self.biases, strict=True)
        )
        parts = [gate, up, np.abs(self.down).max()] + ([gate] if activation == "relu2" else [])
        magnitudes = np.abs(x).sum(1, dtype=np.float64) + bool(self.layout.biases)
        reach, degree = SLOTS * 32 * math.prod(map(float, parts)), described(activation).degree
        degree -= not self.layout.gated
        return np.array([inverse_unit(reach, degree, float(magnitude)) for magnitude in magnitudes], np.float32)

    def neurons(self, order: list[int]) -> np.ndarray:
        return np.concatenate([np.arange(32) + 32 * slot for slot in order])

    def expect(self, activation: str, neurons: np.ndarray, x: np.ndarray) -> np.ndarray:
        """The sum of the neurons' outputs for float [tokens, hidden]."""
        gates, ups = self.gates_and_ups(neurons, x)
        return np.asarray(factors(activation, gates, ups) @ self.down[neurons])

    def gates_and_ups(self, neurons: np.ndarray, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """[tokens, neurons] each."""
        wide = x.astype(np.float64)
        gates, ups = wide @ self.gate[neurons].T, wide @ self.up[neurons].T
        return gates + self.biases[0, neurons], ups + self.biases[1, neurons]


@cache
def slots_of(gate_kind: Kind, down_kind: Kind, gated: bool = True, biases: tuple[str, ...] = ()) -> Slots:
    return Slots(gate_kind, down_kind, gated, biases)


def inputs(tokens: int = 1) -> np.ndarray:
    return np.random.default_rng(tokens).standard_normal((tokens, HIDDEN)).astype(np.float32)


def assert_close(got: np.ndarray, expected: np.ndarray, tolerance: float = 2e-5) -> None:
    """`tolerance` is relative to the largest value expected."""
    np.testing.assert_allclose(got, expected, rtol=tolerance, atol=tolerance * np.abs(expected).max(initial=0))


# What the inputs of quantised rows lose by being quantised to 15 bits, and bfloat16 products to 8.
QUANTISED, BFLOAT = 2e-4, 2e-2


def begun(start: float, inverse: np.ndarray) -> np.ndarray:
    """`start` in units of each token."""
    return np.rint(start * inverse.astype(np.float64) if start else np.zeros(len(inverse))).astype(np.int64)


class Input:
    """A batch of tokens, themselves and quantised, with sums that begin at `start` and scratch memory."""

    def __init__(self, slots: Slots, x: np.ndarray, start: float = 0, activation: str = "relu") -> None:
        self._x = np.ascontiguousarray(np.atleast_2d(x), np.float32)
        tokens = len(self._x)
        self._inverse = slots.inverse(self._x, activation)
        self._sums = begun(start, self._inverse).repeat(HIDDEN).reshape(tokens, HIDDEN)
        self._quantised = np.zeros(tokens * quantised_bytes(HIDDEN), np.uint8)
        size = batch_scratch_bytes(HIDDEN)
        self._scratch = np.full(size + 64, 0xFF, np.uint8)
        self._behind = self._scratch[size:]
        x_at = address(self._x)
        quantised = quantise_batch(x_at, address(self._quantised), HIDDEN, tokens)
        self.batch = Batch(tokens, x_at, *quantised, *map(address, (self._inverse, self._sums, self._scratch)))

    @property
    def sums(self) -> np.ndarray:
        """As float64 [tokens, hidden]; what lies behind the scratch memory is untouched."""
        assert (self._behind == 0xFF).all()
        return np.asarray(self._sums / self._inverse.astype(np.float64)[:, None])

    def bits(self, token: int = 0) -> bytes:
        return self._sums[token].tobytes()


class Panels:
    """Several tokens in panels, with sums [tokens, hidden] that begin at `start` and scratch memory for `groups`."""

    def __init__(
        self, slots: Slots, x: np.ndarray, start: float = 0, activation: str = "relu", groups: int = SLOTS
    ) -> None:
        self._x = panels_of(x)
        self.count, self.tokens = len(self._x), len(x)
        padded = self._x.transpose(0, 2, 1).reshape(-1, HIDDEN)
        self._inverse = slots.inverse(padded, activation)
        begin = begun(start, self._inverse).reshape(-1, 1, 16)
        self._sums = np.broadcast_to(begin, self._x.shape).copy()
        size = scratch_bytes(HIDDEN, groups, len(x))
        self._scratch = np.full(size + 64, 0xFF, np.uint8)
        self._behind = self._scratch[size:]
        addresses = map(address, (self._inverse, self._sums, self._scratch))
        self.vectors = Vectors(address(self._x), *addresses)

    @property
    def sums(self) -> np.ndarray:
        """As float64 [tokens padded to 16, hidden]; what lies behind the scratch memory is untouched."""
        assert (self._behind == 0xFF).all()
        rows = self._sums.transpose(0, 2, 1).reshape(-1, HIDDEN)
        return np.asarray(rows / self._inverse.astype(np.float64)[:, None])

    def bits(self) -> bytes:
        return self._sums.tobytes()


def run_listed(
    bundles: Bundles,
    ids: np.ndarray,
    listed: Iterable[int],
    one: Input,
    low: int = 0,
    high: int | None = None,
    *,
    skip: bool = False,
) -> list[int]:
    """The neurons that were computed, by number in the list of slots, after a check of the count."""
    neurons, words = np.array([*listed], np.int32), np.zeros((1, len(ids) + 1), np.uint32)
    end = len(neurons) if high is None else high
    selection = Selection(np.full_like(words, 0xFFFFFFFF), skip, words)
    count = listed_neurons(bundles, ids, neurons, low, end, selection, one.batch)
    assert words[0, -1] == 0
    computed = bits_of(words[0])
    assert count == len(computed)
    return computed


def bits_of(words: np.ndarray) -> list[int]:
    """Numbers of the bits set in uint32 words, 32 to a word."""
    return [32 * i + bit for i, word in enumerate(words.tolist()) for bit in range(32) if word >> bit & 1]


@pytest.mark.parametrize("activation", NAMES)
@pytest.mark.parametrize(("gate", "down"), KINDS)
def test_listed_neurons(gate: Kind, down: Kind, activation: str) -> None:
    slots, x = slots_of(gate, down), inputs()
    bundles = bundles_at(slots.at, slots.layout, described(activation))
    for order in ORDERS:
        neurons = slots.neurons(order)
        for low, high in ((0, len(neurons)), (5, 23), (31, min(33, len(neurons))), (7, 7)):
            one = Input(slots, x[0], 0.5, activation)
            computed = run_listed(bundles, np.array(order, np.int32), range(len(neurons)), one, low, high)
            assert computed == list(range(low, high))
            assert_close(one.sums[0], 0.5 + slots.expect(activation, neurons[low:high], x)[0], QUANTISED)


@pytest.mark.parametrize("activation", SPARSE)
@pytest.mark.parametrize(("gate", "down"), KINDS)
def test_listed_neurons_with_gaps(gate: Kind, down: Kind, activation: str) -> None:
    """Some neurons of some groups; with `skip` those that do not fire are left out, and make no difference."""
    slots, x = slots_of(gate, down), inputs()
    bundles = bundles_at(slots.at, slots.layout, described(activation))
    for order in ORDERS:
        neurons, ids = slots.neurons(order), np.array(order, np.int32)
        listed = np.flatnonzero(np.random.default_rng(len(order)).random(len(neurons)) < 0.4)
        expected = slots.expect(activation, neurons[listed], x)[0]
        opened = listed[firing(activation, *slots.gates_and_ups(neurons[listed], x))[0]]
        assert 0 < len(opened) < len(listed)
        for skip, fired in ((False, listed), (True, opened)):
            one = Input(slots, x[0], 0, activation)
            assert run_listed(bundles, ids, listed, one, skip=skip) == fired.tolist()
            assert_close(one.sums[0], expected, QUANTISED)


def with_gates_apart(slots: Slots, activation: str) -> tuple[Bundles, np.ndarray]:
    """A copy of the slots with their gates apart, and the memory it is in."""
    memory = np.copy(slots.groups)
    bundles = bundles_at(address(memory), slots.layout, described(activation), apart=True)
    for group in memory:
        arrange_group(bundles, address(group))
    return bundles, memory


@pytest.mark.parametrize("activation", SPARSE)
@pytest.mark.parametrize(("gate", "down"), KINDS)
def test_open_gates_and_neurons(gate: Kind, down: Kind, activation: str) -> None:
    slots, x = slots_of(gate, down), inputs()
    parted, _memory = with_gates_apart(slots, activation)
    plain = bundles_at(slots.at, slots.layout, described(activation))
    for order, bundles, first in product(ORDERS, (plain, parted), (0, 1)):
        neurons, ids = slots.neurons(order), np.array(order, np.int32)
        exact, ups = (values[0] for values in slots.gates_and_ups(neurons, x))
        fires = firing(activation, exact, ups)
        for last in (first, len(order)):
            low, high = 32 * first, 32 * last
            gates, opened = np.full(high + 1, np.nan, np.float32), np.full(high + 1, -1, np.int32)
            one = Input(slots, x[0], -0.25, activation)
            count = open_gates(bundles, ids, first, last, one.batch, EVERY, gates, opened)
            wanted = [i for i in range(low, high) if exact[i] > (THRESHOLD if ":" in activation else 0)]
            assert opened[:count].tolist() == wanted
            assert_close(gates[:count], exact[wanted], QUANTISED)
            assert np.isnan(gates[count + 1 :]).all()
            found = [i for i in wanted if fires[i]]
            assert open_ups(bundles, ids, opened, count, one.batch) == len(found)
            # In two parts, as two threads take them.
            middle, words = group_start(opened, count, count // 3), np.zeros((1, len(ids)), np.uint32)
            done = [
                open_neurons(bundles, ids, gates, opened, first, last, one.batch, words)
                for first, last in ((0, middle), (middle, count))
            ]
            assert bits_of(words[0]) == found
            assert sum(done) == len(found)
            assert_close(one.sums[0], slots.expect(activation, neurons[low:high], x)[0] - 0.25, QUANTISED)


def test_a_gate_that_is_nan_is_open() -> None:
    """So that every way of computing shows it, with gates skipped or not, for one token or several.

    That the output is NaN is said by the unit: integers have none (tests/shared/kernels/test_exact_sums.py).
    """
    slots = Slots(Kind.F32, Kind.F32)
    listed, x = np.arange(SLOTS * 32, dtype=np.int32), np.full(HIDDEN, np.nan, np.float32)
    gates, opened = np.zeros(len(listed), np.float32), np.zeros(len(listed), np.int32)
    order, computed = np.arange(SLOTS, dtype=np.int32), np.zeros((1, SLOTS), np.uint32)
    bundles = bundles_at(slots.at, slots.layout, described("relu"))
    one = Input(slots, x)
    assert open_gates(bundles, order, 0, 2, one.batch, EVERY, gates, opened) == 64
    assert listed_neurons(bundles, order, listed, 0, 64, Selection(~computed, True, computed), one.batch) == 64
    assert np.isnan(one.sums).all()
    panel = np.concatenate((inputs(5), x[None]))
    several, bits = Panels(slots, panel), np.zeros((SLOTS, 32, 1), np.uint16)
    notes = Notes(noting(Noted.FIRING), address(bits), 1)
    dense_groups(bundles, order, 0, 2, several.vectors, several.tokens, order, notes)
    assert np.isnan(several.sums[5]).all()
    assert (bits[:2] & 1 << 5).all()
    # The tokens beside it are as ever.
    alone = Panels(slots, np.concatenate((panel[:5], np.zeros((1, HIDDEN), np.float32))))
    dense_groups(bundles, order, 0, 2, alone.vectors, alone.tokens, order, notes)
    assert np.isfinite(alone.sums).all()
    np.testing.assert_array_equal(several.sums[:5], alone.sums[:5])


def test_no_gate_is_open_at_zero() -> None:
    slots, x = slots_of(Kind.F32, Kind.F32), np.zeros((1, HIDDEN), np.float32)
    bundles = bundles_at(slots.at, slots.layout, described("relu"))
    gates, opened = np.zeros(SLOTS * 32, np.float32), np.zeros(SLOTS * 32, np.int32)
    one = Input(slots, x[0])
    ids = np.arange(SLOTS, dtype=np.int32)
    assert open_gates(bundles, ids, 0, SLOTS, one.batch, EVERY, gates, opened) == 0


def panels_of(x: np.ndarray) -> np.ndarray:
    """[tokens, hidden] as [panels, hidden, 16], the rest zero."""
    padded = np.zeros((-(-len(x) // 16) * 16, HIDDEN), np.float32)
    padded[: len(x)] = x
    return np.ascontiguousarray(padded.reshape(-1, 16, HIDDEN).transpose(0, 2, 1))


NO_IDS = np.zeros(0, np.int32)


@pytest.mark.parametrize("activation", NAMES)
@pytest.mark.parametrize(("gate", "down"), KINDS)
def test_dense_groups(gate: Kind, down: Kind, activation: str) -> None:
    slots = slots_of(gate, down)
    bundles = bundles_at(slots.at, slots.layout, described(activation))
    for tokens, order in zip((2, 16, 37, 70), ORDERS, strict=True):
        x = inputs(tokens)
        for low, high in ((0, len(order)), (len(order) - 1, len(order)), (0, 0)):
            several = Panels(slots, x, 0.5, activation)
            ids = np.array(order, np.int32)
            dense_groups(bundles, ids, low, high, several.vectors, several.tokens, NO_IDS, NO_NOTES)
            expected = np.zeros((several.count * 16, HIDDEN))
            if low < high:
                expected[:tokens] = slots.expect(activation, slots.neurons(order[low:high]), x)
            exact = gate == down == Kind.F32
            # A gate at FATReLU's threshold is as good as closed or as large as that.
            rounding = BFLOAT * (5 if ":" in activation else 1)
            assert_close(several.sums, expected + 0.5, 2e-5 if exact else rounding)


def test_results_repeat_to_the_bit() -> None:
    slots, x = slots_of(Kind.Q4, Kind.Q4), inputs(16)
    bundles = bundles_at(slots.at, slots.layout, described("silu"))
    ids, results = np.arange(SLOTS, dtype=np.int32), set()
    for _ in range(3):
        one, many = Input(slots, x[0]), Panels(slots, x)
        run_listed(bundles, ids, range(SLOTS * 32), one)
        dense_groups(bundles, ids, 0, SLOTS, many.vectors, many.tokens, NO_IDS, NO_NOTES)
        results.add((one.bits(), many.bits()))
    assert len(results) == 1


@pytest.mark.parametrize("activation", NAMES)
def test_far_from_zero_nothing_overflows(activation: str) -> None:
    slots, x = slots_of(Kind.F32, Kind.F32), 300 * inputs()
    bundles = bundles_at(slots.at, slots.layout, described(activation))
    one = Input(slots, x[0], 0, activation)
    run_listed(bundles, np.arange(SLOTS, dtype=np.int32), range(SLOTS * 32), one)
    assert_close(one.sums[0], slots.expect(activation, np.arange(SLOTS * 32), x)[0])
