"""GGUF files against the gguf package's own dequantisation.  pytest tests/coordinator/models/gguf/test_reader.py"""

import os
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import numpy.typing as npt
import pytest

from tests.coordinator.models.gguf.tensors import EXACT, NAMES, ROUNDED, bound
from warmfront.coordinator.models import source as source_module
from warmfront.coordinator.models.open import open_source
from warmfront.shared.errors import ModelError
from warmfront.shared.model.formats import Kind, unpack

Floats = npt.NDArray[np.float32]
Make = Callable[..., Path]


def expected(path: Path) -> dict[str, Floats]:
    """Every tensor by canonical name as the gguf package reads it, down transposed."""
    values = {t.name: gguf.dequantize(t.data, t.tensor_type) for t in gguf.GGUFReader(path).tensors}
    named = {name: values[f"{published}.weight"] for name, published in NAMES.items()}
    named["layers.0.down"] = named["layers.0.down"].T
    return named


def columns(tensor: source_module.SourceTensor) -> Floats:
    """What a Q4C tensor holds: its numbers by the scales and minima of each 32 rows."""
    rows, cols = tensor.shape
    nibbles = tensor.packed(Kind.Q4C).reshape(rows, cols // 32, 16)
    numbers = np.concatenate((nibbles & 15, nibbles >> 4), axis=2).reshape(-1, 32, cols).astype(np.float32)
    scale, minimum = tensor.column_scales().astype(np.float32).swapaxes(0, 1)[:, :, None]
    return (numbers * scale + minimum).reshape(rows, cols)


@pytest.mark.parametrize("kind", [*EXACT, "Q4_K", *ROUNDED])
def test_float32_is_what_the_gguf_package_reads(tiny_gguf: Make, kind: str) -> None:
    path = tiny_gguf(kind=kind)
    source = open_source(path)
    reference = expected(path)
    assert source.names() == reference.keys()
    for name, values in reference.items():
        tensor = source.tensor(name)
        assert tensor.shape == values.shape, name
        np.testing.assert_array_equal(tensor.float32(), values, err_msg=name)


@pytest.mark.parametrize("kind", EXACT)
def test_exact_types_are_repacked_without_loss(tiny_gguf: Make, kind: str) -> None:
    path = tiny_gguf(kind=kind)
    source = open_source(path)
    for name, values in expected(path).items():
        tensor = source.tensor(name)
        if name == "layers.0.down" and kind.startswith("Q4"):
            assert tensor.kind == Kind.Q4C
            np.testing.assert_array_equal(columns(tensor), values)
        elif values.ndim == 2 and (name != "layers.0.down" or kind in ("F32", "F16", "BF16")):
            assert tensor.kind == EXACT[kind], name
            np.testing.assert_array_equal(unpack(tensor.packed(tensor.kind), tensor.kind, values.shape[1]), values)
    turned = [f"1 down matrices of type {kind} are turned and kept as Q8"]
    converted = ["7 tensors of type MXFP4 are kept exactly, as Q8; --dtype q4 rounds them to 4 bits"]
    assert source.notes == {"Q8_0": turned, "MXFP4": turned + converted}.get(kind, [])


def test_q4_0_is_exact_with_minima_too(tiny_gguf: Make) -> None:
    """As it is packed beside tensors that have minima of their own."""
    path = tiny_gguf(kind="Q4_0")
    source = open_source(path)
    for name, values in expected(path).items():
        if values.ndim == 2 and name != "layers.0.down":
            packed = source.tensor(name).packed(Kind.Q4)
            np.testing.assert_array_equal(unpack(packed, Kind.Q4, values.shape[1]), values)


@pytest.mark.parametrize("kind", ["Q4_K", *ROUNDED])
def test_other_types_are_rounded_to_the_nearest(tiny_gguf: Make, kind: str) -> None:
    path = tiny_gguf(kind=kind)
    source = open_source(path)
    for name, values in expected(path).items():
        tensor = source.tensor(name)
        if values.ndim == 2:
            wanted = ROUNDED.get(kind, Kind.Q4)
            if name == "layers.0.down":
                wanted = Kind.Q4C if kind == "Q4_K" else Kind.Q8
            assert tensor.kind == wanted, name
            if wanted == Kind.Q4C:
                assert np.abs(columns(tensor) - values).max() <= np.abs(values).max() * 2**-10
                continue
            error = np.abs(unpack(tensor.packed(wanted), wanted, values.shape[1]) - values)
            limit = np.abs(values).max() * 2**-10 if kind == "Q4_K" and wanted == Kind.Q4 else bound(values, wanted)
            assert (error <= limit).all(), name
    assert any(kind in note and "rounded" in note for note in source.notes)


def test_rows_packed_in_pieces_are_the_same(tiny_gguf: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tiny_gguf(kind="Q4_K")
    whole = open_source(path)
    monkeypatch.setattr(source_module, "CHUNK", 100 * 256)
    pieces = open_source(path)
    for name in ("embed", "layers.0.gate", "layers.0.down"):
        for kind in (whole.tensor(name).kind, Kind.F16):
            np.testing.assert_array_equal(pieces.tensor(name).packed(kind), whole.tensor(name).packed(kind))


def test_smollm2_is_read_exactly(smollm2: Path) -> None:
    source = open_source(smollm2)
    spec, architecture = source.spec, source.spec.architecture
    attention = architecture.attention
    assert (spec.layers, spec.hidden, spec.ffn) == (30, 576, 1536)
    assert (attention.heads, attention.kv_heads, attention.head_dim) == (9, 3, 64)
    assert (spec.vocab, spec.context, architecture.feed_forward.activation) == (49152, 8192, "silu")
    assert architecture.norm.epsilon == pytest.approx(1e-5)
    assert "head" not in source.names()
    assert len(source.names()) == 2 + 9 * 30
    reference = {t.name: t for t in gguf.GGUFReader(smollm2).tensors}
    for name, kind in (("embed", Kind.Q8), ("layers.0.q", Kind.Q4), ("layers.0.up", Kind.Q4)):
        published = reference[f"{NAMES[name]}.weight"]
        tensor = source.tensor(name)
        assert tensor.kind == kind
        values = gguf.dequantize(published.data, published.tensor_type)
        np.testing.assert_array_equal(unpack(tensor.packed(kind), kind, 576), values)


@pytest.mark.parametrize("scale", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("kind", ["F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q4_K", *ROUNDED])
def test_numbers_that_are_not_finite(tiny_gguf: Make, kind: str, scale: float) -> None:
    """Of blocks: a scale. The last of the tensor, and whatever it is packed as."""
    path = tiny_gguf(kind=kind)
    tensors = {t.name: t for t in gguf.GGUFReader(path).tensors}
    names = {"embed": "token_embd.weight", "layers.0.down": "blk.0.ffn_down.weight"}
    size, block_bytes = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
    at = block_bytes - 4 if size == 1 else {"Q2_K": 80, "Q3_K": 108, "Q6_K": 208}.get(kind, 0)
    raw = np.float32(scale).tobytes() if kind == "F32" else np.float16(scale).tobytes()
    if kind == "BF16":
        raw = np.float32(scale).tobytes()[2:]
    if size == 1:
        at = 0
    with path.open("r+b") as file:
        for name in names.values():
            file.seek(tensors[name].data_offset + int(tensors[name].n_bytes) - block_bytes + at)
            file.write(raw)
    source = open_source(path)
    for ours, theirs in names.items():
        tensor = source.tensor(ours)
        message = rf"tiny\.gguf: tensor {theirs} holds NaN or infinity"
        with pytest.raises(ModelError, match=message):
            tensor.float32()
        kinds = {Kind.F32, Kind.F16, Kind.BF16, Kind.Q8, tensor.kind}
        for packed_kind in kinds - {Kind.Q4C}:
            with pytest.raises(ModelError, match=message):
                tensor.packed(packed_kind)
        if tensor.kind == Kind.Q4C:
            with pytest.raises(ModelError, match=message):
                tensor.column_scales()


def test_pipes_are_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "model.gguf")
    with pytest.raises(ModelError, match=r"model\.gguf is a pipe or a device; a model's files must be regular files$"):
        open_source(tmp_path / "model.gguf")


def test_damaged_files_are_refused(tiny_gguf: Make, tmp_path: Path) -> None:
    content = tiny_gguf(kind="Q8_0").read_bytes()
    cut = tmp_path / "cut.gguf"
    for length in np.linspace(0, len(content) - 100, 60).astype(int):
        cut.write_bytes(content[:length])
        with pytest.raises(ModelError, match=r"cut\.gguf"):
            open_source(cut)
    cut.write_bytes(b"PK" + content[2:])
    with pytest.raises(ModelError, match=r"cut\.gguf is not a whole GGUF file"):
        open_source(cut)


def test_neither_folder_nor_gguf(tmp_path: Path) -> None:
    other = tmp_path / "model.bin"
    other.write_bytes(b"x")
    with pytest.raises(ModelError, match="is not a GGUF file"):
        open_source(other)
    with pytest.raises(ModelError, match="does not exist"):
        open_source(tmp_path / "none.gguf")
