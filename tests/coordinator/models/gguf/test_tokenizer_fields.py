"""Tokenizer fields that are refused.  pytest tests/coordinator/models/gguf/test_tokenizer_fields.py"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from warmfront.coordinator.models.open import open_source
from warmfront.shared.errors import ModelError

Make = Callable[..., Path]
WORDS: dict[str, Any] = {
    "tokenizer.ggml.model": "llama",
    "tokenizer.ggml.tokens": [f"w{i}" for i in range(64)],
    "tokenizer.ggml.scores": [-float(i) for i in range(64)],
    "tokenizer.ggml.token_type": [2, 3, 3, *[1] * 61],
}
IDS = ("bos", "eos", "eot", "eom")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        *(
            (
                {f"tokenizer.ggml.{name}_token_id": value},
                rf"field tokenizer\.ggml\.{name}_token_id is .* token id below 64",
            )
            for name in IDS
            for value in (64, 2**31, 2**32 - 2, "two", 1.0, True, [2])
        ),
        ({"tokenizer.chat_template": 3}, "field tokenizer.chat_template is 3, not a text"),
        ({"tokenizer.ggml.add_bos_token": 1}, "field tokenizer.ggml.add_bos_token is 1, not true or false"),
        ({"tokenizer.ggml.add_space_prefix": "no"}, "add_space_prefix is 'no', not true or false"),
        ({"tokenizer.ggml.model": 5}, "field tokenizer.ggml.model is 5, not a text"),
        ({"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.merges": [1]}, "merges is .*, not a list of texts"),
        ({"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.merges": ["w1 w9"], "tokenizer.ggml.pre": 5}, "pre is 5"),
        ({"tokenizer.ggml.tokens": [1] * 64}, "tokens is .*, not a list of texts"),
        ({"tokenizer.ggml.tokens": "w"}, "tokens is 'w', not a list of texts"),
        ({"tokenizer.ggml.tokens": ["w"] * 63}, "token_type is .*, not a list of 63 numbers"),
        ({"tokenizer.ggml.tokens": [*WORDS["tokenizer.ggml.tokens"][:63], "w" * 2000]}, "more than 1024 characters"),
        ({"tokenizer.ggml.scores": [1.0]}, r"scores is .*, not a list of 64 numbers"),
        ({"tokenizer.ggml.scores": [float("nan")] * 64}, "scores is .*, not a list of 64 numbers"),
        ({"tokenizer.ggml.token_type": ["1"] * 64}, "token_type is .*, not a list of 64 numbers"),
    ],
)
def test_tokenizers_that_are_refused(tiny_gguf: Make, fields: dict[str, Any], message: str) -> None:
    path = tiny_gguf(fields=WORDS | fields)
    with pytest.raises(ModelError, match=message) as caught:
        open_source(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert str(caught.value).isprintable()


def test_more_tokens_than_the_embedding(tiny_gguf: Make) -> None:
    tokens = {"tokens": [f"w{i}" for i in range(65)], "scores": [0.0] * 65, "token_type": [1] * 65}
    path = tiny_gguf(fields=WORDS | {f"tokenizer.ggml.{name}": value for name, value in tokens.items()})
    with pytest.raises(ModelError, match=r"more tokens than the 64 rows of token_embd\.weight"):
        open_source(path)


def test_ids_of_minus_one_are_none(tiny_gguf: Make) -> None:
    """Where llama.cpp warns and goes on, too: as some converters write them."""
    ids = dict.fromkeys((f"tokenizer.ggml.{name}_token_id" for name in IDS), 2**32 - 1)
    path = tiny_gguf(fields=WORDS | ids)
    files = open_source(path).tokenizer
    assert files is not None
    assert (files.bos_id, files.eos_ids, files.add_bos) == (None, (), False)
    assert files.special_tokens == {"unk_token": "w0"}
    data = path.read_bytes()
    for name in IDS:
        key = f"tokenizer.ggml.{name}_token_id".encode()
        data = data.replace(key + b"\4\0\0\0", key + b"\5\0\0\0")  # the same as int32
    path.write_bytes(data)
    assert open_source(path).tokenizer == files
