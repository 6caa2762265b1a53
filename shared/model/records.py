"""Frozen dataclasses from JSON that may be hostile: every field must be there, of exactly its annotated type."""

import reprlib
from dataclasses import is_dataclass
from types import NoneType, UnionType
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

__all__ = ["decoded"]

T = TypeVar("T")


def decoded(kind: type[T], value: Any, field: str) -> T:
    """`value`, as json.loads returns it, as a `kind`; `field` names it in errors.

    A `kind` is a dataclass, bool, int, float, str, `X | None` or `tuple[X, ...]`. A whole number is a float too; True
    is only a bool. Raises ValueError.
    """
    return _decoded(kind, value, field)  # type: ignore[no-any-return]


def _decoded(kind: Any, value: Any, field: str) -> Any:
    if is_dataclass(kind):
        return _record(kind, value, field)
    if isinstance(kind, UnionType):
        (inner,) = (option for option in get_args(kind) if option is not NoneType)
        return None if value is None else _decoded(inner, value, field)
    if get_origin(kind) is tuple:
        if type(value) is not list:
            raise _wrong(value, field, "a list")
        return tuple(_decoded(get_args(kind)[0], item, f"{field}[{i}]") for i, item in enumerate(value))
    if kind is float and type(value) is int and abs(value) < 2**53:
        return float(value)
    if type(value) is not kind:
        raise _wrong(value, field, kind.__name__)
    return value


def _record(kind: Any, value: Any, field: str) -> Any:
    if type(value) is not dict:
        raise _wrong(value, field, "an object")
    prefix = f"{field}." if field else ""
    types = get_type_hints(kind)
    for name in value:
        if name not in types:
            raise ValueError(f"field {prefix}{name} is unknown")
    for name in types:
        if name not in value:
            raise ValueError(f"field {prefix}{name} is missing")
    return kind(**{name: _decoded(types[name], value[name], f"{prefix}{name}") for name in types})


def _wrong(value: Any, field: str, expected: str) -> ValueError:
    return ValueError(f"field {field or 'spec'} is {reprlib.repr(value)}, not {expected}")
