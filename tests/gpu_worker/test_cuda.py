"""The kernels of CudaDevice against the reference: on the CPU stand-in everywhere, on a real card where there is one.

Run: pytest tests/gpu_worker/test_cuda.py            (add -m gpu on a machine with a card and CuPy)
"""

from dataclasses import replace
from types import ModuleType

import numpy as np
import pytest

from tests.activations import NAMES, SPARSE
from tests.gpu_worker.conftest import execute_many, to_panels
from tests.gpu_worker.devices import (
    PAIRS,
    MakeCase,
    assert_close,
    check,
    layout_of,
    places_of,
    real_card,
    reserve,
    several,
)
from warmfront.gpu_worker import launch
from warmfront.gpu_worker.cuda import CudaDevice
from warmfront.shared.model.formats import Kind


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
    # One for both, which are compiled once; below all are tried.
    activation = SPARSE[gate % len(SPARSE)]
    device = CudaDevice(0)
    assert device.name == "cuda:0 CPU stand-in"
    # 21 groups, 11 of them picked: two segments, one of which has fewer groups than warps.
    check(device, random_case(layout_of(gate, down, 21), activation, 2), sparse)
    assert "runtime error" not in capfd.readouterr().err


@pytest.mark.parametrize("activation", NAMES)
def test_many_tokens_on_cpu(random_case: MakeCase, cpu_cupy: ModuleType, activation: str) -> None:
    """One segment, which writes the output itself."""
    check(CudaDevice(0), random_case(layout_of(Kind.F16, Kind.Q4, 3), activation, 17), activation in SPARSE)


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
    assert execute_many(device, places_of([]), out, tokens, out) == (0, 0)
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


@pytest.mark.gpu
@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("tokens", [1, 17, 288])
@pytest.mark.parametrize(("gate", "down"), PAIRS)
def test_real_card(random_case: MakeCase, gate: Kind, down: Kind, tokens: int, sparse: bool) -> None:
    device = real_card()
    activation = SPARSE[gate % len(SPARSE)] if sparse else NAMES[gate % len(NAMES)]
    check(device, random_case(layout_of(gate, down, 33), activation, tokens), sparse)
