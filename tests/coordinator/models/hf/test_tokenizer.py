"""The tokenizer of a folder against transformers.  pytest tests/coordinator/models/hf/test_tokenizer.py"""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors.torch
import torch
import transformers
from tokenizers import Tokenizer

from tests.coordinator.models.hf.folders import edited
from warmfront.coordinator.models.open import open_source
from warmfront.coordinator.models.source import TokenizerFiles
from warmfront.shared.errors import ModelError

Make = Callable[..., Path]


def test_tokenizer(tiny_llama: Make, tmp_path: Path) -> None:
    folder = edited(tiny_llama(), tmp_path / "copy")
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    files = open_source(folder).tokenizer
    assert files is not None
    assert files.json == (folder / "tokenizer.json").read_text()
    assert files.bos_id == theirs.bos_token_id
    assert files.chat_templates == {"default": theirs.chat_template}
    assert set(files.eos_ids) == set(theirs.convert_tokens_to_ids(["<|endoftext|>", "<|im_end|>"]))
    assert files.add_bos is False

    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings |= {"bos_token": {"content": "<|im_start|>"}, "add_bos_token": True}
    settings["chat_template"] = [{"name": "tool_use", "template": "no"}, {"name": "default", "template": "yes"}]
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "generation_config.json").write_text('{"eos_token_id": [7, 9]}')
    files = open_source(folder).tokenizer
    assert files is not None
    assert (files.bos_id, files.add_bos, files.chat_templates) == (1, True, {"default": "yes", "tool_use": "no"})
    assert set(files.eos_ids) == {0, 2, 7, 9}
    (folder / "chat_template.jinja").write_text("from the file")
    reopened = open_source(folder).tokenizer
    assert reopened is not None
    assert reopened.chat_templates == {"default": "from the file"}


@pytest.mark.parametrize("role", ["bos_token", "eos_token"])
def test_a_begin_or_end_beyond_the_embedding(tiny_llama: Make, tmp_path: Path, role: str) -> None:
    folder = edited(tiny_llama(), tmp_path / "copy")
    settings = {role: "<|new|>", "added_tokens_decoder": {"300": {"content": "<|new|>", "special": True}}}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    with pytest.raises(ModelError, match=rf"field {role} is '<\|new\|>', not one of the 300 tokens that the weights"):
        open_source(folder)


def test_tokens_that_only_the_settings_have(tiny_llama: Make, tmp_path: Path) -> None:
    """transformers adds them to those of tokenizer.json; the end token that they name ends answers."""
    folder = edited(tiny_llama(), tmp_path / "copy", vocab_size=310, eos_token_id=None)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    word = Tokenizer.from_file(str(folder / "tokenizer.json")).id_to_token(270)
    spaces = {"lstrip": False, "rstrip": False, "single_word": False}
    added = {
        "2": {"content": "<|im_end|>", "special": True, "normalized": False} | spaces,
        "270": {"content": word, "special": True, "normalized": False} | spaces,
        "300": {"content": "<|user|>", "special": True, "normalized": False} | spaces,
        "301": {"content": "warm", "special": False, "normalized": True} | spaces | {"lstrip": True},
        "302": {"content": "<|stop|>", "special": True, "normalized": False} | spaces,
    }
    settings |= {"added_tokens_decoder": added, "eos_token": "<|stop|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "generation_config.json").unlink(missing_ok=True)
    with_embedding(folder, 310)
    files, theirs = open_source(folder).tokenizer, transformers.AutoTokenizer.from_pretrained(folder)
    assert files is not None
    ours = Tokenizer.from_str(files.json)
    for text in ("<|user|>The lighthouse keeper  warm<|stop|> front<|im_end|>", "lukewarm water", f"a{word} b"):
        assert ours.encode(text, add_special_tokens=False).ids == theirs.encode(text, add_special_tokens=False)
    assert files.special_tokens["eos_token"] == theirs.eos_token
    assert set(files.eos_ids) == {0, 2, 302}


def with_embedding(folder: Path, vocab: int) -> None:
    """Weights with rows for more tokens than the tokenizer has."""
    tensors = safetensors.torch.load_file(folder / "model.safetensors")
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        tensors[name] = torch.zeros(vocab, 64)
    safetensors.torch.save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def check_as_transformers(folder: Path) -> TokenizerFiles:
    files, theirs = open_source(folder).tokenizer, transformers.AutoTokenizer.from_pretrained(folder)
    assert files is not None
    ours = Tokenizer.from_str(files.json)
    for text in ("a <|user|>  b", "x<|end|>\n\n y", "the warm front<|im_end|> z", "a<|more|> <|pad|> b", "a<tool> b"):
        assert ours.encode(text, add_special_tokens=False).ids == theirs.encode(text, add_special_tokens=False), text
    assert files.special_tokens == {name: str(text) for name, text in theirs.special_tokens_map.items()}
    return files


def test_flags_of_the_settings_go_before_those_of_the_tokenizer(tiny_llama: Make, tmp_path: Path) -> None:
    """White space around a special token belongs to it, as with Phi-3."""
    folder = edited(tiny_llama(), tmp_path / "copy")
    spaces = {"lstrip": True, "rstrip": True, "single_word": False, "normalized": False, "special": True}
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings |= {"added_tokens_decoder": {"2": {"content": "<|im_end|>"} | spaces}}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    check_as_transformers(folder)


def test_folders_from_before_the_settings_listed_tokens(tiny_llama: Make, tmp_path: Path) -> None:
    """added_tokens.json has the ids, special_tokens_map.json says which are special; it goes before the settings."""
    folder = edited(tiny_llama(), tmp_path / "copy", vocab_size=306, eos_token_id=None)
    (folder / "generation_config.json").unlink(missing_ok=True)
    with_embedding(folder, 306)
    (folder / "added_tokens.json").write_text(json.dumps({"<|end|>": 301, "<|user|>": 300, "warm": 302}))
    end = {"content": "<|end|>", "lstrip": False, "rstrip": False, "single_word": False, "normalized": False}
    named = {"eos_token": end, "pad_token": "<|pad|>", "additional_special_tokens": ["<|more|>", "<|user|>", "<tool>"]}
    (folder / "special_tokens_map.json").write_text(json.dumps(named))
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings |= {"unk_token": "<|endoftext|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    files = check_as_transformers(folder)
    assert set(files.eos_ids) == {0, 2, 301}
    assert files.special_tokens["eos_token"] == "<|end|>"


def test_begin_token_of_the_post_processor(tiny_llama: Make, tmp_path: Path) -> None:
    from tokenizers import processors

    folder = edited(tiny_llama(), tmp_path / "copy")
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)]
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    files = open_source(folder).tokenizer
    assert files is not None
    assert (files.bos_id, files.add_bos) == (0, True)


def test_without_or_with_a_broken_tokenizer(tiny_llama: Make, tmp_path: Path) -> None:
    folder = edited(tiny_llama(), tmp_path / "copy")
    (folder / "tokenizer.json").write_text('{"version": "1.0"}')
    with pytest.raises(ModelError, match=r"tokenizer\.json is not a tokenizer"):
        open_source(folder)
    (folder / "tokenizer.json").unlink()
    assert open_source(folder).tokenizer is None
