"""The safetensors container: where the tensors of a file lie.

    u64 length | JSON {name: {"dtype", "shape", "data_offsets": [begin, end]}, "__metadata__": {text: text}} | data

A file is hostile until checked: the tensors must fill the data without gaps, as the format demands, and no name may
occur twice (JSON parsers keep the last, so readers might disagree).
"""

import json
import math
import os
from pathlib import Path
from typing import Any

from warmfront.coordinator.models.stored_tensor import StoredTensor
from warmfront.shared.errors import ModelError
from warmfront.shared.model.formats import Kind

__all__ = ["ITEM_BYTES", "KINDS", "read_safetensors"]

KINDS = {"F32": Kind.F32, "F16": Kind.F16, "BF16": Kind.BF16}
ITEM_BYTES = {"F32": 4, "F16": 2, "BF16": 2}
# The format's own limit.
MAX_HEADER_BYTES = 100_000_000


def read_safetensors(path: Path, advice: str) -> tuple[dict[str, StoredTensor[str]], dict[str, str]]:
    """The tensors of the file by name, and its metadata. Raises ModelError, with `advice`, if it is damaged."""
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            length = int.from_bytes(file.read(8), "little")
            if not 0 < length <= min(MAX_HEADER_BYTES, size - 8):
                raise ValueError(f"a header of {length} bytes does not fit")
            return _parse(path, file.read(length), size)
    except OSError as error:
        raise ModelError(f"cannot read {path}: {error.strerror}") from error
    except (RecursionError, ValueError) as error:
        raise ModelError(f"{path} is damaged ({error}); {advice}") from error


def _parse(path: Path, text: bytes, size: int) -> tuple[dict[str, StoredTensor[str]], dict[str, str]]:
    header = json.loads(text.decode(), object_pairs_hook=_unique)
    if not isinstance(header, dict):
        raise ValueError("its header is not an object")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise ValueError("its metadata are not texts")
    entries = {name: _entry(name, fields) for name, fields in header.items()}
    start = end = 8 + len(text)
    tensors = {}
    for name, (dtype, shape, begin, stop) in sorted(entries.items(), key=lambda item: item[1][2:]):
        nbytes = stop - begin
        if start + begin != end or nbytes < 0:
            raise ValueError(f"tensor {name} lies at {begin} to {stop}, where {end - start} is next")
        if dtype in KINDS and nbytes != math.prod(shape) * ITEM_BYTES[dtype]:
            raise ValueError(f"tensor {name} of shape {shape} and type {dtype} takes {nbytes} bytes")
        tensors[name] = StoredTensor(path, name, dtype, shape, end, nbytes)
        end += nbytes
    if end != size:
        raise ValueError(f"it has {size} bytes instead of {end}")
    return tensors, metadata


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(name for name in names if names.count(name) > 1)} is there twice")
    return fields


def _entry(name: str, fields: Any) -> tuple[str, tuple[int, ...], int, int]:
    """Type, shape and extent of a tensor."""
    try:
        dtype, shape, (begin, stop) = fields["dtype"], fields["shape"], fields["data_offsets"]
        good = isinstance(dtype, str) and isinstance(shape, list)
        if good and all(type(number) is int and 0 <= number < 2**63 for number in (*shape, begin, stop)):
            return dtype, tuple(shape), begin, stop
    except (KeyError, TypeError, ValueError):
        pass
    raise ValueError(f"tensor {name} is not described as a type, a shape and an extent")
