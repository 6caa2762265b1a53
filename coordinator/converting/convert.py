"""`warmfront convert`: a GGUF file or a Hugging Face folder as a GGUF file in the weight types wished for.

What has the wished type already is copied byte for byte, and what has 4 bits is not rounded again. Only matrices are
rounded; norms, biases, routers and whatever else a file has stay as they are. One matrix is in memory at a time.
"""

import math
import re
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import gguf
import numpy as np
import numpy.typing as npt
from gguf import GGMLQuantizationType as Type

from warmfront.coordinator.converting.folder import ARCHITECTURES, fields_of, rotary_of, tensors_of
from warmfront.coordinator.models.find import find_model
from warmfront.coordinator.models.gguf.blocks import blocks_of, type_of
from warmfront.coordinator.models.gguf.file import GgufFile
from warmfront.coordinator.models.gguf.reader import GgufSource, GgufTensor
from warmfront.coordinator.models.open import open_source
from warmfront.coordinator.models.parts import parts_of
from warmfront.coordinator.models.source import Source, SourceTensor
from warmfront.coordinator.models.stored_tensor import StoredTensor
from warmfront.coordinator.packing.packer import FITTED, kind_for
from warmfront.shared.errors import ModelError, ResourceError, UsageError
from warmfront.shared.files import published
from warmfront.shared.model.formats import BLOCK, FLOATS, Kind

__all__ = ["convert"]

Bytes = npt.NDArray[np.uint8]
# The matrices that are rounded; stacks of experts too.
_MATRIX = re.compile(
    r"(token_embd|output|blk\.\d+\.(attn_(q|k|v|qkv|output)|ffn_(gate|up|down)(_exps|_shexp)?))\.weight"
)


class _Tensor(NamedTuple):
    """A tensor to write: `data` makes its bytes."""

    name: str
    shape: tuple[int, ...]
    type: Type
    data: Callable[[], Bytes]


def convert(
    model: str, dtype: str, out: Path, say: Callable[[str], None], progress: Callable[[str, int, int], None]
) -> str:
    """Write the model `model` (as `find_model` takes it) to `out`; returns a line about it.

    Raises UsageError for a wrong request, ModelError for a model that cannot be read or written, ResourceError if there
    is no room.
    """
    if dtype == FITTED:
        raise UsageError("q4f fits the weights of the packed model only: a GGUF file takes --dtype q4")
    path = find_model(model, say, progress)
    if out.exists() and out.resolve() == path.resolve():
        raise UsageError(f"{out} is the model itself: name another file")
    source = open_source(path)
    if isinstance(source, GgufSource):
        architecture, fields = _fields_of_file(path)
        tensors = [*_tensors_of_file(path, dtype)]
    else:
        fields = {key: (value, None, None) for key, value in fields_of(source).items()}
        architecture = ARCHITECTURES[source.spec.family]
        tensors = [*_tensors_of_folder(source, dtype)]
    fields["general.quantization_version"] = (gguf.GGML_QUANT_VERSION, None, None)
    fields["general.file_type"] = (_file_type(tensors), None, None)
    try:
        with published(out) as fd:
            # The writer opens a path: that of the file, which has no name yet.
            _write(Path(f"/proc/self/fd/{fd}"), architecture, fields, tensors, lambda *done: progress("writing", *done))
    except OSError as error:
        # numpy's say what is wrong, and have no number.
        raise ResourceError(f"cannot write {out}: {error.strerror or error}") from error
    nbytes, weights = out.stat().st_size, sum(math.prod(tensor.shape) for tensor in tensors)
    bits = 8 * sum(_size(tensor) for tensor in tensors) / weights
    return f"{out}: {nbytes / 1e6:.1f} MB, {len(tensors)} tensors, {bits:.2f} bits a weight"


def _write(
    path: Path, architecture: str, fields: dict[str, Any], tensors: list[_Tensor], progress: Callable[[int, int], None]
) -> None:
    writer = gguf.GGUFWriter(path, architecture)
    try:
        for key, (value, kind, item) in fields.items():
            writer.add_key_value(key, value, _kind_of(value) if kind is None else kind, item)
        for tensor in tensors:
            shape = gguf.quant_shape_to_byte_shape(tensor.shape, tensor.type)
            writer.add_tensor_info(tensor.name, shape, np.dtype(np.uint8), _size(tensor), tensor.type)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        done, total = 0, sum(map(_size, tensors))
        for tensor in tensors:
            progress(done, total)
            writer.write_tensor_data(tensor.data().reshape(-1))
            done += _size(tensor)
        progress(total, total)
    finally:
        writer.close()


def _size(tensor: _Tensor) -> int:
    block, nbytes = gguf.GGML_QUANT_SIZES[tensor.type]
    return int(math.prod(tensor.shape) // block * nbytes)


def _file_type(tensors: list[_Tensor]) -> int:
    """`general.file_type`: the type of most bytes, which programs show to their users."""
    sizes = Counter[Type]()
    for tensor in tensors:
        sizes[tensor.type] += _size(tensor)
    most = sizes.most_common(1)[0][0].name
    names = (f"MOSTLY_{most}", f"MOSTLY_{most}_M", f"ALL_{most}")
    known: dict[str, int] = {name: int(number) for name, number in gguf.LlamaFileType.__members__.items()}
    return next((known[name] for name in names if name in known), known["GUESSED"])


def _kind_of(value: Any) -> gguf.GGUFValueType:
    """The type of a field; whole numbers are unsigned."""
    if isinstance(value, int) and not isinstance(value, bool):
        return gguf.GGUFValueType.UINT32
    return gguf.GGUFValueType.get_type(value)


def _fields_of_file(path: Path) -> tuple[str, dict[str, Any]]:
    """The architecture and the other fields of a file, with their types."""
    reader = gguf.GGUFReader(path)
    fields = {}
    for key, field in reader.fields.items():
        if not key.startswith(("GGUF.", "split.")) and key != "general.file_type":
            item = field.types[1] if len(field.types) > 1 else None
            fields[key] = (field.contents(), field.types[0], item)
    return fields.pop("general.architecture")[0], fields


def _tensors_of_file(path: Path, dtype: str) -> Iterator[_Tensor]:
    files = [GgufFile(part) for part in parts_of(path)]
    if files[0].powerinfer:
        raise ModelError(f"{path} is PowerInfer's, whose tensors llama.cpp does not know; it cannot be written")
    for file in files:
        for name, stored in file.tensors.items():
            tensor = GgufTensor(stored) if _MATRIX.fullmatch(name) else None
            kind = None if tensor is None else _kind(tensor, dtype)
            if tensor is None or kind is None or kind == tensor.kind:
                yield _Tensor(name, stored.shape, stored.type, stored.rows)
            else:
                yield _Tensor(name, stored.shape, type_of(kind), _rounded(stored, kind))


def _rounded(stored: StoredTensor[Type], kind: Kind) -> Callable[[], Bytes]:
    """The rows of a matrix, or of a stack of them."""
    if len(stored.shape) == 2:
        return lambda: blocks_of(GgufTensor(stored).packed(kind), kind, stored.shape[-1])
    items = range(stored.shape[0])
    return lambda: np.concatenate(
        [blocks_of(GgufTensor(stored.item(i)).packed(kind), kind, stored.shape[-1]) for i in items]
    )


def _tensors_of_folder(source: Source, dtype: str) -> Iterator[_Tensor]:
    for name, tensor in tensors_of(source):
        kind = _kind(tensor, dtype) if _MATRIX.fullmatch(name) else Kind.F32
        kind = Kind.F16 if kind is None else kind
        yield _Tensor(name, tensor.shape, type_of(kind), _of_folder(tensor, kind))
    _, divisor = rotary_of(source)
    if divisor is not None:
        factors = divisor.astype(np.float32)
        yield _Tensor("rope_freqs.weight", factors.shape, Type.F32, lambda: factors.view(np.uint8))


def _of_folder(tensor: SourceTensor, kind: Kind) -> Callable[[], Bytes]:
    if len(tensor.shape) == 1:
        return lambda: tensor.float32().view(np.uint8)
    return lambda: blocks_of(tensor.packed(kind), kind, tensor.shape[1])


def _kind(tensor: SourceTensor, dtype: str) -> Kind | None:
    """The weight type of a matrix; None if its rows cannot be cut into blocks of that."""
    kind = kind_for(tensor, dtype)
    return None if kind not in FLOATS and tensor.shape[-1] % BLOCK else kind
