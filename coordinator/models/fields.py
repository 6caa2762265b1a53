"""Fields of a model's settings, JSON or GGUF, checked before they are used; errors name the file and the field."""

import reprlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from warmfront.shared.errors import ModelError

__all__ = ["Fields", "faults_of"]

T = TypeVar("T")

MAX_COUNT = 2**31 - 1
FLOAT32 = np.finfo(np.float32)
# How GGUF files say that there is no such token: -1, sometimes read as unsigned.
NO_TOKEN = (-1, 2**32 - 1)


class Fields:
    """Values by key. Null counts as absent. For an absent field without a default, ModelError is raised."""

    def __init__(self, path: Path, values: Mapping[str, Any], prefix: str = "") -> None:
        self.path = path
        self._values = values
        self._prefix = prefix

    def __contains__(self, key: str) -> bool:
        return self._values.get(key) is not None

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def holds(self, key: str, kind: type) -> bool:
        """Whether the field is of that type, where several are allowed."""
        return isinstance(self._values.get(key), kind)

    def wrong(self, key: str, expected: str) -> ModelError:
        """The error for a field that is present but not as `expected`."""
        value = reprlib.repr(self._values.get(key))
        return ModelError(f"{self.path}: field {self._prefix}{key} is {value}, not {expected}")

    def _get(self, key: str, default: T | None, expected: str, good: Callable[[Any], bool]) -> Any:
        value = self._values.get(key)
        if value is None:
            if default is None:
                raise ModelError(f"{self.path}: field {self._prefix}{key} is missing; the model is incomplete")
            return default
        if not good(value):
            raise self.wrong(key, expected)
        return value

    def count(self, key: str, default: int | None = None, *, low: int = 1) -> int:
        """A whole number from `low` on."""
        value = self._get(key, default, f"a whole number from {low} to {MAX_COUNT}", _whole(low, MAX_COUNT))
        return int(value)

    def number(self, key: str, default: float | None = None) -> float:
        """A number of any kind."""
        return float(self._get(key, default, "a number", _real))

    def positive(self, key: str, default: float | None = None) -> float:
        """A number above zero that float32 can hold."""
        low, high = float(FLOAT32.tiny), float(FLOAT32.max)
        return float(self._get(key, default, "a positive number", lambda v: _real(v) and low <= v <= high))

    def flag(self, key: str, default: bool) -> bool:
        """A truth value."""
        return bool(self._get(key, default, "true or false", _is(bool)))

    def text(self, key: str, default: str | None = None) -> str:
        """A text."""
        return str(self._get(key, default, "a text", _is(str)))

    def under(self, prefix: str) -> "Fields":
        """The fields whose keys begin with `prefix`, without it."""
        values = {key.removeprefix(prefix): value for key, value in self._values.items() if key.startswith(prefix)}
        return Fields(self.path, values, prefix)

    def in_words(self, words: Mapping[str, str], **usual: Any) -> "Fields":
        """The same under other keys too, `words[key]`, and with what is `usual` where there is nothing else."""
        there = {key: value for key, value in self._values.items() if value is not None}
        renamed = {word: there[key] for key, word in words.items() if key in there}
        return Fields(self.path, {**usual, **there, **renamed}, self._prefix)

    def section(self, key: str) -> "Fields":
        """The fields of an object within this one; no fields if it is absent."""
        values = self._get(key, {}, "an object", _is(dict))
        return Fields(self.path, values, f"{self._prefix}{key}.")

    def sections(self, key: str) -> list["Fields"]:
        """The fields of each object of a list."""
        values = self._get(key, None, "a list of objects", _list_of(_is(dict)))
        return [Fields(self.path, item, f"{self._prefix}{key}[{i}].") for i, item in enumerate(values)]

    def items(self, key: str) -> list["str | Fields"]:
        """The texts and objects of a list; none if it is absent or an object."""
        if self.holds(key, dict):
            return []
        values = self._get(key, [], "a list of texts and objects", _list_of(lambda v: isinstance(v, (str, dict))))
        return [
            Fields(self.path, v, f"{self._prefix}{key}[{i}].") if isinstance(v, dict) else v
            for i, v in enumerate(values)
        ]

    def updated(self, other: "Fields | None") -> "Fields":
        """These fields, and those of another file in their place."""
        return self if other is None else Fields(other.path, {**self._values, **other._values}, self._prefix)

    def token(self, key: str, vocab: int, default: int | None = None) -> int | None:
        """The id of a token of a GGUF file; None if there is none."""
        value = self._values.get(key, default)
        if value is None or (isinstance(value, int) and value in NO_TOKEN):
            return None
        if not _whole(0, vocab - 1)(value):
            raise self.wrong(key, f"a token id below {vocab}")
        return int(value)

    def tokens(self, key: str, vocab: int) -> list[int]:
        """The ids of a list or of a single token."""
        good = _whole(0, vocab - 1)
        expected = f"a token id below {vocab} or a list of them"
        value = self._get(key, [], expected, lambda v: good(v) or _list_of(good)(v))
        return value if isinstance(value, list) else [value]

    def whole_numbers(self, key: str) -> list[int]:
        """A list of whole numbers from 0 on; none if it is absent."""
        value = self._get(key, [], "a list of whole numbers", _list_of(_whole(0, MAX_COUNT)))
        return list(value)

    def texts(self, key: str) -> list[str]:
        """A list of texts."""
        value = self._get(key, None, "a list of texts", _list_of(_is(str)))
        return list(value)

    def numbers(self, key: str, length: int, default: list[int] | None = None) -> list[Any]:
        """A list of `length` finite numbers."""

        def good(value: Any) -> bool:
            array = np.asarray(value)
            return array.shape == (length,) and array.dtype.kind in "iuf" and bool(np.isfinite(array).all())

        return list(np.asarray(self._get(key, default, f"a list of {length} numbers", good)).tolist())


@contextmanager
def faults_of(path: Path) -> Iterator[None]:
    """Turn a ValueError of the block, about a value that no model can have, into a ModelError naming `path`."""
    try:
        yield
    except ValueError as error:
        raise ModelError(f"{path}: {error}") from error


def _is(kind: type) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, kind)


def _list_of(good: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, list) and all(map(good, value))


def _real(value: Any) -> bool:
    return isinstance(value, float) or _whole(-(2**63), 2**64)(value)


def _whole(low: int, high: int) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, int) and not isinstance(value, bool) and low <= value <= high
