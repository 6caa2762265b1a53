"""The GGUF container against the gguf package, and hostile files.  pytest tests/coordinator/models/gguf/test_file.py"""

import itertools
import os
import resource
import struct
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from warmfront.coordinator.models.gguf import file as gguf_file
from warmfront.coordinator.models.gguf.file import GgufFile
from warmfront.coordinator.models.open import open_source
from warmfront.shared.errors import ModelError

TYPES = ("uint8", "int8", "uint16", "int16", "uint32", "int32", "float32", "bool", "uint64", "int64", "float64")
U32, F32, TEXT, ARRAY = 4, 6, 8, 9


def text(value: str | bytes) -> bytes:
    raw = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(raw)) + raw


def field(key: str | bytes, kind: int, value: bytes) -> bytes:
    return text(key) + struct.pack("<I", kind) + value


def array(kind: int, length: int, values: bytes = b"") -> bytes:
    return struct.pack("<IQ", kind, length) + values


def tensor(name: str | bytes, sizes: tuple[int, ...], kind: int = 0, offset: int = 0) -> bytes:
    head = text(name) + struct.pack(f"<I{len(sizes)}Q", len(sizes), *sizes)
    return head + struct.pack("<IQ", kind, offset % 2**64)


def whole(
    *parts: bytes,
    counts: tuple[int, int] | None = None,
    data: int = 1024,
    magic: bytes = b"GGUF",
    version: int = 3,
    tensors: int = 0,
) -> bytes:
    """A file of fields and then `tensors` tensors; `counts` (tensors, fields) and `data`, its bytes, may be wrong."""
    counts = counts or (tensors, len(parts) - tensors)
    head = magic + struct.pack("<IQQ", version, *counts) + b"".join(parts)
    return head + bytes(-len(head) % 32 + data)


@pytest.fixture
def little_memory() -> Iterator[None]:
    """Two gigabytes beyond what the process has: what a number of the file claims cannot be allocated."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + (2 << 30), before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)


def refused(path: Path, content: bytes, message: str) -> None:
    path.write_bytes(content)
    start = time.monotonic()
    with pytest.raises(ModelError, match=message) as caught:
        GgufFile(path)
    assert time.monotonic() - start < 2
    assert str(caught.value).startswith(f"{path} is not a whole GGUF file (")
    assert str(caught.value).isprintable()


def test_fields_of_every_type(tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    for name in TYPES:
        getattr(writer, f"add_{name}")(f"one.{name}", True if name == "bool" else 100)
        if name != "bool":
            kind = gguf.GGUFValueType[name.upper()]
            writer.add_key_value(f"many.{name}", [1, 2, 127], gguf.GGUFValueType.ARRAY, sub_type=kind)
    writer.add_string("text", "naïve 日本語 🙂")
    writer.add_array("texts", ["", "a", "日本"])
    rng = np.random.default_rng(1)
    shapes: dict[str, tuple[int, ...]] = {"vector": (7,), "matrix": (3, 64), "cube": (2, 3, 32)}
    for name, shape in shapes.items():
        writer.add_tensor(name, rng.normal(size=shape).astype(np.float32))
    writer.add_tensor(
        "blocks",
        gguf.quantize(rng.normal(size=(5, 64)).astype(np.float32), gguf.GGMLQuantizationType.Q8_0),
        raw_dtype=gguf.GGMLQuantizationType.Q8_0,
    )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()

    file, reader = GgufFile(path), gguf.GGUFReader(path)
    theirs = {name: part.contents() for name, part in reader.fields.items() if not name.startswith("GGUF.")}
    ours = {name: v.tolist() if isinstance(v, np.ndarray) else v for name, v in file.fields.items()}
    assert ours == theirs
    assert len(file.tensors) == 4
    for published in reader.tensors:
        stored = file.tensors[published.name]
        assert stored.type == published.tensor_type
        assert stored.shape == tuple(reversed(published.shape.tolist()))
        data = published.data.view(np.uint8).reshape(-1, published.data.view(np.uint8).shape[-1])
        np.testing.assert_array_equal(stored.rows(), data)
        np.testing.assert_array_equal(stored.rows(0, 9), data[:9])
        np.testing.assert_array_equal(stored.rows(len(data) - 1), data[-1:])
        np.testing.assert_array_equal(stored.columns(4, 12), data[:, 4:12])


@pytest.mark.usefixtures("little_memory")
@pytest.mark.parametrize("magic", [b"GGUF", b"PWRI"])
@pytest.mark.parametrize("length", [1 << 31, 1 << 40, 2**63 - 1, 2**63, 2**64 - 1])
@pytest.mark.parametrize("kind", [*range(13)])
def test_arrays_that_the_file_does_not_hold(tmp_path: Path, kind: int, length: int, magic: bytes) -> None:
    for data in (0, 4096):
        content = whole(field("general.x", ARRAY, array(kind, length)), magic=magic, data=data)
        refused(tmp_path / "x.gguf", content, "beyond the|is an array of the type 9|UTF-8|utf-8")


@pytest.mark.usefixtures("little_memory")
@pytest.mark.parametrize("huge", [1 << 31, 1 << 40, 2**64 - 1])
def test_counts_and_lengths_that_the_file_does_not_hold(tmp_path: Path, huge: int) -> None:
    path = tmp_path / "x.gguf"
    refused(path, whole(counts=(0, huge), data=0), "beyond the")
    refused(path, whole(counts=(huge, 0), data=0), "beyond the")
    refused(path, whole(struct.pack("<Q", huge) + b"abc", counts=(0, 1)), "beyond the")
    refused(path, whole(field("x", TEXT, struct.pack("<Q", huge))), "beyond the")
    refused(path, whole(field("x", ARRAY, array(TEXT, 2, text("a") + struct.pack("<Q", huge)))), "beyond the")
    refused(path, whole(text("t") + struct.pack("<I", 1 << 31), tensors=1), "2147483648 dimensions")
    refused(path, whole(tensor("t", (huge,)), tensors=1), "tensor t ends at")
    refused(path, whole(tensor("t", (huge, huge, huge, huge)), tensors=1), "tensor t ends at")
    refused(path, whole(tensor("t", (32,), offset=1 << 62), tensors=1), "tensor t ends at")


def test_a_head_of_no_sane_length(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Zeros are as many empty texts, and cost nothing on a disk: terabytes of them are not read to their end."""
    path = tmp_path / "x.gguf"
    content = whole(field("x", ARRAY, array(TEXT, 1 << 36)), data=0)
    monkeypatch.setattr(gguf_file, "MAX_HEAD_BYTES", 1 << 16)
    path.write_bytes(content)
    os.truncate(path, 1 << 40)
    with pytest.raises(ModelError, match="of a sane head"):
        GgufFile(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (whole(magic=b"GGML"), "it does not begin with GGUF"),
        (whole(version=1), "it is of version 1"),
        (whole(version=3 << 24), "it is big-endian"),
        (whole(field("x", 13, b"")), "field x has the unknown type 13"),
        (whole(field("x", ARRAY, array(ARRAY, 1, array(U32, 0)))), "field x is an array of the type 9"),
        (whole(field(b"\xff", U32, bytes(4))), "utf-8"),
        (whole(field("x", TEXT, text(b"\xff"))), "utf-8"),
        (whole(field("x", U32, bytes(4)), field("x", U32, bytes(4))), "field x is there twice"),
        (whole(tensor("t", (32,)), tensor("t", (32,), offset=128), tensors=2), "tensor t is there twice"),
        (whole(tensor("t", ()), tensors=1), "tensor t has 0 dimensions"),
        (whole(tensor("t", (1,) * 5), tensors=1), "tensor t has 5 dimensions"),
        (whole(tensor("t", (0, 32)), tensors=1), "tensor t of type F32 has shape"),
        (whole(tensor("t", (48,), kind=8), tensors=1), "tensor t of type Q8_0 has shape"),
        (whole(tensor("t", (32,), offset=-32), tensors=1), "tensor t ends at"),
        (whole(tensor("t", (32,), offset=-1), tensors=1), "tensor t lies at"),
        (whole(tensor("t", (32,), offset=7), tensors=1), "tensor t lies at .* not at a multiple of 32"),
        (whole(tensor("a", (32,)), tensor("b", (32,)), tensors=2), "tensor [ab] lies at .* on another tensor"),
        (whole(tensor("a", (32,)), tensor("b", (32,), offset=96), tensors=2), "tensor b lies at .* on another tensor"),
        (whole(tensor("t", (32,), offset=928), tensors=1), "tensor t ends at"),
        (whole(tensor("a\nb\x1b[31m", (32,), offset=7), tensors=1), r"tensor a\?b\?\[31m lies at"),
    ],
)
def test_what_is_wrong_is_said(tmp_path: Path, content: bytes, message: str) -> None:
    refused(tmp_path / "x.gguf", content, message)


@pytest.mark.parametrize("kind", [4, 137, 999])
def test_weights_of_unknown_types(tmp_path: Path, kind: int) -> None:
    """llama.cpp had and has others than gguf knows, and so have its forks: the file may be whole."""
    (tmp_path / "x.gguf").write_bytes(whole(tensor("t", (32,), kind=kind), tensors=1))
    with pytest.raises(ModelError, match=f"tensor t has weights of the unknown type {kind}, .*; choose a file"):
        GgufFile(tmp_path / "x.gguf")


def test_a_tensor_may_end_where_the_file_does(tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    path.write_bytes(whole(tensor("b", (32,), offset=128), tensor("a", (32,)), tensors=2, data=256))
    assert sorted(GgufFile(path).tensors) == ["a", "b"]
    refused(path, path.read_bytes()[:-1], "tensor b ends at")


@pytest.mark.parametrize(
    ("value", "kind", "good"),
    [
        (1, U32, True),
        (64, U32, True),
        (256, U32, True),
        (0, U32, False),
        (48, U32, False),
        (2**31 + 1, U32, False),
        (32.0, F32, False),
    ],
)
def test_alignment(tmp_path: Path, value: Any, kind: int, good: bool) -> None:
    """Offsets count from a multiple of it, and are multiples of it."""
    raw = struct.pack("<f" if kind == F32 else "<I", value)
    content = whole(field("general.alignment", kind, raw), tensor("t", (32,), offset=256), tensors=1, data=2048)
    path = tmp_path / "x.gguf"
    if not good:
        refused(path, content, "general.alignment is .*, not a power")
        return
    path.write_bytes(content)
    (published,) = gguf.GGUFReader(path).tensors
    assert GgufFile(path).tensors["t"].offset == published.data_offset
    if value > 1:
        wrong = whole(field("general.alignment", kind, raw), tensor("t", (32,), offset=value // 2), tensors=1)
        refused(path, wrong, f"not at a multiple of {value}")


def test_empty_and_short_files(tmp_path: Path) -> None:
    content = whole(field("x", TEXT, text("abc")), tensor("t", (32,)), tensors=1, data=0)
    for length in itertools.chain(range(len(content) - 32), [len(content) - 1, len(content)]):
        refused(tmp_path / "x.gguf", content[:length], "beyond the|ends at")


def test_a_file_that_shrinks_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    path.write_bytes(whole(tensor("t", (32,)), tensors=1, data=128))
    stored = GgufFile(path).tensors["t"]
    with path.open("r+b") as file:
        file.truncate(stored.offset + 127)
    with pytest.raises(ModelError, match=r"x\.gguf ends within tensor t; fetch it again"):
        stored.rows()
    path.unlink()
    with pytest.raises(ModelError, match=r"cannot read .*: No such file"):
        stored.columns(0, 4)


@pytest.mark.parametrize("name", ["sha256-0a1b", "model.bin", "model", "model.safetensors"])
def test_known_by_its_first_bytes(tmp_path: Path, tiny_gguf: Any, name: str) -> None:
    assert open_source(tiny_gguf(name)).spec.hidden == 256
    (tmp_path / name).write_bytes(b"PWR" + bytes(100))
    with pytest.raises(ModelError, match=r"is not a GGUF file or a Hugging Face folder; give one of the two$"):
        open_source(tmp_path / name)
