"""CudaDevice against the reference: on the CPU stand-in everywhere, on a real card where there is one.

Run: pytest tests/gpu_worker/test_cuda.py            (add -m gpu on a machine with a card and CuPy)
"""

import os
import re
import threading
from collections.abc import Callable
from dataclasses import replace
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from tests.gpu_worker.conftest import bits_of, from_panels, to_panels
from warmfront.gpu_worker import launch
from warmfront.gpu_worker.cuda import CudaDevice
from warmfront.gpu_worker.device import Device, slots_within
from warmfront.gpu_worker.open import open_device
from warmfront.shared.errors import ResourceError, UsageError
from warmfront.shared.machine.memory import create_shared, map_shared
from warmfront.shared.model.architecture import ACTIVATIONS
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


def layout_of(gate: Kind, down: Kind, groups: int) -> BundleLayout:
    return BundleLayout(hidden=288, ffn=groups * 32, gate_kind=gate, down_kind=down)


def reserve(device: Device, case: Any) -> None:
    """Three slots more than groups; group 0 in slot 0, the others from slot 2 on."""
    layout = case.layout
    device.reserve(layout, ACTIVATIONS.index(case.activation), layout.groups + 3, len(case.x))
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
    first, second = np.full((2, *case.x.shape), np.nan, np.float32)
    computed, nanoseconds = device.execute(places, case.x, sparse, first)
    assert device.execute(places, case.x, sparse, second)[0] == computed
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
    assert device.execute(places, case.x, sparse, first, mask)[0] == visited.sum()
    assert_close(first, expected)
    check_fired(device, case, sparse, picked, mask)
    assert device.execute(places[:0], case.x, sparse, first) == (0, 0)
    assert not first.any()
    device.close()
    device.close()
    assert device.allocated() == {}


def several(device: Device, case: Any, picked: list[int]) -> Any:
    """By `execute_many`, from and to panels."""
    x = to_panels(case.x)
    out = np.full_like(x, np.nan)
    computed, nanoseconds = device.execute_many(places_of(picked), x, len(case.x), out)
    assert computed == 32 * len(picked) * len(case.x)
    assert nanoseconds > 0
    return from_panels(out, len(case.x))


def check_fired(device: Device, case: Any, sparse: bool, picked: list[int], mask: Any) -> None:
    """Of the first token alone, with and without a mask."""
    x, out = case.x[:1], np.empty_like(case.x[:1])
    for given, chosen in ((None, None), (mask, bits_of(mask))):
        fired = np.full(len(picked), 0xDEADBEEF, np.uint32)
        computed, _ = device.execute(places_of(picked), x, sparse, out, given, fired)
        _, visited = case.expect(picked, sparse, chosen)
        assert (bits_of(fired) == visited[0]).all()
        assert computed == visited[0].sum()


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


@pytest.mark.parametrize(
    ("gate", "down", "tokens", "blocks"),
    [
        (Kind.F32, Kind.F32, 100, 512),
        (Kind.F16, Kind.Q4C, 33, 10),
        (Kind.Q8, Kind.Q4S, 70, 10),
        (Kind.Q4, Kind.BF16, 130, 20),
    ],
)
def test_products_on_cpu(
    random_case: MakeCase,
    cpu_cupy: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    gate: Kind,
    down: Kind,
    tokens: int,
    blocks: int,
) -> None:
    """Every number of tokens a thread has, tiles that are not full, a group or several to a segment."""
    monkeypatch.setattr(launch, "_DOWN_BLOCKS", blocks)
    case, device = random_case(layout_of(gate, down, 5), "silu", tokens), CudaDevice(0)
    reserve(device, case)
    picked = [4, 0, 3, 2]
    assert_close(several(device, case, picked), case.expect(picked, False)[0])
    out = np.full_like(to_panels(case.x), np.nan)
    assert device.execute_many(places_of([]), out, tokens, out) == (0, 0)
    assert not out.any()
    assert "runtime error" not in capfd.readouterr().err
    device.close()


def test_a_token_does_not_depend_on_those_beside_it_on_cpu(
    random_case: MakeCase, cpu_cupy: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To the bit, where the sums have no segments; and float32 is as exact as a sum in order can be."""
    monkeypatch.setattr(launch, "_DOWN_BLOCKS", 1)
    case, device = random_case(layout_of(Kind.F32, Kind.F32, 3), "relu", 40), CudaDevice(0)
    reserve(device, case)
    many = several(device, case, [0, 1, 2])
    expected = case.expect([0, 1, 2], False)[0]
    np.testing.assert_allclose(many, expected, rtol=2e-6, atol=2e-6 * np.abs(expected).max())
    few = several(device, replace(case, x=case.x[30:35]), [0, 1, 2])
    assert few.tobytes() == many[30:35].tobytes()
    device.close()


def test_staging_ring_on_cpu(random_case: MakeCase, cpu_cupy: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """More groups than both staging buffers hold."""
    monkeypatch.setattr("warmfront.gpu_worker.cuda.STAGING_BYTES", 0)
    check(CudaDevice(0), random_case(layout_of(Kind.Q8, Kind.Q8, 6), "silu", 1), False)


def test_filling_on_cpu(random_case: MakeCase, cpu_cupy: Any) -> None:
    """From the staging without another copy, one copy for each run of neighbours, on a stream of its own."""
    case = random_case(layout_of(Kind.Q8, Kind.Q4C, 9), "relu", 1)
    device = CudaDevice(0)
    reserve(device, case)
    assert device.batch == (8 << 20) // case.layout.group_bytes
    picked, size = [8, 7, 3, 4, 5], case.layout.group_bytes
    staged = device.staging(5)
    staged[:] = case.groups[picked]
    cpu_cupy.copies.clear()
    # Slots 6 and 7, then 1, then 11 and 10, which are no run.
    slots = np.array([6, 7, 1, 11, 10], np.int32)
    assert device.fill(slots, staged) > 0
    sources = [(source - staged.ctypes.data, nbytes) for _, source, nbytes, _ in cpu_cupy.copies]
    assert sources == [(0, 2 * size), (2 * size, size), (3 * size, size), (4 * size, size)]
    filling = {stream for *_, stream in cpu_cupy.copies}
    out = np.empty_like(case.x)
    device.execute(slots, case.x, True, out)
    assert_close(out, case.expect(picked, True)[0])
    assert len(filling) == 1
    assert filling.isdisjoint(stream for *_, stream in cpu_cupy.copies[4:])


def test_filling_while_computing_on_cpu(random_case: MakeCase, cpu_cupy: Any) -> None:
    fill_while_computing(CudaDevice(0), random_case(layout_of(Kind.F16, Kind.F16, 6), "relu", 1), rounds=10)


def fill_while_computing(device: Device, case: Any, rounds: int) -> None:
    """Two threads, different slots: neither sees the other."""
    reserve(device, case)
    errors: list[BaseException] = []

    def fill() -> None:
        try:
            for turn in range(rounds):
                group = turn % 6
                staged = device.staging(1)
                staged[0] = case.groups[group]
                device.fill(np.array([7], np.int32), staged)
                device.fill(np.array([8, 1], np.int32), case.groups[[group, group]])
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=fill)
    thread.start()
    expected, _ = case.expect([1, 2, 3], True)
    out = np.empty_like(case.x)
    for _ in range(rounds):
        device.execute(places_of([1, 2, 3]), case.x, True, out)
        assert_close(out, expected)
    thread.join()
    assert not errors
    device.execute(np.array([7, 8, 1], np.int32), case.x, True, out)
    assert_close(out, case.expect([(rounds - 1) % 6] * 3, True)[0])
    device.close()


@pytest.mark.parametrize("straight", [False, True])
def test_panels_of_a_pinned_board_on_cpu(
    random_case: MakeCase, cpu_cupy: Any, monkeypatch: pytest.MonkeyPatch, straight: bool
) -> None:
    """Large ones are copied from and to where they lie."""
    monkeypatch.setattr("warmfront.gpu_worker.cuda._WORTH_A_COPY", 0)
    case = random_case(layout_of(Kind.F16, Kind.F32, 3), "relu", 20)
    device = CudaDevice(0)
    reserve(device, case)
    given = to_panels(case.x)
    board = np.zeros(2 * given.nbytes, np.uint8)
    x, out = board.view(np.float32).reshape(2, *given.shape)
    x[:], out[:] = given, np.nan
    if straight:
        assert device.pin(board)
    cpu_cupy.copies.clear()
    device.execute_many(places_of([0, 2]), x, 20, out)
    assert_close(from_panels(out, 20), case.expect([0, 2], False)[0])
    assert (x.ctypes.data in [source for _, source, _, _ in cpu_cupy.copies]) == straight
    assert (out.ctypes.data in [to for to, _, _, _ in cpu_cupy.copies]) == straight
    device.close()


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("worth", [0, 1 << 30])
def test_vectors_of_a_pinned_board_on_cpu(
    random_case: MakeCase, cpu_cupy: Any, monkeypatch: pytest.MonkeyPatch, worth: int, sparse: bool
) -> None:
    """Large ones are copied from and to where they lie, small ones only where that costs no copy more."""
    monkeypatch.setattr("warmfront.gpu_worker.cuda._WORTH_A_COPY", worth)
    case = random_case(layout_of(Kind.F16, Kind.F32, 3), "relu", 1)
    device = CudaDevice(0)
    reserve(device, case)
    board = np.zeros(1 << 14, np.uint8)
    assert device.pin(board)
    assert cpu_cupy.locked == [(board.ctypes.data, 1 << 14)]
    x, out = (board[at : at + case.x.nbytes].view(np.float32).reshape(case.x.shape) for at in (128, 8192))
    x[:], out[:] = case.x, np.nan
    cpu_cupy.copies.clear()
    device.execute(places_of([0, 1, 2]), x, sparse, out)
    assert_close(out, case.expect([0, 1, 2], sparse)[0])
    from_board = [source for _, source, _, _ in cpu_cupy.copies if source == x.ctypes.data]
    to_board = [to for to, _, _, _ in cpu_cupy.copies if to == out.ctypes.data]
    assert len(from_board) == (worth == 0)
    assert len(to_board) == (worth == 0 or not sparse)
    assert len(cpu_cupy.copies) == 2 + (worth == 0) * (1 + sparse)
    device.close()
    assert cpu_cupy.locked == []


def test_a_board_that_cannot_be_pinned_on_cpu(random_case: MakeCase, cpu_cupy: Any) -> None:
    case = random_case(layout_of(Kind.F16, Kind.F32, 3), "relu", 1)
    device = CudaDevice(0)
    reserve(device, case)
    cpu_cupy.cuda.runtime.hostRegister = fail
    out = np.full(case.x.shape, np.nan, np.float32)
    assert not device.pin(out.view(np.uint8).reshape(-1))
    device.execute(places_of([0, 2]), case.x, False, out)
    assert_close(out, case.expect([0, 2], False)[0])
    device.close()


def fail(*_arguments: object) -> None:
    raise RuntimeError("cudaErrorIllegalAddress: an illegal memory access\nwas encountered")


def test_errors_of_the_device_on_cpu(random_case: MakeCase, cpu_cupy: Any) -> None:
    """One line of ours; afterwards the device can be closed, though its calls fail."""
    case = random_case(layout_of(Kind.F16, Kind.F32, 3), "relu", 1)
    device = CudaDevice(0)
    reserve(device, case)
    assert device.pin(np.zeros(4096, np.uint8))
    cpu_cupy.cuda.runtime.memcpyAsync = cpu_cupy.cuda.runtime.hostUnregister = fail
    line = "^cuda:0 CPU stand-in: cannot {} the device: cudaErrorIllegalAddress: an illegal memory access$"
    with pytest.raises(ResourceError, match=line.format("write to")):
        device.fill(np.array([1], np.int32), case.groups[:1])
    with pytest.raises(ResourceError, match=line.format("compute on")):
        device.execute(places_of([0]), case.x, False, np.empty_like(case.x))
    device.close()
    device.close()
    assert device.allocated() == {}


@pytest.mark.parametrize("most", [1, 5, 40])
def test_slots_within_a_budget_on_cpu(cpu_cupy: Any, most: int) -> None:
    """The ledger of one slot more would not fit; it does not grow evenly."""
    device, layout = CudaDevice(0), layout_of(Kind.Q4, Kind.Q4, 8)
    sums = [sum(device.ledger(layout, slots, 16).values()) for slots in range(most + 1)]
    for budget in range(sums[1], sums[-1] + 9000, 4001):
        best = max(slots for slots in range(1, most + 1) if sums[slots] <= budget)
        assert slots_within(device, layout, budget, 16, most) == best
    with pytest.raises(UsageError) as refusal:
        slots_within(device, layout, sums[1] - 1, 16, most)
    # What it says is needed is enough.
    stated = re.fullmatch(
        r"a VRAM budget of [\d.]+ MB holds no group of neurons \((\d\.\d) MB are needed at least\): "
        "pass a larger --vram-budget, or --gpu none",
        str(refusal.value),
    )
    assert stated
    assert sums[1] <= float(stated[1]) * 1e6 < sums[1] + 1e5


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


def real_card() -> Device:
    try:
        return open_device("cuda:0")
    except ResourceError as error:
        pytest.skip(str(error))


@pytest.mark.gpu
@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("tokens", [1, 17, 288])
@pytest.mark.parametrize(("gate", "down"), PAIRS)
def test_real_card(random_case: MakeCase, gate: Kind, down: Kind, tokens: int, sparse: bool) -> None:
    device = real_card()
    activation = "relu" if sparse else ACTIVATIONS[gate % len(ACTIVATIONS)]
    check(device, random_case(layout_of(gate, down, 33), activation, tokens), sparse)


@pytest.mark.gpu
def test_real_card_is_filled_while_it_computes(random_case: MakeCase) -> None:
    fill_while_computing(real_card(), random_case(layout_of(Kind.F16, Kind.F16, 6), "relu", 1), rounds=1000)


@pytest.mark.gpu
@pytest.mark.parametrize("worth", [0, 1 << 30])
def test_real_card_with_a_pinned_board(random_case: MakeCase, monkeypatch: pytest.MonkeyPatch, worth: int) -> None:
    monkeypatch.setattr("warmfront.gpu_worker.cuda._WORTH_A_COPY", worth)
    device, case = real_card(), random_case(layout_of(Kind.F16, Kind.F32, 3), "relu", 1)
    reserve(device, case)
    fd = create_shared("test-board", 1 << 14)
    board = map_shared(fd)
    os.close(fd)
    assert device.pin(board)
    x, out = (board[at : at + case.x.nbytes].view(np.float32).reshape(case.x.shape) for at in (128, 8192))
    x[:] = case.x
    for sparse in (False, True):
        device.execute(places_of([0, 1, 2]), x, sparse, out)
        assert_close(out, case.expect([0, 1, 2], sparse)[0])
    device.close()


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
        many = launch.many_grids(layout, groups, tokens)
        columns, segments, tiles = many.down
        assert columns * 64 >= hidden
        assert many.gate_up == (groups, tiles, 1)
        assert 1 <= many.per <= 4
        assert tiles * 32 * many.per >= tokens
        padded = -(-tokens // 16) * 16
        assert many.reduce[0] * 256 >= padded * hidden
        assert 1 <= segments == many.segments <= groups
        assert segments == 1 or segments * padded <= rows
    at = launch.workspace(layout, layout.groups, 129)
    pairs = 144 * layout.groups * 32
    sizes = (4 * layout.groups, 4 * layout.groups, 4 * 144 * hidden, pairs, 4 * 144 * hidden, 4 * pairs)
    assert all(start % 256 == 0 and start + size <= end for start, size, end in zip(at, sizes, at[1:], strict=False))
