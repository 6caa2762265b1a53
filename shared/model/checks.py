"""Checks of what a description says; each raises ValueError with a message of one line."""

import reprlib
from collections.abc import Sequence

import numpy as np

__all__ = ["MAX_FLOAT", "check_count", "check_name", "check_parts", "check_positive"]

# Sizes are `int` in the CUDA kernels.
_MAX_COUNT = 2**31 - 1
# Above zero and finite in float32, which the passes compute with.
_MIN_FLOAT, MAX_FLOAT = float(np.finfo(np.float32).tiny), float(np.finfo(np.float32).max)


def check_count(what: str, value: int, low: int = 1, high: int = _MAX_COUNT) -> None:
    """Raise ValueError unless `value` is from `low` to `high`."""
    if not low <= value <= high:
        raise ValueError(f"{what} is {value}, not a whole number from {low} to {high}")


def check_positive(what: str, value: float) -> None:
    """Raise ValueError unless `value` is above zero and finite in float32."""
    if not _MIN_FLOAT <= value <= MAX_FLOAT:
        raise ValueError(f"{what} is {value}, not a positive number")


def check_name(what: str, value: str, known: Sequence[str]) -> None:
    """Raise ValueError unless `value` is one of `known`."""
    if value not in known:
        raise ValueError(f"{what} is {reprlib.repr(value)}, not one of {', '.join(known)}")


def check_parts(what: str, parts: tuple[str, ...], known: Sequence[str]) -> None:
    """Raise ValueError unless `parts` are of `known` and in its order: equal models have equal descriptions."""
    if parts != tuple(part for part in known if part in parts):
        raise ValueError(f"{what} are {reprlib.repr(parts)}, not some of {', '.join(known)}")
