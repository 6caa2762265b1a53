"""CudaDevice against the reference: on the CPU stand-in everywhere, on a real card where there is one.

Run: pytest tests/gpu_worker/test_cuda.py            (add -m gpu on a machine with a card and CuPy)
"""

from collections.abc import Callable
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from warmfront.gpu_worker import launch
from warmfront.gpu_worker.cuda import CudaDevice
from warmfront.gpu_worker.device import Device, open_device
from warmfront.shared.bundle import BundleLayout
from warmfront.shared.errors import ResourceError
from warmfront.shared.model import ACTIVATIONS
from warmfront.shared.weights import Kind

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


def layout_of(gate: Kind, down: Kind, groups: int) -> BundleLayout:
    return BundleLayout(hidden=288, ffn=groups * 32, gate_kind=gate, down_kind=down)


def check(device: Device, case: Any, sparse: bool) -> None:
    """Groups in scattered slots, computed twice: right, counted and the same to the bit."""
    layout = case.layout
    slots = layout.groups + 3
    plan = device.ledger(layout, slots, len(case.x))
    device.reserve(layout, ACTIVATIONS.index(case.activation), slots, len(case.x))
    assert device.allocated() == plan
    device.store_many(2, case.groups[1:])
    device.store(0, case.groups[0])
    picked = [*range(layout.groups - 1, 0, -2), 0]
    places = np.array([group + 1 if group else 0 for group in picked], np.int32)
    first, second = np.full((2, *case.x.shape), np.nan, np.float32)
    computed, nanoseconds = device.execute(places, case.x, sparse, first)
    assert device.execute(places, case.x, sparse, second)[0] == computed
    expected, pairs = case.expect(picked, sparse)
    np.testing.assert_allclose(first, expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max())
    assert first.tobytes() == second.tobytes()
    assert computed == pairs
    assert nanoseconds > 0
    mask = np.resize(np.array([0x80000001, 0, 0xFFFFFFFF, 0x00F0], np.uint32), len(places))
    chosen = np.unpackbits(mask.view(np.uint8), bitorder="little").astype(bool)
    expected, pairs = case.expect(picked, sparse, chosen)
    assert device.execute(places, case.x, sparse, first, mask)[0] == pairs
    np.testing.assert_allclose(first, expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max())
    assert device.execute(places[:0], case.x, sparse, first) == (0, 0)
    assert not first.any()
    device.close()
    device.close()
    assert device.allocated() == {}


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize(("gate", "down"), PAIRS)
def test_kernels_on_cpu(
    random_case: MakeCase,
    cpu_cupy: ModuleType,
    capfd: pytest.CaptureFixture[str],
    gate: Kind,
    down: Kind,
    sparse: bool,
) -> None:
    activation = "relu" if sparse else ACTIVATIONS[gate % len(ACTIVATIONS)]
    device = CudaDevice(0)
    assert device.name == "cuda:0 CPU stand-in"
    # 21 groups, 11 of them picked: two segments, one of which has fewer groups than warps.
    check(device, random_case(layout_of(gate, down, 21), activation, 2), sparse)
    assert "runtime error" not in capfd.readouterr().err


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_many_tokens_on_cpu(random_case: MakeCase, cpu_cupy: ModuleType, activation: str) -> None:
    """One segment, which writes the output itself."""
    check(CudaDevice(0), random_case(layout_of(Kind.F16, Kind.Q4, 3), activation, 17), activation == "relu")


def test_staging_ring_on_cpu(random_case: MakeCase, cpu_cupy: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """More groups than both staging buffers hold."""
    monkeypatch.setattr("warmfront.gpu_worker.cuda._STAGING_BYTES", 0)
    check(CudaDevice(0), random_case(layout_of(Kind.Q8, Kind.Q8, 6), "silu", 1), False)


def test_too_many_slots_on_cpu(cpu_cupy: ModuleType) -> None:
    layout = layout_of(Kind.F32, Kind.F32, 8)
    with pytest.raises(ResourceError, match=r"cuda:0 CPU stand-in: 1000 slots need .* MiB, 64.0 MiB are free"):
        CudaDevice(0).reserve(layout, 0, 1000, 1)


def test_missing_device() -> None:
    with pytest.raises(ResourceError, match=r"^cuda:99: [^\n]+$"):
        open_device("cuda:99")


@pytest.mark.parametrize("name", ["cuda", "cuda:x", "tpu:0", ""])
def test_unknown_device(name: str) -> None:
    with pytest.raises(ResourceError, match="use cuda:N or host"):
        open_device(name)


@pytest.mark.gpu
@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("tokens", [1, 17])
@pytest.mark.parametrize(("gate", "down"), PAIRS)
def test_real_card(random_case: MakeCase, gate: Kind, down: Kind, tokens: int, sparse: bool) -> None:
    try:
        device = open_device("cuda:0")
    except ResourceError as error:
        pytest.skip(str(error))
    activation = "relu" if sparse else ACTIVATIONS[gate % len(ACTIVATIONS)]
    check(device, random_case(layout_of(gate, down, 45), activation, tokens), sparse)


@pytest.mark.parametrize("hidden", [96, 576, 4096])
def test_buffers_cover_every_launch(hidden: int) -> None:
    """The buffers are sized for the largest launch, the grids for each."""
    layout = BundleLayout(hidden=hidden, ffn=3 * hidden, gate_kind=Kind.F16, down_kind=Kind.F16)
    launches = [(groups, tokens) for groups in range(1, layout.groups + 1, 7) for tokens in range(1, 130, 4)]
    rows = launch.partial_rows(layout, 129)
    for groups, tokens in launches:
        grids = launch.grids(layout, groups, tokens)
        tiles, segments, _ = grids.down
        assert tiles * 256 >= hidden
        assert grids.gate_up[0] * 8 >= groups * 32 * tokens
        assert grids.reduce[0] * 256 >= tokens * hidden
        assert segments == 1 or segments * tokens <= rows
    at = launch.workspace(layout, layout.groups, 129)
    sizes = (4 * layout.groups, 4 * layout.groups, 4 * 129 * hidden, 8, 4 * 129 * hidden, 4 * 129 * layout.groups * 32)
    assert all(start % 256 == 0 and start + size <= end for start, size, end in zip(at, sizes, at[1:], strict=False))
