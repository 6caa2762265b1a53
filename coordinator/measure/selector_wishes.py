"""Selectors as `eval` and `bench` take them: a name, and after a colon the number that says how much it computes.

exact    lowbit    lowbit:0.98    core:0.3    core|lowbit:0.3
"""

from typing import Any

from warmfront.shared.config import EngineConfig
from warmfront.shared.errors import UsageError
from warmfront.shared.selector import Source, wished_selector

__all__ = ["overrides_of"]

# The field of EngineConfig that the number is for, by what selects; of a union the first.
_NUMBERS = {Source.CORE: "keep", Source.LOWBIT: "recall"}


def overrides_of(wish: str) -> dict[str, Any]:
    """The fields of `EngineConfig` that a wish stands for; raises UsageError if it stands for none."""
    name, colon, number = wish.partition(":")
    selector, fields = wished_selector(name), {"selector": name}
    if colon:
        field = next((_NUMBERS[each] for each in _NUMBERS if selector is not None and each in selector.sources), None)
        if field is None:
            raise UsageError(f"{wish!r}: a number is for lowbit and core only, such as lowbit:0.98")
        try:
            return _checked(fields | {field: float(number)})
        except ValueError:
            raise UsageError(f"{wish!r}: {number!r} is not a number; write it like {name}:0.98") from None
    return _checked(fields)


def _checked(fields: dict[str, Any]) -> dict[str, Any]:
    EngineConfig(**fields)
    return fields
