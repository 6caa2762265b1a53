"""HostDevice against a float64 reference, and its ledger.

Run: pytest tests/gpu_worker/test_host.py
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from tests.activations import NAMES, described
from tests.gpu_worker.conftest import bits_of, execute, execute_many, from_panels, to_panels
from tests.gpu_worker.devices import SHAPES
from warmfront.gpu_worker.host import HostDevice
from warmfront.gpu_worker.open import open_device
from warmfront.shared.errors import ResourceError
from warmfront.shared.kernels.rows import takes_quantised
from warmfront.shared.model.bundle import BundleLayout
from warmfront.shared.model.formats import Kind

MakeCase = Callable[[BundleLayout, str, int], Any]


def layout_of(gate: Kind, down: Kind) -> BundleLayout:
    return BundleLayout(hidden=96, ffn=200, gate_kind=gate, down_kind=down)


def assert_close(out: np.ndarray, expected: np.ndarray, tolerance: float = 1e-5) -> None:
    """`tolerance` is relative to the largest value expected."""
    np.testing.assert_allclose(out, expected, rtol=max(1e-4, tolerance), atol=tolerance * np.abs(expected).max())


# What inputs lose by being quantised to 15 bits for dots with 8- and 4-bit rows, and products of several tokens by
# being made of bfloat16, where the machine does that.
QUANTISED, BFLOAT = 2e-4, 2e-2


def filled(case: Any, slots: int = 10) -> HostDevice:
    """Group g in slot g + 2."""
    device = HostDevice()
    device.reserve(case.layout, described(case.activation), slots, len(case.x))
    device.fill(np.arange(2, 2 + len(case.groups), dtype=np.int32), case.groups)
    return device


@pytest.mark.parametrize("picked", [[0, 1, 2, 3, 4, 5, 6], [2, 3], [6, 0, 3], [5]])
@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("tokens", [1, 17])
@pytest.mark.parametrize(
    ("gate", "down"),
    [(kind, kind) for kind in Kind if kind != Kind.Q4C]
    + [(Kind.Q8, Kind.F32), (Kind.Q4, Kind.BF16), (Kind.Q4, Kind.Q4C), (Kind.Q4S, Kind.Q4C), (Kind.F32, Kind.Q4C)],
)
def test_kinds(random_case: MakeCase, gate: Kind, down: Kind, tokens: int, sparse: bool, picked: list[int]) -> None:
    case = random_case(layout_of(gate, down), "relu", tokens)
    device = filled(case)
    out = np.full(case.x.shape, np.nan, np.float32)
    computed, nanoseconds = execute(device, np.array(picked, np.int32) + 2, case.x, sparse, out)
    expected, visited = case.expect(picked, sparse)
    assert_close(out, expected, QUANTISED if takes_quantised(gate) else 1e-5)
    assert computed == visited.sum()
    assert nanoseconds > 0
    if not sparse:
        panels = to_panels(case.x)
        sums = np.full_like(panels, np.nan)
        assert execute_many(device, np.array(picked, np.int32) + 2, panels, tokens, sums)[0] == visited.sum()
        assert_close(from_panels(sums, tokens), expected, 1e-5 if gate == down == Kind.F32 else BFLOAT)


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize(("gated", "biases", "activation"), SHAPES)
def test_other_neurons(
    random_case: MakeCase, gated: bool, biases: tuple[str, ...], activation: str, sparse: bool
) -> None:
    case = random_case(replace(layout_of(Kind.F16, Kind.F16), gated=gated, biases=biases), activation, 3)
    out = np.empty_like(case.x)
    computed, _ = execute(filled(case), np.arange(2, 9, dtype=np.int32), case.x, sparse, out)
    expected, visited = case.expect(list(range(7)), sparse)
    assert_close(out, expected)
    assert computed == visited.sum()


@pytest.mark.parametrize("tokens", [1, 3])
@pytest.mark.parametrize("sparse", [False, True])
def test_a_mask_leaves_neurons_out(random_case: MakeCase, sparse: bool, tokens: int) -> None:
    """As if the gate, up and down rows of the others were not there."""
    case = random_case(layout_of(Kind.F16, Kind.Q4C), "relu", tokens)
    mask = np.array([0, 0xFFFFFFFF, 0x80000001, 0x00F0], np.uint32)
    chosen = bits_of(mask)
    out = np.full(case.x.shape, np.nan, np.float32)
    computed, _ = execute(filled(case), np.arange(2, 6, dtype=np.int32), case.x, sparse, out, mask)
    expected, visited = case.expect([0, 1, 2, 3], sparse, chosen)
    assert_close(out, expected, 1e-5)
    assert computed == visited.sum()


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_which_neurons_fired(random_case: MakeCase, sparse: bool, masked: bool) -> None:
    """Those computed whole: with an open gate if sparse, else all that were asked for."""
    case = random_case(layout_of(Kind.F16, Kind.F16), "relu", 1)
    mask = np.array([0x80000001, 0xFFFFFFFF, 0, 0xF0F0F0F0], np.uint32) if masked else None
    out, fired = np.empty_like(case.x), np.full(4, 0xDEADBEEF, np.uint32)
    picked = [5, 0, 3, 6]
    computed, _ = execute(filled(case), np.array(picked, np.int32) + 2, case.x, sparse, out, mask, fired)
    expected, visited = case.expect(picked, sparse, None if mask is None else bits_of(mask))
    assert_close(out, expected)
    assert (bits_of(fired) == visited[0]).all()
    assert computed == visited.sum()


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("activation", NAMES)
def test_activations(random_case: MakeCase, activation: str, sparse: bool) -> None:
    case = random_case(layout_of(Kind.F16, Kind.F16), activation, 5)
    out = np.empty_like(case.x)
    computed, _ = execute(filled(case), np.arange(2, 9, dtype=np.int32), case.x, sparse, out)
    expected, visited = case.expect(list(range(7)), sparse)
    assert_close(out, expected)
    assert computed == visited.sum()


@pytest.mark.parametrize("activation", NAMES)
def test_large_gates(random_case: MakeCase, activation: str) -> None:
    """No overflow far from zero, where many activations are the gate or nothing."""
    case = random_case(layout_of(Kind.F32, Kind.F32), activation, 1)
    case.x[:] *= 200
    out = np.empty_like(case.x)
    execute(filled(case), np.array([2], np.int32), case.x, False, out)
    expected, _ = case.expect([0], False)
    assert_close(out, expected)


@pytest.mark.parametrize("sparse", [False, True])
def test_no_slots(random_case: MakeCase, sparse: bool) -> None:
    case = random_case(layout_of(Kind.Q4, Kind.Q4), "relu", 3)
    out = np.full(case.x.shape, np.nan, np.float32)
    computed, _ = execute(filled(case), np.empty(0, np.int32), case.x, sparse, out)
    assert computed == 0
    assert not out.any()


def test_all_gates_closed(random_case: MakeCase) -> None:
    case = random_case(layout_of(Kind.F32, Kind.F32), "relu", 2)
    out = np.full(case.x.shape, np.nan, np.float32)
    assert execute(filled(case), np.array([2, 4], np.int32), np.zeros_like(case.x), True, out)[0] == 0
    assert not out.any()


def test_a_slot_takes_another_group(random_case: MakeCase) -> None:
    case = random_case(layout_of(Kind.Q8, Kind.Q8), "silu", 1)
    device = filled(case)
    device.fill(np.array([2], np.int32), case.groups[6:])
    out = np.empty_like(case.x)
    execute(device, np.array([2], np.int32), case.x, False, out)
    expected, _ = case.expect([6], False)
    assert_close(out, expected, QUANTISED)


def test_filling_scattered_slots_from_the_staging(random_case: MakeCase) -> None:
    case = random_case(layout_of(Kind.F16, Kind.F16), "relu", 1)
    device = filled(case)
    assert device.batch == (8 << 20) // case.layout.group_bytes
    picked = [6, 5, 1, 0]
    staged = device.staging(4)
    assert staged.shape == (4, case.layout.group_bytes)
    staged[:] = case.groups[picked]
    slots = np.array([9, 3, 4, 0], np.int32)
    assert device.fill(slots, staged) > 0
    out = np.empty_like(case.x)
    execute(device, slots, case.x, False, out)
    assert_close(out, case.expect(picked, False)[0])
    # Slot 2 was left alone.
    execute(device, np.array([2], np.int32), case.x, False, out)
    assert_close(out, case.expect([0], False)[0])


def test_a_group_larger_than_the_staging_is_filled_alone() -> None:
    device, layout = HostDevice(), BundleLayout(hidden=32768, ffn=32, gate_kind=Kind.F32, down_kind=Kind.F32)
    assert layout.group_bytes > 8 << 20
    device.reserve(layout, described("silu"), 1, 1)
    assert device.batch == 1
    assert device.staging(1).shape == (1, layout.group_bytes)


def test_the_host_pins_nothing() -> None:
    assert not HostDevice().pin(np.zeros(4096, np.uint8))


# What 200 neurons, 7 groups of 32, of hidden 96 take beside the slots, for up to 16 tokens. Number and gate of each
# neuron; x in two bytes (padded to 64) and two floats a block (padded to 16); 64 columns of 12 groups widened; gates
# and ups of a group, x as bfloat16, and of 7 groups the products of gate and up, as floats and as blocks of bytes;
# sums and number of each token.
PANEL_BYTES = 4 * (2 * 32 * 16) + 2 * 16 * 96 + 7 * (4 * 32 * 16 + 640) + 16 * (8 * 96 + 4)
PARTIAL_BYTES = 8 * 7 * 32 + 2 * 128 + 2 * 4 * 16 + 4 * 12 * 32 * 64 + PANEL_BYTES


def test_ledger() -> None:
    """Planned equals allocated, and what is allocated is no longer free."""
    layout = layout_of(Kind.F32, Kind.Q8)
    device = HostDevice(capacity=2_000_000)
    plan = device.ledger(layout, 9, 4)
    # A bundle: 384 bytes of gate, as many of up, 102 of down, up to a multiple of 64.
    assert plan == {"slots": 9 * 32 * 896, "partials": PARTIAL_BYTES}
    assert device.allocated() == {}
    device.reserve(layout, described("silu"), 9, 4)
    assert device.allocated() == plan
    assert device.free_bytes() == 2_000_000 - sum(plan.values())
    device.close()
    device.close()
    assert device.free_bytes() == 2_000_000


def test_ledger_grows_by_panels() -> None:
    """16 tokens cost what one does; the 17th starts another panel."""
    device, layout = HostDevice(), layout_of(Kind.F16, Kind.F16)
    one, full, more = (device.ledger(layout, 1, tokens) for tokens in (1, 16, 17))
    assert one == full
    assert more["partials"] == PARTIAL_BYTES + PANEL_BYTES


def test_capacity() -> None:
    """Exactly full is fine, a byte less is not."""
    layout = layout_of(Kind.F16, Kind.F16)
    needed = 3 * 32 * 576 + PARTIAL_BYTES
    HostDevice(capacity=needed).reserve(layout, described("silu"), 3, 2)
    with pytest.raises(ResourceError, match=r"^host \(emulated GPU\): 3 slots need 0.2 MiB[^\n]*$"):
        HostDevice(capacity=needed - 1).reserve(layout, described("silu"), 3, 2)


def test_says_that_it_is_emulated() -> None:
    device = open_device("host")
    assert device.name == "host (emulated GPU)"
    assert device.free_bytes() > 0
