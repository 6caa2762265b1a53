"""The files of a folder: malformed, misplaced, in shards, in the hub's cache.

Run: pytest tests/coordinator/models/hf/test_folder.py
"""

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch

from tests.coordinator.models.hf.folders import edited
from warmfront.coordinator.models.open import open_source
from warmfront.shared.errors import ModelError

Make = Callable[..., Path]


def test_sharded_folder(tiny_llama: Make) -> None:
    folder = tiny_llama(max_shard_size="60KB")
    assert not (folder / "model.safetensors").exists()
    whole, sharded = open_source(tiny_llama()), open_source(folder)
    assert whole.names() == sharded.names()
    for name in whole.names():
        np.testing.assert_array_equal(sharded.tensor(name).float32(), whole.tensor(name).float32())
    shard = sorted(folder.glob("model-*.safetensors"))[1]
    hidden = shard.rename(shard.with_suffix(".hidden"))
    try:
        with pytest.raises(ModelError, match=shard.name):
            open_source(folder)
    finally:
        hidden.rename(shard)


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("config.json", '{"a":' * 100_000, "is not JSON"),
        ("config.json", '{"a": 1' + "0" * 5000 + "}", "is not JSON"),
        ("config.json", b"\xff\xfe{\0}\0", "is not UTF-8"),
        ("config.json", b'{"model_type": "lla\xffma"}', "is not UTF-8"),
        ("tokenizer_config.json", "5", "is not a JSON object"),
        ("tokenizer_config.json", {"bos_token": 5}, "field bos_token is 5, not a text"),
        ("tokenizer_config.json", {"eos_token": ["a"]}, r"field eos_token is \['a'\], not a text"),
        ("tokenizer_config.json", {"eos_token": {"content": 5}}, "field eos_token.content is 5, not a text"),
        ("tokenizer_config.json", {"eos_token": {}}, "field eos_token.content is missing"),
        ("tokenizer_config.json", {"add_bos_token": "no"}, "field add_bos_token is 'no', not true or false"),
        ("tokenizer_config.json", {"added_tokens_decoder": [1]}, r"field added_tokens_decoder is \[1\], not an object"),
        (
            "tokenizer_config.json",
            {"added_tokens_decoder": {"7": {}}},
            "field added_tokens_decoder.7.content is missing",
        ),
        ("tokenizer_config.json", {"chat_template": 5}, "field chat_template is 5, not a text"),
        ("tokenizer_config.json", {"chat_template": {"a": "b"}}, "field chat_template is {'a': 'b'}, not a text"),
        ("tokenizer_config.json", {"chat_template": [5]}, r"field chat_template is \[5\], not a list of objects"),
        ("tokenizer_config.json", {"chat_template": [["a"]]}, "not a list of objects"),
        ("tokenizer_config.json", {"chat_template": [{"name": "default"}]}, r"chat_template\[0\].template is missing"),
        ("tokenizer_config.json", {"chat_template": [{"name": 1, "template": ""}]}, r"chat_template\[0\].name is 1"),
        ("chat_template.jinja", b"\xff\xfe", "is not UTF-8"),
        ("generation_config.json", {"eos_token_id": [1, "2"]}, "field eos_token_id is"),
        ("generation_config.json", {"eos_token_id": {"a": 1}}, "field eos_token_id is"),
        ("generation_config.json", {"eos_token_id": 300}, "field eos_token_id is 300, not a token id below 300"),
        ("tokenizer.json", b"\xff", "is not UTF-8"),
        ("tokenizer.json", "[" * 100_000, "is not a tokenizer"),
    ],
)
def test_malformed_files_are_refused(tiny_llama: Make, tmp_path: Path, file: str, content: Any, message: str) -> None:
    """In one line that names the file, and where there is one the field."""
    folder = edited(tiny_llama(), tmp_path / "copy")
    if isinstance(content, dict):
        content = json.dumps(content)
    (folder / file).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ModelError, match=message) as caught:
        open_source(folder)
    assert str(caught.value).startswith(str(folder / file))
    assert str(caught.value).isprintable()


def test_byte_order_marks_are_passed_over(tiny_llama: Make, tmp_path: Path) -> None:
    """Windows editors write them; what follows is read as without."""
    folder = edited(tiny_llama(max_shard_size="60KB"), tmp_path / "copy")
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    plain = open_source(folder)
    for file in [*folder.glob("*.json"), folder / "chat_template.jinja"]:
        file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes())
    marked = open_source(folder)
    assert (marked.spec, marked.tokenizer) == (plain.spec, plain.tokenizer)


def test_a_text_file_of_no_sane_size(tiny_llama: Make, tmp_path: Path) -> None:
    folder = edited(tiny_llama(), tmp_path / "copy")
    for file in ("tokenizer.json", "config.json"):
        os.truncate(folder / file, 1 << 40)
        with pytest.raises(ModelError, match=rf"{file} is larger than any such file; fetch it again"):
            open_source(folder)


def indexed(folder: Path, target: Path, file: Any) -> Path:
    """A copy whose index says that every tensor is in `file`; the weights themselves are moved to `weights`."""
    copy = edited(folder, target)
    (copy / "model.safetensors").rename(copy / "weights")
    names = safetensors.torch.load_file(copy / "weights")
    (copy / "model.safetensors.index.json").write_text(json.dumps({"weight_map": dict.fromkeys(names, file)}))
    return copy


@pytest.mark.parametrize(
    ("file", "message"),
    [
        ("../outside.safetensors", r"does not lie in the model's folder; copy it there"),
        ("../copy/weights", r"does not lie in the model's folder"),
        ("sub/weights", "does not lie in the model's folder"),
        ("..", "does not lie in the model's folder"),
        (".", "does not lie in the model's folder"),
        ("", "does not lie in the model's folder"),
        ("/etc/passwd", "does not lie in the model's folder"),
        ("../pipe", "does not lie in the model's folder"),
        ("/dev/zero", "does not lie in the model's folder"),
        ("a" * 300, "cannot be a file of the model .*File name too long"),
        ("\0", "cannot be a file of the model .*null"),
        ("\ud800", "cannot be a file of the model"),
        ("circle", "cannot be a file of the model .*circle"),
        ("none.safetensors", "cannot read .*none.safetensors: No such file"),
        ("sub", "sub is not a regular file"),
        (5, r"field weight_map\..* is 5, not a text"),
        ([], r"field weight_map\..* is \[\], not a text"),
        ({"a": 1}, r"field weight_map\..* is \{'a': 1\}, not a text"),
        (None, r"field weight_map\..* is missing"),
    ],
)
def test_files_that_an_index_may_not_name(tiny_llama: Make, tmp_path: Path, file: Any, message: str) -> None:
    os.mkfifo(tmp_path / "pipe")
    folder = indexed(tiny_llama(), tmp_path / "copy", file)
    (folder / "sub").mkdir()
    (folder / "circle").symlink_to("circle")
    for place in (tmp_path / "outside.safetensors", folder / "sub" / "weights"):
        shutil.copy(folder / "weights", place)
    with pytest.raises(ModelError, match=message) as caught:
        open_source(folder)
    assert str(caught.value).isprintable()


@pytest.mark.parametrize("content", ["[]", "{}", '{"weight_map": 5}', '{"weight_map": ["a"]}', '{"weight_map": {}}'])
def test_an_index_of_no_weights(tiny_llama: Make, tmp_path: Path, content: str) -> None:
    folder = indexed(tiny_llama(), tmp_path / "copy", "weights")
    (folder / "model.safetensors.index.json").write_text(content)
    with pytest.raises(ModelError, match=r"index\.json|incomplete|is missing"):
        open_source(folder)


def test_links_stay_in_the_folder(tiny_llama: Make, tmp_path: Path) -> None:
    folder = edited(tiny_llama(), tmp_path / "copy")
    (folder / "model.safetensors").rename(folder / "weights")
    (folder / "model.safetensors").symlink_to("weights")
    assert open_source(folder).spec.layers == 2
    (folder / "weights").rename(tmp_path / "weights")
    for target in (tmp_path / "weights", "../weights", "/dev/zero"):
        (folder / "model.safetensors").unlink()
        (folder / "model.safetensors").symlink_to(target)
        with pytest.raises(ModelError, match=r"model\.safetensors (does not lie in the model's folder|is a pipe or)"):
            open_source(folder)
    shutil.move(tmp_path / "weights", folder / "moved")
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").symlink_to("moved")
    (folder / "config.json").rename(tmp_path / "config.json")
    (folder / "config.json").symlink_to(tmp_path / "config.json")
    with pytest.raises(ModelError, match=r"config\.json does not lie in the model's folder"):
        open_source(folder)


@pytest.mark.parametrize("shards", [{}, {"max_shard_size": "60KB"}])
def test_snapshots_of_the_hub_s_cache(tiny_llama: Make, tmp_path: Path, shards: dict[str, str]) -> None:
    """Their files are links to the blobs of the same repository, and only of it."""
    plain = tiny_llama(**shards)
    repository = tmp_path / "hub" / "models--a--tiny"
    snapshot = repository / "snapshots" / "0123abc"
    snapshot.mkdir(parents=True)
    (repository / "blobs").mkdir()
    for i, file in enumerate(sorted(plain.iterdir())):
        shutil.copy(file, repository / "blobs" / f"{i:040x}")
        (snapshot / file.name).symlink_to(Path("..", "..", "blobs", f"{i:040x}"))
    (tmp_path / "link").symlink_to(snapshot)
    expected = open_source(plain)
    for path in (snapshot, tmp_path / "link"):
        source = open_source(path)
        assert replace(source.spec, name="") == replace(expected.spec, name="")
        np.testing.assert_array_equal(
            source.tensor("layers.1.down").float32(), expected.tensor("layers.1.down").float32()
        )
    (repository / "blobs").rename(tmp_path / "blobs")
    (repository / "blobs").symlink_to(tmp_path / "blobs")
    other = tmp_path / "hub" / "models--b--tiny" / "blobs"
    other.mkdir(parents=True)
    (repository / "blobs").unlink()
    (tmp_path / "blobs").rename(repository / "blobs")
    target = (snapshot / "config.json").resolve()
    shutil.move(target, other / "1")
    (snapshot / "config.json").unlink()
    (snapshot / "config.json").symlink_to(Path("..", "..", "..", "models--b--tiny", "blobs", "1"))
    with pytest.raises(ModelError, match=r"config\.json does not lie in the model's folder"):
        open_source(snapshot)


def test_weights_of_a_shard_that_the_index_does_not_name(tiny_llama: Make, tmp_path: Path) -> None:
    folder = edited(tiny_llama(max_shard_size="60KB"), tmp_path / "copy")
    shards = sorted(folder.glob("model-*.safetensors"))
    tensors = safetensors.torch.load_file(shards[0])
    safetensors.torch.save_file(tensors | {"more": torch.ones(3)}, shards[0], {"format": "pt"})
    with pytest.raises(ModelError, match="tensor more does not belong to the llama model"):
        open_source(folder)
    first = next(iter(tensors))
    again = safetensors.torch.load_file(shards[1]) | {first: tensors[first]}
    safetensors.torch.save_file(again, shards[1], {"format": "pt"})
    with pytest.raises(ModelError, match=rf"{shards[1].name}: tensor {first} is in another file too"):
        open_source(folder)


def test_an_adapter_is_not_passed_over(tiny_llama: Make, tmp_path: Path) -> None:
    """transformers would add it to the weights."""
    folder = edited(tiny_llama(), tmp_path / "copy")
    (folder / "adapter_config.json").write_text("{}")
    with pytest.raises(ModelError, match="has an adapter, which is not supported; merge it into the model's weights"):
        open_source(folder)


def test_damaged_folders_are_refused(tiny_llama: Make, tmp_path: Path) -> None:
    folder = edited(tiny_llama(), tmp_path / "copy")
    weights = folder / "model.safetensors"
    content = weights.read_bytes()
    for length in (0, 5, 300, len(content) // 2, len(content) - 1):
        weights.write_bytes(content[:length])
        with pytest.raises(ModelError, match=r"model\.safetensors"):
            open_source(folder)
    weights.unlink()
    with pytest.raises(ModelError, match=r"has no model\.safetensors"):
        open_source(folder)
    for broken in ("{", "[]"):
        (folder / "config.json").write_text(broken)
        with pytest.raises(ModelError, match=r"config\.json is not"):
            open_source(folder)
    (folder / "config.json").unlink()
    with pytest.raises(ModelError, match=r"has no config\.json"):
        open_source(folder)
