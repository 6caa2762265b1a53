"""The packed model, from a file made by hand, whole and damaged.  pytest tests/shared/model/test_store.py"""

import json
import os
import struct
import zlib
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from tests.shared.model.specs import SPEC, edited, uncomputed
from warmfront.shared.errors import DamagedError, ModelError
from warmfront.shared.model.formats import Kind
from warmfront.shared.model.spec import Predictor
from warmfront.shared.model.store import FORMAT, PackedModel, sums_of
from warmfront.shared.wire.worker_main import open_assigned

# Gate and up of Q8: 34 bytes, down of Q4: 20; 88 in all, padded to 128. 70 neurons: 3 groups of 32.
BUNDLE, GROUPS = 128, 3
METADATA = {
    "format": FORMAT,
    "spec": SPEC.to_json(),
    "kinds": json.dumps({"embed": int(Kind.F16), "gate": int(Kind.Q8), "down": int(Kind.Q4)}),
    "text": json.dumps({"bos_id": 3, "chat_template": "{{ x }}"}),
}
Tensors = dict[str, tuple[str, np.ndarray]]
TENSORS: Tensors = {
    "embed": ("U8", np.arange(5 * 64, dtype=np.uint8).reshape(5, 64)),
    "norm": ("F32", np.linspace(0, 1, 32, dtype=np.float32)),
    "largest": ("F32", np.array([0.5, 2.0, 0.25, 3.0, 1.0, 0.125], np.float32)),
    **{
        f"layers.{i}.ffn": (
            "U8",
            np.random.default_rng(i).integers(0, 256, (GROUPS, 32 * BUNDLE), dtype=np.uint8),
        )
        for i in range(2)
    },
}
Fields = dict[str, Any]
Write = Callable[..., Path]


# A piece of each: eight rows (embed has five), all of a vector, a group of neurons.
PIECES = {"embed": 320, "norm": 128, "largest": 1 << 20, "layers.0.ffn": 4096, "layers.1.ffn": 4096}
SUMS = 1 + 1 + 1 + 3 + 3


def fields_of(tensors: Tensors = TENSORS) -> Fields:
    fields: Fields = {"__metadata__": dict(METADATA)}
    offset = 0
    for name, (element, values) in tensors.items():
        end = offset + values.nbytes
        fields[name] = {"dtype": element, "shape": list(values.shape), "data_offsets": [offset, end]}
        offset = end
    words = 2 + sum(
        -(-values.nbytes // max(1, min(PIECES[name], values.nbytes))) for name, (_, values) in tensors.items()
    )
    return fields | {"sums": {"dtype": "U64", "shape": [words], "data_offsets": [offset, offset + 8 * words]}}


def bytes_of(fields: object, tensors: Tensors = TENSORS) -> bytes:
    header = json.dumps(fields).encode()
    data, sums = b"", []
    for name, (_, values) in tensors.items():
        data += (tensor := values.tobytes())
        piece = max(1, min(PIECES[name], len(tensor)))
        pieces = (tensor[at : at + piece] for at in range(0, len(tensor), piece))
        sums += [sum(struct.unpack(f"<{len(piece) // 8}Q", piece)) % 2**64 for piece in pieces]
    words = struct.pack(f"<{len(sums) + 1}Q", *sums, zlib.crc32(header))
    return struct.pack("<Q", len(header)) + header + data + words + struct.pack("<Q", zlib.crc32(words))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "model.safetensors"
    path.write_bytes(bytes_of(fields_of()))
    return path


def test_what_the_file_says(path: Path) -> None:
    with PackedModel(path) as model:
        assert model.spec == SPEC
        assert model.text == {"bos_id": 3, "chat_template": "{{ x }}"}
        assert (model.layout.gate_kind, model.layout.down_kind) == (Kind.Q8, Kind.Q4)
        assert (model.layout.bundle_bytes, model.layout.groups) == (BUNDLE, GROUPS)
        assert {name: entry.shape for name, entry in model.entries.items()} == {
            "embed": (5, 64),
            "norm": (32,),
            "largest": (6,),
            "layers.0.ffn": (3, 4096),
            "layers.1.ffn": (3, 4096),
        }
        assert [entry.kind for entry in model.entries.values()] == [Kind.F16, None, None, None, None]
        assert [entry.nbytes for entry in model.entries.values()] == [320, 128, 24, 12288, 12288]


def test_spec_with_a_predictor(tmp_path: Path) -> None:
    spec = replace(SPEC, predictor=Predictor(input="normed", activation="none", threshold=-0.25))
    fields = fields_of()
    fields["__metadata__"]["spec"] = spec.to_json()
    path = tmp_path / "model.safetensors"
    path.write_bytes(bytes_of(fields))
    with PackedModel(path) as model:
        assert model.spec == spec


def test_order_and_profile(tmp_path: Path, path: Path) -> None:
    """Absent until the neurons have been ordered."""
    with PackedModel(path) as model:
        assert (model.order, model.profile) == ("", {})
    fields = fields_of()
    fields["__metadata__"] |= {"order": "0f3a", "profile": json.dumps({"tokens": [32, 5]})}
    other = tmp_path / "other.safetensors"
    other.write_bytes(bytes_of(fields))
    with PackedModel(other) as model:
        assert (model.order, model.profile) == ("0f3a", {"tokens": [32, 5]})


def test_tensors(path: Path) -> None:
    with PackedModel(path) as model:
        for name, (_, values) in TENSORS.items():
            assert model.bytes_of(name).tobytes() == values.tobytes()
        np.testing.assert_array_equal(model.floats("norm"), TENSORS["norm"][1])
        out = np.zeros((2, 50), np.uint8)
        model.read_into("embed", out, 70)
        assert out.tobytes() == TENSORS["embed"][1].tobytes()[70:170]


@pytest.mark.parametrize(("first", "count"), [(0, 3), (0, 1), (1, 2), (2, 1)])
def test_groups(path: Path, first: int, count: int) -> None:
    with PackedModel(path) as model:
        for layer in range(2):
            out = np.zeros((count, 32 * BUNDLE), np.uint8)
            model.read_groups(layer, first, out)
            np.testing.assert_array_equal(out, TENSORS[f"layers.{layer}.ffn"][1][first : first + count])


def test_groups_of_another_size_are_refused(path: Path) -> None:
    with PackedModel(path) as model, pytest.raises(AssertionError):
        model.read_groups(0, 0, np.zeros((1, 32, BUNDLE - 64), np.uint8))


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    """Another process has found it damaged and removed it: it is made again, as if this one had."""
    with pytest.raises(DamagedError, match=r"^the packed model \S+ is gone; it will be made again$"):
        PackedModel(tmp_path / "none.safetensors")


def refused(path: Path) -> str:
    """The complaint about a damaged file; no descriptor stays open."""
    before = os.listdir("/proc/self/fd")
    with pytest.raises(ModelError) as caught:
        PackedModel(path)
    assert os.listdir("/proc/self/fd") == before
    message = str(caught.value)
    assert message.startswith(f"the packed model {path} is damaged (")
    assert message.endswith("); delete it, it will be made again")
    assert "\n" not in message
    return message


WHOLE = bytes_of(fields_of())


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\0\0\0",
        bytes(64),
        b"\xff" * 64,
        struct.pack("<Q", 5) + b"hello",
        struct.pack("<Q", 2) + b"{}",
        struct.pack("<Q", 2) + b"[]",
        struct.pack("<Q", 1) + b"5",
        struct.pack("<Q", 2) + b"\xff\xfe",
        WHOLE[:100],
        WHOLE[:-1],
        WHOLE[:-12288],
        WHOLE + b"\0",
    ],
    ids=range(13),
)
def test_damaged_files(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(data)
    refused(path)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"format": "warmfront-0"}, "format warmfront-0"),
        ({"spec": "{}"}, "family"),
        ({"spec": json.dumps(json.loads(SPEC.to_json()) | {"shoe_size": 44})}, "shoe_size"),
        ({"spec": json.dumps(json.loads(SPEC.to_json()) | {"predictor": {"rank": 8}})}, "rank"),
        ({"kinds": json.dumps({"embed": 1, "gate": 3})}, "down"),
        ({"kinds": json.dumps({"embed": 9, "gate": 3, "down": 4})}, "9"),
        ({"kinds": "["}, ""),
        ({"text": "x"}, ""),
    ],
)
def test_damaged_metadata(tmp_path: Path, change: dict[str, str], complaint: str) -> None:
    fields = fields_of()
    fields["__metadata__"] |= change
    path = tmp_path / "model.safetensors"
    path.write_bytes(bytes_of(fields))
    assert complaint in refused(path)


def write_spec(path: Path, field: str, value: Any) -> None:
    """A whole file, right in all its sums, but for one field of the spec."""
    fields = fields_of()
    fields["__metadata__"]["spec"] = edited(SPEC, field, value)
    path.write_bytes(bytes_of(fields))


def as_the_coordinator(path: Path) -> None:
    PackedModel(path).close()


def as_a_worker(path: Path) -> None:
    open_assigned(SimpleNamespace(model=os.fspath(path), order="")).close()  # type: ignore[arg-type]


@pytest.mark.parametrize("open_file", [as_the_coordinator, as_a_worker])
@pytest.mark.parametrize(
    ("field", "value", "complaint"),
    [
        ("layers", 2**40, "layers is 1099511627776, not a whole number from 1 to 2147483647"),
        ("architecture.attention.heads", "2", "field architecture.attention.heads is '2', not int"),
        ("architecture.norm.epsilon", float("nan"), "norm epsilon is nan, not a positive number"),
        ("architecture.attention.windows", [8], "attention windows are given for 1 layers of 2"),
        ("architecture.residual", ..., "field architecture.residual is missing"),
        ("vocab", 6, "tensor embed has shape (5, 64) and 320 bytes, not shape (6, 64)"),
        ("hidden", 64, "tensor embed has shape (5, 64) and 320 bytes, not shape (5, 128)"),
        ("ffn", 33, "tensor layers.0.ffn has shape (3, 4096) and 12288 bytes, not shape (2, 4096)"),
        ("layers", 2**31 - 1, "tensor largest has shape (6,) and 24 bytes, not shape (6442450941,)"),
    ],
)
def test_a_description_that_no_model_can_have(
    tmp_path: Path, open_file: Callable[[Path], None], field: str, value: Any, complaint: str
) -> None:
    path = tmp_path / "model.safetensors"
    write_spec(path, field, value)
    before = os.listdir("/proc/self/fd")
    with pytest.raises(DamagedError) as caught:
        open_file(path)
    assert os.listdir("/proc/self/fd") == before
    assert str(caught.value) == f"the packed model {path} is damaged ({complaint}); delete it, it will be made again"


@pytest.mark.parametrize("open_file", [as_the_coordinator, as_a_worker])
@pytest.mark.parametrize("name", ["largest", "layers.1.ffn"])
def test_a_tensor_that_is_missing(tmp_path: Path, open_file: Callable[[Path], None], name: str) -> None:
    tensors = {other: tensor for other, tensor in TENSORS.items() if other != name}
    (path := tmp_path / "model.safetensors").write_bytes(bytes_of(fields_of(tensors), tensors))
    with pytest.raises(DamagedError, match=rf"is damaged \(tensor {name} is missing\)"):
        open_file(path)


@pytest.mark.parametrize("shape", [(4,), (8,), (2, 3), (0,)])
def test_largest_magnitudes_of_another_shape(tmp_path: Path, shape: tuple[int, ...]) -> None:
    """There are three for each layer."""
    tensors = TENSORS | {"largest": ("F32", np.ones(shape, np.float32))}
    path = tmp_path / "model.safetensors"
    path.write_bytes(bytes_of(fields_of(tensors), tensors))
    assert "tensor largest has shape" in refused(path)


def test_reach(path: Path) -> None:
    """70 neurons times what gate, up and down of a layer have at most."""
    with PackedModel(path) as model:
        assert model.reach.tolist() == [70 * 0.5 * 2 * 0.25, 70 * 3 * 1 * 0.125]


@pytest.mark.parametrize("open_file", [as_the_coordinator, as_a_worker])
def test_a_description_of_what_is_not_computed(tmp_path: Path, open_file: Callable[[Path], None]) -> None:
    """The file is whole, so it stays."""
    path = tmp_path / "model.safetensors"
    write_spec(path, "architecture", asdict(uncomputed(SPEC).architecture))
    before = os.listdir("/proc/self/fd")
    with pytest.raises(ModelError) as caught:
        open_file(path)
    assert os.listdir("/proc/self/fd") == before
    assert not isinstance(caught.value, DamagedError)
    assert str(caught.value) == "by hand uses parallel residual with post-norm, which is not supported yet"
    assert path.exists()


@pytest.mark.parametrize("field", list(METADATA))
def test_missing_metadata(tmp_path: Path, field: str) -> None:
    fields = fields_of()
    del fields["__metadata__"][field]
    path = tmp_path / "model.safetensors"
    path.write_bytes(bytes_of(fields))
    assert field in refused(path)


def test_a_header_without_tensors(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(bytes_of({"__metadata__": METADATA}))
    refused(path)


def test_a_file_cut_off_while_it_is_read(path: Path) -> None:
    with PackedModel(path) as model:
        os.truncate(path, path.stat().st_size - 8 * (SUMS + 2) - 10)
        model.bytes_of("embed")
        with pytest.raises(ModelError, match=r"^the packed model \S+ is truncated; delete it"):
            model.bytes_of("layers.1.ffn")


def at_of(path: Path, name: str) -> int:
    """Where in the file a tensor begins."""
    with PackedModel(path) as model:
        return model.entries[name].offset


def test_sums_of_pieces() -> None:
    """Any length: what is missing of the last word counts as zeros."""
    data = np.random.default_rng(0).integers(0, 256, 203, dtype=np.uint8)
    for length in (0, 1, 7, 8, 63, 64, 65, 128, 203):
        for piece in (8, 64, 203, 1000):
            some = data[:length].tobytes()
            pieces = [some[at : at + piece] for at in range(0, length, piece)]
            padded = [each + bytes(-len(each) % 8) for each in pieces]
            sums = [sum(struct.unpack(f"<{len(each) // 8}Q", each)) % 2**64 for each in padded]
            if piece % 8 == 0 or length <= piece:
                assert sums_of(data[:length], piece).tolist() == sums


@pytest.mark.parametrize("damage", ["bit", "zeroed page", "another's page"])
@pytest.mark.parametrize(("name", "at"), [("layers.0.ffn", 0), ("layers.1.ffn", 2 * 4096), ("embed", 64)])
def test_damaged_weights_are_never_handed_out(path: Path, name: str, at: int, damage: str) -> None:
    """Whole or a group; what was not hit is read as ever. The file is gone then, so that it is made again."""
    offset = at_of(path, name) + at
    data = bytearray(path.read_bytes())
    if damage == "bit":
        data[offset + 99] ^= 0x10
    else:
        page = {"zeroed page": bytes(256), "another's page": bytes(range(255, -1, -1))}[damage]
        data[offset : offset + 256] = page
    path.write_bytes(data)
    with PackedModel(path) as model:
        for other in set(TENSORS) - {name}:
            assert model.bytes_of(other).tobytes() == TENSORS[other][1].tobytes()
        if name.endswith(".ffn"):
            model.read_groups(int(name[7]), 1, np.zeros((1, 4096), np.uint8))
            with pytest.raises(DamagedError):
                model.read_groups(int(name[7]), at // 4096, np.zeros((1, 4096), np.uint8))
        with pytest.raises(
            DamagedError, match=rf"^the packed model \S+ is damaged \({name}\); it has to be made again$"
        ):
            model.bytes_of(name)
    assert not path.exists()


@pytest.mark.parametrize("name", ["norm", "largest"])
def test_damaged_vectors_are_found_at_once(path: Path, name: str) -> None:
    offset = at_of(path, name)
    data = bytearray(path.read_bytes())
    data[offset + 4 : offset + 8] = bytes(4)
    path.write_bytes(data)
    before = os.listdir("/proc/self/fd")
    with pytest.raises(DamagedError, match=rf"is damaged \({name}\)"):
        PackedModel(path)
    assert os.listdir("/proc/self/fd") == before


@pytest.mark.parametrize("at", [20, 150, -1, -9, -17, -40])
def test_a_bit_of_the_header_or_of_the_sums(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 0x01
    path.write_bytes(data)
    refused(path)


def test_who_reads_a_replaced_file_removes_not_the_new_one(path: Path) -> None:
    damaged = bytearray(whole := path.read_bytes())
    damaged[at_of(path, "embed")] ^= 1
    path.write_bytes(damaged)
    with PackedModel(path) as model:
        path.unlink()
        path.write_bytes(whole)
        with pytest.raises(DamagedError):
            model.bytes_of("embed")
    assert path.read_bytes() == whole


def test_close_releases_the_file(path: Path) -> None:
    model = PackedModel(path)
    model.close()
    with pytest.raises(OSError, match="Bad file descriptor"):
        model.bytes_of("embed")
