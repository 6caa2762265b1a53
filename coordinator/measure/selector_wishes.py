"""Selectors as `eval` and `bench` take them: a name, and after a colon the number that says how much it computes, such
as exact, lowbit:0.98 (of that recall), core:0.4 or core|lowbit:0.4 (a core of that share of the neurons).
"""

from typing import Any

from warmfront.shared.config import EngineConfig
from warmfront.shared.errors import UsageError

__all__ = ["overrides_of"]

# The field of EngineConfig that the number is for.
_NUMBERS = {"lowbit": "recall", "core": "keep", "core|lowbit": "keep", "core|lowrank": "keep"}


def overrides_of(wish: str) -> dict[str, Any]:
    """The fields of `EngineConfig` that a wish stands for; raises UsageError if it stands for none."""
    name, colon, number = wish.partition(":")
    fields: dict[str, Any] = {"selector": name}
    if colon:
        if name not in _NUMBERS:
            raise UsageError(f"{wish!r}: a number is for {', '.join(_NUMBERS)} only, such as lowbit:0.98")
        try:
            fields[_NUMBERS[name]] = float(number)
        except ValueError:
            raise UsageError(f"{wish!r}: {number!r} is not a number; write it like {name}:0.98") from None
    EngineConfig(**fields)
    return fields
