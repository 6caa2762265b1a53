"""What GGUF files do not say of their tokens and llama.cpp knows by their texts.

pytest tests/coordinator/models/gguf/test_tokenizer_texts.py
"""

import unicodedata
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer
from tokenizers.pre_tokenizers import ByteLevel

from warmfront.coordinator.models.gguf.tokenizer import read_tokenizer
from warmfront.coordinator.models.source import TokenizerFiles
from warmfront.shared.errors import ModelError

PATH = Path("model.gguf")
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, BYTE = 1, 2, 3, 4, 6
LETTERS = sorted(ByteLevel.alphabet())


def sentence_piece(*more: tuple[str, int], **fields: Any) -> dict[str, Any]:
    """The fields of a small vocabulary: special tokens, bytes, letters, two longer pieces, then `more` (text, type)."""
    pieces = ["\u2581", *"hiterxU", "hi", "\u2581x"]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *pieces]
    types = [UNKNOWN, CONTROL, CONTROL, *[BYTE] * 256, *[NORMAL] * len(pieces)]
    named = {
        "model": "llama",
        "tokens": [*tokens, *(text for text, _ in more)],
        "token_type": [*types, *(kind for _, kind in more)],
        "scores": [-float(i) for i in range(len(tokens))] + [-1000.0] * len(more),
    }
    return {f"tokenizer.ggml.{name}": value for name, value in named.items()} | fields


def byte_level(*more: tuple[str, int], merges: tuple[str, ...] = (), **fields: Any) -> dict[str, Any]:
    named = {
        "model": "gpt2",
        "pre": "gpt-2",
        "tokens": [*LETTERS, *(text for text, _ in more)],
        "token_type": [NORMAL] * 256 + [kind for _, kind in more],
        "merges": list(merges),
    }
    return {f"tokenizer.ggml.{name}": value for name, value in named.items()} | fields


def read(fields: dict[str, Any]) -> TokenizerFiles:
    files = read_tokenizer(PATH, fields)
    assert files is not None
    return files


def encoded(fields: dict[str, Any], text: str) -> list[str]:
    """The texts of the tokens."""
    tokenizer = Tokenizer.from_str(read(fields).json)
    return [tokenizer.id_to_token(token) for token in tokenizer.encode(text, add_special_tokens=False).ids]


def ends(fields: dict[str, Any]) -> set[str]:
    tokens = fields["tokenizer.ggml.tokens"]
    return {tokens[i] for i in read(fields).eos_ids}


@pytest.mark.parametrize("kind", [NORMAL, CONTROL, USER_DEFINED])
@pytest.mark.parametrize("make", [sentence_piece, byte_level])
def test_an_end_is_known_by_its_text_whatever_its_type(make: Any, kind: int) -> None:
    texts = ("<|im_end|>", "<|eot_id|>", "<end_of_utterance>", "<EOT>", "[EOS]", "<|fim_pad|>", "<|file_sep|>")
    fields = make(*((text, kind) for text in texts), ("<|im_start|>", kind))
    assert ends(fields) - {"</s>"} == set(texts)
    assert encoded(fields, "hi<|im_end|>x")[-2:] == ["<|im_end|>", "\u2581x" if make is sentence_piece else "x"]
    special = Tokenizer.from_str(read(fields).json).get_added_tokens_decoder()
    assert {token.content for token in special.values() if token.special} >= set(texts)


def test_ends_that_the_file_names() -> None:
    more = [(f"<{name}>", CONTROL) for name in ("a", "b", "c", "d", "e", "f")]
    keys = ("eos", "eot", "eom", "fim_pad", "fim_rep", "fim_sep")
    fields = byte_level(*more, **{f"tokenizer.ggml.{key}_token_id": 256 + i for i, key in enumerate(keys)})
    assert ends(fields) == {text for text, _ in more}


@pytest.mark.parametrize(
    ("beside", "text", "ended"),
    [
        (("<|return|>", "<|call|>"), "<|end|>", False),
        (("<|calls|>", "<|flush|>"), "<|end|>", False),
        (("<|return|>",), "<|end|>", True),
        (("<|tool_response>",), "</s>", False),
        ((), "</s>", True),
    ],
)
def test_a_part_of_an_answer_ends_with_what_ends_others(beside: tuple[str, ...], text: str, ended: bool) -> None:
    """gpt-oss' reasoning, for one."""
    fields = byte_level(*((token, CONTROL) for token in (*beside, text)))
    assert ends(fields) == {*beside, text} - ({text} if not ended else set())
    declared = fields | {"tokenizer.ggml.eos_token_id": 256 + len(beside)}
    assert text in ends(declared)


@pytest.mark.parametrize("name", ["Phi-3 mini", "phi3", "other"])
def test_white_space_behind_special_tokens_of_phi_3(name: str) -> None:
    more = (("<|user|>", CONTROL), ("<|end|>", USER_DEFINED), ("<|endoftext|>", CONTROL))
    fields = sentence_piece(*more, **{"general.name": name})
    strips = name != "other"
    assert encoded(fields, "<|user|>\nhi") == ["<|user|>", "\u2581", *["<0x0A>"] * (not strips), "hi"]
    assert encoded(fields, "<|end|>\n\n") == ["<|end|>", *["\u2581", "<0x0A>", "<0x0A>"] * (not strips)]
    assert encoded(fields, "</s> x") == ["</s>", *([] if strips else ["\u2581"]), "\u2581x"]
    assert encoded(fields, "<s>\n") == ["<s>", "\u2581", "<0x0A>"]
    assert encoded(fields, "<|endoftext|> ") == ["<|endoftext|>", "\u2581", "\u2581"]


def test_a_merge_whose_result_is_no_token_is_left_out() -> None:
    fields = byte_level(("hi", NORMAL), merges=("h i", "hi ,", "zzz y"))
    assert encoded(fields, "hi,") == ["hi", ","]


def test_qwen_composes_letters_as_its_own_tokenizer_does() -> None:
    text = unicodedata.normalize("NFD", "\u00e9")
    assert len(encoded(byte_level(), text)) == 3
    assert len(encoded(byte_level(**{"tokenizer.ggml.pre": "qwen2"}), text)) == 2


def test_a_pre_tokenizer_is_not_guessed() -> None:
    with pytest.raises(ModelError, match="pre-tokenizer 'brand-new' is not known, and with another one many token ids"):
        read(byte_level(**{"tokenizer.ggml.pre": "brand-new"}))
    without = byte_level()
    del without["tokenizer.ggml.pre"]
    files = read(without)
    assert files.note == "the file names no pre-tokenizer: words are cut as by default, answers may suffer"
    assert files.json == read(byte_level(**{"tokenizer.ggml.pre": "default"})).json


def test_templates_and_the_tokens_that_they_know() -> None:
    templates = {
        "tokenizer.chat_template": "a",
        "tokenizer.chat_template.tool_use": "b",
        "tokenizer.chat_templates": ["x"],
    }
    files = read(sentence_piece(("<pad>", CONTROL), **templates, **{"tokenizer.ggml.padding_token_id": 269}))
    assert files.chat_templates == {"default": "a", "tool_use": "b"}
    assert files.special_tokens["eos_token"] == "</s>"
    assert {name: files.special_tokens[name] for name in ("bos_token", "unk_token")} == {
        "bos_token": "<s>",
        "unk_token": "<unk>",
    }
    assert read(byte_level()).special_tokens == {}
