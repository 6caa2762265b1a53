"""How CudaDevice moves groups and vectors, and what it says when the device fails; see test_cuda.py.

Run: pytest tests/gpu_worker/test_cuda_memory.py
"""

import os
import threading
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from tests.activations import described
from tests.gpu_worker.conftest import execute, from_panels, to_panels, units
from tests.gpu_worker.devices import MakeCase, assert_close, check, layout_of, places_of, real_card, reserve
from warmfront.gpu_worker.cuda import CudaDevice
from warmfront.gpu_worker.device import Device
from warmfront.shared.errors import ResourceError
from warmfront.shared.machine.memory import create_shared, map_shared
from warmfront.shared.model.formats import Kind


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
    execute(device, slots, case.x, True, out)
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
        execute(device, places_of([1, 2, 3]), case.x, True, out)
        assert_close(out, expected)
    thread.join()
    assert not errors
    execute(device, np.array([7, 8, 1], np.int32), case.x, True, out)
    assert_close(out, case.expect([(rounds - 1) % 6] * 3, True)[0])
    device.close()


@pytest.mark.gpu
def test_real_card_is_filled_while_it_computes(random_case: MakeCase) -> None:
    fill_while_computing(real_card(), random_case(layout_of(Kind.F16, Kind.F16, 6), "relu", 1), rounds=1000)


@pytest.mark.parametrize("straight", [False, True])
def test_panels_of_a_pinned_board_on_cpu(
    random_case: MakeCase, cpu_cupy: Any, monkeypatch: pytest.MonkeyPatch, straight: bool
) -> None:
    """Large ones are copied from where they lie; sums are rounded on their way to the board, never copied there."""
    monkeypatch.setattr("warmfront.gpu_worker.cuda._WORTH_A_COPY", 0)
    case = random_case(layout_of(Kind.F16, Kind.F32, 3), "relu", 20)
    device = CudaDevice(0)
    reserve(device, case)
    given = to_panels(case.x)
    board = np.zeros(3 * given.nbytes, np.uint8)
    x = board[: given.nbytes].view(np.float32).reshape(given.shape)
    out = board[given.nbytes :].view(np.int64).reshape(given.shape)
    x[:], out[:] = given, -1
    if straight:
        assert device.pin(board)
    cpu_cupy.copies.clear()
    device.execute_many(places_of([0, 2]), x, units(32), 20, out)
    sums = from_panels(out, 20) / units(20)[:, None].astype(np.float64)
    assert_close(sums, case.expect([0, 2], False)[0])
    assert (x.ctypes.data in [source for _, source, _, _ in cpu_cupy.copies]) == straight
    assert out.ctypes.data not in [to for to, _, _, _ in cpu_cupy.copies]
    assert len(cpu_cupy.copies) == 2 + straight
    device.close()


def vectors_on(board: np.ndarray, case: Any) -> tuple[np.ndarray, np.ndarray]:
    """Room for x and for the sums on a board."""
    x, out = board[128:].view(np.float32), board[8192:].view(np.int64)
    return x[: case.x.size].reshape(case.x.shape), out[: case.x.size].reshape(case.x.shape)


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("worth", [0, 1 << 30])
def test_vectors_of_a_pinned_board_on_cpu(
    random_case: MakeCase, cpu_cupy: Any, monkeypatch: pytest.MonkeyPatch, worth: int, sparse: bool
) -> None:
    """Large ones are copied from where they lie; the sums come with what tells which neurons fired."""
    monkeypatch.setattr("warmfront.gpu_worker.cuda._WORTH_A_COPY", worth)
    case = random_case(layout_of(Kind.F16, Kind.F32, 3), "relu", 1)
    device = CudaDevice(0)
    reserve(device, case)
    board = np.zeros(1 << 14, np.uint8)
    assert device.pin(board)
    assert cpu_cupy.locked == [(board.ctypes.data, 1 << 14)]
    x, out = vectors_on(board, case)
    x[:], out[:] = case.x, -1
    cpu_cupy.copies.clear()
    device.execute(places_of([0, 1, 2]), x, units(1), sparse, out)
    assert_close(out / float(units(1)[0]), case.expect([0, 1, 2], sparse)[0])
    from_board = [source for _, source, _, _ in cpu_cupy.copies if source == x.ctypes.data]
    assert len(from_board) == (worth == 0)
    assert out.ctypes.data not in [to for to, _, _, _ in cpu_cupy.copies]
    assert len(cpu_cupy.copies) == 2 + (worth == 0)
    device.close()
    assert cpu_cupy.locked == []


def test_a_board_that_cannot_be_pinned_on_cpu(random_case: MakeCase, cpu_cupy: Any) -> None:
    case = random_case(layout_of(Kind.F16, Kind.F32, 3), "relu", 1)
    device = CudaDevice(0)
    reserve(device, case)
    cpu_cupy.cuda.runtime.hostRegister = fail
    out = np.full(case.x.shape, -1, np.int64)
    assert not device.pin(out.view(np.uint8).reshape(-1))
    device.execute(places_of([0, 2]), case.x, units(1), False, out)
    assert_close(out / float(units(1)[0]), case.expect([0, 2], False)[0])
    device.close()


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
    x, out = vectors_on(board, case)
    x[:] = case.x
    for sparse in (False, True):
        device.execute(places_of([0, 1, 2]), x, units(1), sparse, out)
        assert_close(out / float(units(1)[0]), case.expect([0, 1, 2], sparse)[0])
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
        execute(device, places_of([0]), case.x, False, np.empty_like(case.x))
    device.close()
    device.close()
    assert device.allocated() == {}


def test_too_many_slots_on_cpu(cpu_cupy: ModuleType) -> None:
    layout = layout_of(Kind.F32, Kind.F32, 8)
    with pytest.raises(ResourceError, match=r"cuda:0 CPU stand-in: 1000 slots need .* MiB, 64.0 MiB are free"):
        CudaDevice(0).reserve(layout, described("silu"), 1000, 1)
