"""What policies are told.  pytest tests/coordinator/balancing/test_interface.py"""

import pytest

from warmfront.coordinator.balancing.interface import copy_budget


@pytest.mark.parametrize(
    ("until_next_ns", "in_flight", "budget"), [(100e6, 0, 25), (100e6, 9, 16), (1e6, 0, 16), (1e6, 20, 0)]
)
def test_copies_get_a_quarter_of_the_time_or_a_batch(until_next_ns: float, in_flight: int, budget: int) -> None:
    assert copy_budget(until_next_ns, 1e6, in_flight) == budget
