"""How many slots fit a budget.  pytest tests/gpu_worker/test_device.py"""

import re
from typing import Any

import pytest

from tests.gpu_worker.devices import layout_of
from warmfront.gpu_worker.cuda import CudaDevice
from warmfront.gpu_worker.device import slots_within
from warmfront.shared.errors import UsageError
from warmfront.shared.model.formats import Kind


@pytest.mark.parametrize("max_slots", [1, 5, 40])
def test_slots_within_a_budget_on_cpu(cpu_cupy: Any, max_slots: int) -> None:
    """The ledger of one slot more would not fit; it does not grow evenly."""
    device, layout = CudaDevice(0), layout_of(Kind.Q4, Kind.Q4, 8)
    sums = [sum(device.ledger(layout, slots, 16).values()) for slots in range(max_slots + 1)]
    for budget in range(sums[1], sums[-1] + 9000, 4001):
        best = max(slots for slots in range(1, max_slots + 1) if sums[slots] <= budget)
        assert slots_within(device, layout, budget, 16, max_slots) == best
    with pytest.raises(UsageError) as refusal:
        slots_within(device, layout, sums[1] - 1, 16, max_slots)
    # What it says is needed is enough.
    stated = re.fullmatch(
        r"a VRAM budget of [\d.]+ MB holds no group of neurons \((\d\.\d) MB are needed at least\): "
        "pass a larger --vram-budget, or --gpu none",
        str(refusal.value),
    )
    assert stated
    assert sums[1] <= float(stated[1]) * 1e6 < sums[1] + 1e5
