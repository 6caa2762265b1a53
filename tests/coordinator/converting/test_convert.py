"""GGUF files that are written: what they hold, and what cannot be.  pytest tests/coordinator/converting"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from tests.coordinator.models.hf.folders import edited
from warmfront.coordinator.converting.convert import convert
from warmfront.coordinator.models.gguf.file import GgufFile
from warmfront.coordinator.models.open import open_source
from warmfront.coordinator.models.source import Source
from warmfront.shared.errors import ModelError, ResourceError, UsageError
from warmfront.shared.model.formats import Kind, pack, unpack

Make = Callable[..., Path]


def _converted(model: Path, out: Path, dtype: str = "auto") -> Source:
    assert convert(str(model), dtype, out, print, lambda *_done: None).startswith(f"{out}: ")
    return open_source(out)


def _tokenizer_of(folder: Path, other: Path) -> Path:
    (folder / "tokenizer.json").write_text((other / "tokenizer.json").read_text())
    return folder


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("llama", {}),
        ("llama", {"attention_bias": True, "tie_word_embeddings": True}),
        ("llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 5e5, "factor": 4.0}}),
        ("mistral", {"sliding_window": None}),
        ("qwen2", {}),
        ("qwen3", {}),
    ],
)
def test_a_folder_is_the_same_model_as_a_file(
    name: str, options: Any, tiny_llama: Make, tiny_family: Make, tmp_path: Path
) -> None:
    plain = tiny_llama(**(options if name == "llama" else {}))
    folder = plain
    if name != "llama":
        folder = _tokenizer_of(edited(tiny_family(name, **options), tmp_path / "copy"), plain)
    ours, file = open_source(folder), _converted(folder, tmp_path / "model.gguf", "f32")
    assert file.names() == ours.names()
    for each in ours.names():
        np.testing.assert_array_equal(file.tensor(each).float32(), ours.tensor(each).float32(), err_msg=each)
    tables = [source.spec.architecture.positions.rotary for source in (file, ours)]
    np.testing.assert_allclose(tables[0][0].frequencies, tables[1][0].frequencies, rtol=1e-6)
    architecture = replace(file.spec.architecture, positions=ours.spec.architecture.positions)
    architecture = replace(architecture, norm=ours.spec.architecture.norm)  # an epsilon of float32
    assert replace(file.spec, family=ours.spec.family, architecture=architecture) == ours.spec
    assert file.spec.architecture.norm.epsilon == pytest.approx(ours.spec.architecture.norm.epsilon)


def test_a_tokenizer_gives_the_same_ids(tiny_llama: Make, tmp_path: Path) -> None:
    from tokenizers import Tokenizer

    folder = tiny_llama()
    ours, file = (source.tokenizer for source in (open_source(folder), _converted(folder, tmp_path / "model.gguf")))
    assert ours is not None
    assert file is not None
    text = "The sea, in 1912: <|im_start|>calm\n  don't"
    read, written = (Tokenizer.from_str(each.json).encode(text, add_special_tokens=False).ids for each in (ours, file))
    assert written == read
    assert (file.bos_id, file.eos_ids, file.add_bos) == (ours.bos_id, ours.eos_ids, ours.add_bos)
    assert file.chat_templates == ours.chat_templates


@pytest.mark.parametrize(("dtype", "kind", "block"), [("q8", Kind.Q8, "Q8_0"), ("q4", Kind.Q4S, "Q4_0")])
def test_matrices_are_rounded_and_nothing_else(
    dtype: str, kind: Kind, block: str, tiny_llama: Make, tmp_path: Path
) -> None:
    """To the numbers that the packed model has, down along its inputs; written anew they stay byte for byte."""
    folder, out, again = tiny_llama(), tmp_path / "model.gguf", tmp_path / "again.gguf"
    ours, file = open_source(folder), _converted(folder, out, dtype)
    for name in ours.names():
        values = ours.tensor(name).float32()
        if values.ndim > 1:
            values = values.T if name.endswith(".down") else values
            values = unpack(pack(values, kind), kind, values.shape[1])
            values = values.T if name.endswith(".down") else values
        np.testing.assert_array_equal(file.tensor(name).float32(), values, err_msg=name)
    types = {tensor.type.name for tensor in GgufFile(out).tensors.values() if len(tensor.shape) > 1}
    assert types == {block}
    _converted(out, again, dtype)
    assert again.read_bytes() == out.read_bytes()


def test_a_file_is_rounded_too(tiny_gguf: Make, tmp_path: Path) -> None:
    source, out = tiny_gguf(), tmp_path / "model.gguf"
    _converted(source, out, "q8")
    old, new = GgufFile(source), GgufFile(out)
    assert old.tensors.keys() == new.tensors.keys()
    kept = {"general.file_type", "general.quantization_version"}
    assert {key for key in old.fields if key not in kept} == {key for key in new.fields if key not in kept}
    for name, tensor in new.tensors.items():
        before = gguf.dequantize(old.tensors[name].rows(), old.tensors[name].type)
        after = gguf.dequantize(tensor.rows(), tensor.type)
        assert tensor.shape == old.tensors[name].shape
        np.testing.assert_allclose(after, before, atol=np.abs(before).max() / 200, err_msg=name)


def test_what_cannot_be_written(tiny_llama: Make, tiny_family: Make, tmp_path: Path) -> None:
    out, plain = tmp_path / "model.gguf", tiny_llama()
    windows = _tokenizer_of(edited(tiny_family("mistral"), tmp_path / "windows"), plain)
    wordless = edited(tiny_family("qwen2"), tmp_path / "wordless")
    for folder, line in (
        (tiny_family("gemma2"), r"a folder of a gemma2 model cannot be written as GGUF; those of llama, .* can"),
        (windows, "windows has an activation, windows, .* GGUF has no field for in a llama; it cannot be written"),
        (tiny_llama(hidden_act="relu"), "an activation, windows,"),
        (wordless, r"wordless has no tokenizer\.json"),
        (_tokenizer_of(edited(tiny_family("llama yarn"), tmp_path / "yarn"), plain), "linear and llama3 can"),
    ):
        with pytest.raises(ModelError, match=line):
            _converted(folder, out)
    assert not out.exists()
    _converted(plain, out)
    with pytest.raises(UsageError, match="is the model itself"):
        _converted(out, out)
    with pytest.raises(UsageError, match="a GGUF file takes --dtype q4"):
        _converted(plain, out, "q4f")


def test_a_full_disk(tiny_llama: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """numpy's error has no number."""
    plain, out = tiny_llama(), tmp_path / "model.gguf"

    def full(*_: object) -> None:
        raise OSError("34816 requested and 3136 written")

    monkeypatch.setattr(gguf.GGUFWriter, "write_tensor_data", full)
    with pytest.raises(ResourceError, match=r"cannot write .*model\.gguf: 34816 requested and 3136 written"):
        _converted(plain, out)
    assert not [*tmp_path.iterdir()]
