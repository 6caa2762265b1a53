"""How far ahead is fetched changes no bit of what neurons give.  pytest tests/shared/kernels/test_fetching.py"""

import numpy as np
import pytest

from tests.shared.kernels.feed_forward.test_ffn import (
    EVERY,
    HIDDEN,
    KINDS,
    SLOTS,
    Input,
    inputs,
    run_listed,
    slots_of,
)
from warmfront.shared.kernels.feed_forward.bundles import bundles_at, tile_group
from warmfront.shared.kernels.feed_forward.ffn import open_gates, open_neurons, whole_groups
from warmfront.shared.kernels.fetching import (
    ACCESSES,
    ANNOUNCED,
    BUNDLES,
    GATE_ROWS,
    LOWBIT_ROWS,
    MATRIX_ROWS,
    SCATTERED,
    Use,
    as_distances,
    no_fetching,
    usual_distances,
)
from warmfront.shared.machine.memory import address
from warmfront.shared.model.architecture import FeedForward
from warmfront.shared.model.bundle import BundleLayout
from warmfront.shared.model.formats import Kind

RELU = FeedForward(activation="relu")


@pytest.mark.parametrize(("gate", "down"), KINDS)
def test_neurons(gate: Kind, down: Kind) -> None:
    slots, x = slots_of(gate, down), inputs()[0]
    order = np.array([4, 2, 0], np.int32)
    listed = np.flatnonzero(np.random.default_rng(1).random(96) < 0.3)
    results = set()
    for ahead in (0, 1, 2048, 5120, 16384, 1 << 30):
        for announced in (0, 4, 1000):
            table = no_fetching()
            table[[SCATTERED, BUNDLES, GATE_ROWS], gate], table[ANNOUNCED, gate] = ahead, announced
            bundles = bundles_at(slots.at, slots.layout, RELU, False, table)
            some, one = Input(slots, x), Input(slots, x)
            computed = run_listed(bundles, order, listed, some, skip=True)
            gates, opened = np.zeros(96, np.float32), np.zeros(96, np.int32)
            count = open_gates(bundles, order, 0, 3, one.batch, EVERY, gates, opened)
            open_neurons(bundles, order, gates, opened, 0, count, one.batch, np.zeros((1, 3), np.uint32))
            results.add((some.bits(), tuple(computed), gates.tobytes(), opened.tobytes(), one.bits()))
    assert len(results) == 1


@pytest.mark.parametrize(("gate", "down"), KINDS)
def test_whole_groups(gate: Kind, down: Kind) -> None:
    slots, x = slots_of(gate, down), inputs()[0]
    if not bundles_at(slots.at, slots.layout, RELU, True).tiled:
        pytest.skip("not in tiles here")
    memory, results = np.copy(slots.groups), set()
    for group in memory:
        tile_group(bundles_at(address(memory), slots.layout, RELU, True), address(group))
    for ahead in (0, 1, 5120, 1 << 40):
        table = no_fetching()
        table[BUNDLES, gate] = ahead
        one = Input(slots, x)
        bundles = bundles_at(address(memory), slots.layout, RELU, True, table)
        whole_groups(bundles, np.arange(SLOTS, dtype=np.int32), 0, SLOTS, one.batch)
        results.add(one.bits())
    assert len(results) == 1
    assert any(results.pop()[: 8 * HIDDEN])


def test_bundles_take_their_distances_from_the_table() -> None:
    """As whole neurons, at least one, unless they are in tiles; 0 bytes are none."""
    layout = BundleLayout(hidden=512, ffn=32, gate_kind=Kind.F16, down_kind=Kind.Q8)  # 1024, 1024 and 544 bytes
    table = no_fetching()
    table[GATE_ROWS, Kind.F16], table[SCATTERED, Kind.F16], table[ANNOUNCED, Kind.F16] = 2048, 5120, 4
    table[BUNDLES, Kind.F16], table[:, Kind.Q8] = 1, 99
    scattered, whole = (bundles_at(0, layout, RELU, whole, table) for whole in (False, True))
    assert (scattered.ahead, scattered.down_ahead, scattered.gates_ahead, scattered.announced) == (2, 4, 2048, 4)
    assert (whole.ahead, whole.gates_ahead, whole.announced) == (1, 2048, 0)
    none = bundles_at(0, layout, RELU, False, no_fetching())
    assert (none.ahead, none.down_ahead, none.gates_ahead, none.announced) == (0, 0, 0, 0)
    tiled = bundles_at(0, BundleLayout(hidden=512, ffn=32, gate_kind=Kind.Q8, down_kind=Kind.Q8), RELU, True, table)
    assert tiled.ahead == (99 if tiled.tiled else 1)


def test_what_is_usual_where_nothing_was_measured() -> None:
    """Whole numbers are fetched ahead, floats not; low-bit copies whatever their bits are as a kind."""
    table = usual_distances()
    assert (table[MATRIX_ROWS, Kind.F16], table[SCATTERED, Kind.BF16]) == (0, 0)
    assert table[MATRIX_ROWS, Kind.Q8] == table[BUNDLES, Kind.Q4S] == table[LOWBIT_ROWS, 2] > 0
    assert not table[ANNOUNCED].any()


def test_the_table_survives_the_wire() -> None:
    table = no_fetching()
    table[SCATTERED, Kind.Q4C] = 5120
    assert (as_distances(table.tobytes()) == table).all()
    assert (as_distances(b"") == usual_distances()).all()
    with pytest.raises(ValueError, match="reshape"):
        as_distances(table.tobytes()[8:])
    assert table.shape[0] == len(ACCESSES)


def test_names() -> None:
    assert [str(use) for use in (Use(SCATTERED, Kind.Q4S), Use(LOWBIT_ROWS, 2))] == ["scattered q4s", "lowbit 2 bits"]
