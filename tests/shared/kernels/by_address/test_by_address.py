"""NamedTuples by address, and kernels called by address.

Run: pytest tests/shared/kernels/by_address/test_by_address.py
"""

from typing import Any, NamedTuple

import numpy as np
import pytest

from warmfront.shared.kernels.by_address.kernels import call_at, entry_of
from warmfront.shared.kernels.by_address.records import by_address
from warmfront.shared.kernels.jit import kernel


class Inner(NamedTuple):
    ratio: float
    flag: bool
    words: Any


class Outer(NamedTuple):
    number: int
    small: Any
    inner: Inner
    table: Any
    other: Inner


@kernel
def read(record: Any, out: Any) -> None:
    inner = record.inner
    out[0], out[1], out[2] = record.number, record.small, inner.ratio
    out[3], out[4] = inner.flag, inner.words[1]
    out[5], out[6] = record.table[1, 2], record.table.shape[0]
    out[7], out[8] = record.other.flag, record.other.words.shape[0]


@kernel
def add(record: Any, first: int, count: int) -> int:
    for i in range(first, first + count):
        record.table[0, i] += record.number
    return count


@kernel
def add_twice(at: int, record: Any) -> int:
    return call_at(at, record, 0, 2) + call_at(at, record, 1, 1)


def outer() -> Outer:
    # A table that is not contiguous; an inner record that is by address itself.
    table = np.arange(24.0).reshape(4, 6)[::2, ::2]
    by_itself = by_address(Inner(0.0, True, np.zeros(7, np.uint32)))
    return Outer(-(1 << 40), np.float32(0.1), Inner(1e300, False, np.array([5, 6], np.int32)), table, by_itself)


def test_fields_are_those_of_the_tuple() -> None:
    record, out = outer(), np.zeros(9)
    struct = by_address(record)
    read(struct, out)
    expected = [-(1 << 40), np.float64(np.float32(0.1)), 1e300, 0, 6, record.table[1, 2], 2, 1, 7]
    np.testing.assert_array_equal(out, expected)
    assert struct.number == record.number
    assert struct.table is record.table


def test_kernels_are_called_by_address() -> None:
    record = by_address(outer()._replace(number=3))
    before = record.table.copy()
    assert add_twice(entry_of(add, record, 0, 0), record) == 3
    before[0] += [3, 6, 0]
    np.testing.assert_array_equal(record.table, before)


def test_what_kernels_cannot_take_is_refused() -> None:
    with pytest.raises(TypeError, match="kernels take no unicode_type by address"):
        by_address(outer()._replace(number="text"))  # type: ignore[arg-type]
