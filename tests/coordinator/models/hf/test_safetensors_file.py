"""The safetensors container against the library, and hostile files.

pytest tests/coordinator/models/hf/test_safetensors_file.py
"""

import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from warmfront.coordinator.models.hf.safetensors_file import read_safetensors
from warmfront.shared.errors import ModelError


def whole(header: Any, data: int = 0, length: int | None = None) -> bytes:
    """A file with that header, as JSON text or as what becomes it, `data` bytes, and a `length` that may be wrong."""
    text = (header if isinstance(header, str) else json.dumps(header)).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + bytes(data)


def entry(begin: Any = 0, end: Any = 8, dtype: Any = "F32", shape: Any = (2,)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def test_tensors_are_those_of_the_library(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(1)
    types = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64, "U8": torch.uint8}
    tensors = {name: (torch.randn(3, 5, generator=generator) * 50).abs().to(dtype) for name, dtype in types.items()}
    tensors |= {"scalar": torch.tensor(1.5), "vector": torch.arange(4.0), "nothing": torch.zeros(0, 3)}
    save_file(tensors, tmp_path / "x.safetensors", {"format": "pt", "more": "é"})
    stored, metadata = read_safetensors(tmp_path / "x.safetensors", "no")
    assert metadata == {"format": "pt", "more": "é"}
    assert stored.keys() == tensors.keys()
    for name, values in tensors.items():
        assert stored[name].shape == tuple(values.shape)
        assert stored[name].type == (name if name in types else "F32")
        if values.numel():
            raw = values.reshape(-1).view(torch.uint8).numpy()
            np.testing.assert_array_equal(stored[name].rows().reshape(-1), raw)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "a header of 0 bytes"),
        (b"\1\0\0\0", "a header of 1 bytes"),
        (whole({}, length=2**63), "a header of 9223372036854775808 bytes"),
        (whole({}, length=3), "a header of 3 bytes"),
        (whole("[]"), "not an object"),
        (whole("{"), "Expecting"),
        (whole("[" * 100_000), "recursion"),
        (whole('{"a": ' + "9" * 5000 + "}"), "digits"),
        (struct.pack("<Q", 4) + b'{"\xff"', "utf-8"),
        (whole({"__metadata__": {"a": 1}}), "metadata are not texts"),
        (whole({"__metadata__": []}), "metadata are not texts"),
        (whole({"a": [1]}, 8), "tensor a is not described"),
        (whole({"a": None}, 8), "tensor a is not described"),
        (whole({"a": {"dtype": "F32", "shape": [2]}}, 8), "tensor a is not described"),
        (whole({"a": entry(dtype=5)}, 8), "tensor a is not described"),
        (whole({"a": entry(shape="2")}, 8), "tensor a is not described"),
        (whole({"a": entry(shape=[2.0])}, 8), "tensor a is not described"),
        (whole({"a": entry(shape=[True, 2])}, 8), "tensor a is not described"),
        (whole({"a": entry(shape=[-2])}, 8), "tensor a is not described"),
        (whole({"a": entry(shape=[10**30])}, 8), "tensor a is not described"),
        (whole({"a": entry(-8, 0)}, 8), "tensor a is not described"),
        (whole({"a": entry(0.0)}, 8), "tensor a is not described"),
        (whole({"a": entry(8, 0)}, 8), "tensor a lies at 8 to 0"),
        (whole({"a": entry(8, 16)}, 16), "tensor a lies at 8 to 16, where 0 is next"),
        (whole({"a": entry(), "b": entry()}, 8), "tensor b lies at 0 to 8, where 8 is next"),
        (whole({"a": entry(), "b": entry(4, 12)}, 12), "tensor b lies at 4 to 12, where 8 is next"),
        (whole({"a": entry(shape=[3])}, 8), "takes 8 bytes"),
        (whole({"a": entry(dtype="F16")}, 8), "takes 8 bytes"),
        (whole({"a": entry(shape=[2**40, 2**40])}, 8), "takes 8 bytes"),
        (whole({"a": entry()}, 7), "bytes instead of"),
        (whole({"a": entry()}, 9), "bytes instead of"),
        (whole({"a": entry(0, 10**12, "U8")}, 9), "bytes instead of"),
        (whole('{"a": %s, "a": %s}' % ((json.dumps(entry()),) * 2), 8), "a is there twice"),
        (whole('{"a": {"dtype": "F32", "dtype": "F16", "shape": [2], "data_offsets": [0, 8]}}', 8), "dtype is there"),
    ],
)
def test_what_is_wrong_is_said(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(content)
    with pytest.raises(ModelError, match=message) as caught:
        read_safetensors(path, "make it anew")
    assert str(caught.value).startswith(f"{path} is damaged (")
    assert str(caught.value).endswith("; make it anew")
    assert str(caught.value).isprintable()
