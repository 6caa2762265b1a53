"""State dicts and tensors that torch.save has written, read without torch and without running anything of the file.

    zip of stored members: NAME/data.pkl, a pickle of {name: tensor} or of a tensor; NAME/data/KEY, a storage's numbers

Of the pickle only what describes tensors is understood; a reference to any other class or function is an error, so
that nothing of the file is ever called.
"""

import io
import math
import pickle
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from warmfront.coordinator.models.stored_tensor import StoredTensor
from warmfront.shared.errors import ModelError

__all__ = ["NUMBERS", "read_state_dict", "read_tensor"]

# A state dict of a few matrices takes about a kilobyte.
MAX_PICKLE_BYTES = 1 << 20
STORAGES = {
    "FloatStorage": "F32",
    "HalfStorage": "F16",
    "BFloat16Storage": "BF16",
    "DoubleStorage": "F64",
    "IntStorage": "I32",
    "LongStorage": "I64",
}
# Numbers by the name of their type, as safetensors calls it; numpy has no bfloat16, whose bits these are.
NUMBERS = {
    name: np.dtype(f"<{code}")
    for name, code in zip(STORAGES.values(), ("f4", "f2", "u2", "f8", "i4", "i8"), strict=True)
}
LOCAL_HEADER = struct.Struct("<26xHH")


class _Storage(NamedTuple):
    type: str
    key: str
    numbers: int


class _Tensor(NamedTuple):
    storage: _Storage
    offset: int
    shape: tuple[int, ...]


def read_state_dict(path: Path) -> dict[str, StoredTensor[str]]:
    """The tensors of the file by name. Raises ModelError if it is damaged, or not plainly a state dict."""
    return _read(path, "state dict")


def read_tensor(path: Path) -> StoredTensor[str]:
    """The one tensor of the file. Raises ModelError if it is damaged, or not plainly a tensor."""
    return _read(path, "tensor")[""]


def _read(path: Path, what: str) -> dict[str, StoredTensor[str]]:
    """The tensors of a "state dict", or a lone "tensor" by an empty name."""
    try:
        with zipfile.ZipFile(path) as archive, path.open("rb") as file:
            (index,) = (info for info in archive.infolist() if info.filename.endswith("/data.pkl"))
            if index.file_size > MAX_PICKLE_BYTES:
                raise ValueError(f"its index has {index.file_size} bytes")
            found = _Reader(io.BytesIO(archive.read(index))).load()
            if what == "tensor":
                found = {"": found}
            if not isinstance(found, dict) or not all(isinstance(tensor, _Tensor) for tensor in found.values()):
                raise ValueError(f"it holds something other than {'named tensors' if what != 'tensor' else 'one'}")
            base = index.filename.removesuffix("data.pkl")
            return {str(name): _placed(path, str(name), tensor, archive, file, base) for name, tensor in found.items()}
    except OSError as error:
        raise ModelError(f"cannot read {path}: {error.strerror}") from error
    except Exception as error:  # of what a damaged zip or pickle raises there is no list
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise ModelError(f"{path} is not a plain {what} ({reason}); save the weights alone, by torch.save") from error


def _placed(
    path: Path, name: str, tensor: _Tensor, archive: zipfile.ZipFile, file: Any, base: str
) -> StoredTensor[str]:
    """Where the numbers of a tensor lie in the file."""
    member, item = archive.getinfo(f"{base}data/{tensor.storage.key}"), NUMBERS[tensor.storage.type].itemsize
    count = math.prod(tensor.shape)
    if member.compress_type != zipfile.ZIP_STORED or member.flag_bits & 1:
        raise ValueError(f"{member.filename} is compressed or encrypted")
    if member.file_size != tensor.storage.numbers * item or tensor.offset + count > tensor.storage.numbers:
        raise ValueError(f"{name} does not fit its storage")
    file.seek(member.header_offset)
    lengths = LOCAL_HEADER.unpack(file.read(LOCAL_HEADER.size))
    start = member.header_offset + LOCAL_HEADER.size + sum(lengths)
    return StoredTensor(path, name, tensor.storage.type, tensor.shape, start + tensor.offset * item, count * item)


def _rebuilt(storage: Any, offset: Any, shape: Any, stride: Any, *_rest: Any) -> _Tensor:
    """What torch._utils._rebuild_tensor_v2 is called with."""
    good = isinstance(storage, _Storage) and isinstance(shape, tuple) and shape != ()
    numbers = (offset, *shape, *stride) if good else (-1,)
    if not all(type(number) is int and 0 <= number < 1 << 40 for number in numbers):
        raise ValueError("a tensor is not described by whole numbers")
    steps = tuple(math.prod(shape[i + 1 :]) for i in range(len(shape)))
    if any(step != want for step, want, size in zip(stride, steps, shape, strict=True) if size > 1):
        raise ValueError("a tensor is a view of another")
    return _Tensor(storage, offset, shape)


_KNOWN: dict[tuple[str, str], Callable[..., Any] | str] = {
    ("collections", "OrderedDict"): OrderedDict,
    ("torch._utils", "_rebuild_tensor_v2"): _rebuilt,
    **{("torch", name): kind for name, kind in STORAGES.items()},
}


# The one written in Python: the other takes memory for as many objects as a hostile file says that it remembers.
class _Reader(pickle._Unpickler):  # type: ignore[name-defined, misc, unused-ignore]
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _KNOWN:
            raise ValueError(f"it refers to {module}.{name}")
        return _KNOWN[module, name]

    def persistent_load(self, pid: Any) -> _Storage:
        if isinstance(pid, tuple) and len(pid) == 5:
            kind, storage, key, _, numbers = pid
            if kind == "storage" and storage in STORAGES.values() and isinstance(key, str) and type(numbers) is int:
                return _Storage(storage, key, numbers)
        raise ValueError("a storage is not described as one")
