"""What the tests of CudaDevice share: layouts, how a device is filled and checked, a real card."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from tests.activations import described
from tests.gpu_worker.conftest import bits_of, execute, execute_many, from_panels, to_panels
from warmfront.gpu_worker.device import Device
from warmfront.gpu_worker.open import open_device
from warmfront.shared.errors import ResourceError
from warmfront.shared.model.bundle import BundleLayout
from warmfront.shared.model.formats import Kind

MakeCase = Callable[[BundleLayout, str, int], Any]

# Odd numbers of 32-blocks: rows start at odd multiples of 2, 4 and 8 bytes, and the last tile of columns is not full.
PAIRS = [(kind, kind) for kind in Kind if kind != Kind.Q4C] + [
    (Kind.Q4, Kind.Q4C),
    (Kind.Q4S, Kind.Q4C),
    (Kind.F16, Kind.Q4C),
    (Kind.Q8, Kind.F32),
    (Kind.Q8, Kind.F16),
    (Kind.Q8, Kind.Q4S),
    (Kind.Q4, Kind.BF16),
    (Kind.F16, Kind.Q8),
]


# Neurons without a gate, and with biases.
SHAPES = [(False, (), "gelu"), (False, ("up",), "relu"), (True, ("up",), "silu"), (True, ("gate", "up"), "drelu")]


def layout_of(gate: Kind, down: Kind, groups: int) -> BundleLayout:
    return BundleLayout(hidden=288, ffn=groups * 32, gate_kind=gate, down_kind=down)


def reserve(device: Device, case: Any) -> None:
    """Three slots more than groups; group 0 in slot 0, the others from slot 2 on."""
    layout = case.layout
    device.reserve(layout, described(case.activation), layout.groups + 3, len(case.x))
    device.fill(np.array([0, *range(2, layout.groups + 1)], np.int32), case.groups)


def places_of(picked: list[int]) -> Any:
    return np.array([group + 1 if group else 0 for group in picked], np.int32)


def assert_close(out: Any, expected: Any) -> None:
    np.testing.assert_allclose(out, expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max())


def check(device: Device, case: Any, sparse: bool) -> None:
    """Groups in scattered slots, computed twice: right, counted and the same to the bit."""
    plan = device.ledger(case.layout, case.layout.groups + 3, len(case.x))
    reserve(device, case)
    assert device.allocated() == plan
    picked = [*range(case.layout.groups - 1, 0, -2), 0]
    places = places_of(picked)
    first, second = np.full((2, *case.x.shape), np.nan)
    computed, nanoseconds = execute(device, places, case.x, sparse, first)
    assert execute(device, places, case.x, sparse, second)[0] == computed
    expected, visited = case.expect(picked, sparse)
    assert_close(first, expected)
    assert first.tobytes() == second.tobytes()
    assert computed == visited.sum()
    assert nanoseconds > 0
    if not sparse:
        assert_close(several(device, case, picked), expected)
        assert several(device, case, picked).tobytes() == several(device, case, picked).tobytes()
    mask = np.resize(np.array([0x80000001, 0, 0xFFFFFFFF, 0x00F0], np.uint32), len(places))
    expected, visited = case.expect(picked, sparse, bits_of(mask))
    assert execute(device, places, case.x, sparse, first, mask)[0] == visited.sum()
    assert_close(first, expected)
    check_computed(device, case, sparse, picked, mask)
    assert execute(device, places[:0], case.x, sparse, first) == (0, 0)
    assert not first.any()
    device.close()
    device.close()
    assert device.allocated() == {}


def several(device: Device, case: Any, picked: list[int]) -> Any:
    """By `execute_many`, from and to panels."""
    x = to_panels(case.x)
    out = np.full(x.shape, np.nan)
    computed, nanoseconds = execute_many(device, places_of(picked), x, len(case.x), out)
    assert computed == 32 * len(picked) * len(case.x)
    assert nanoseconds > 0
    return from_panels(out, len(case.x))


def check_computed(device: Device, case: Any, sparse: bool, picked: list[int], mask: Any) -> None:
    """Of the first token alone, with and without a mask."""
    x, out = case.x[:1], np.empty_like(case.x[:1])
    for given, chosen in ((None, None), (mask, bits_of(mask))):
        words = np.full(len(picked), 0xDEADBEEF, np.uint32)
        computed, _ = execute(device, places_of(picked), x, sparse, out, given, words)
        _, visited = case.expect(picked, sparse, chosen)
        assert (bits_of(words) == visited[0]).all()
        assert computed == visited[0].sum()


def real_card() -> Device:
    try:
        return open_device("cuda:0")
    except ResourceError as error:
        pytest.skip(str(error))
