"""The compiled merges against the tokenizers library.  pytest tests/coordinator/text/test_merging.py"""

import json
import random
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from warmfront.coordinator.models.packed_tokenizer import pack_tokenizer, unpack_tokenizer
from warmfront.coordinator.text.merging import MergingTokenizer

TEXT = Path(__file__).read_text(encoding="utf-8")
LETTERS = ["a", "b", "ab", " ", "  ", "é", "🌊", "ʬ", "\n", "x", "<end>", " <pad> ", "aaaa", "the ", "0", "12", "\r\n"]


def byte_level(**options: Any) -> Any:
    """As of Llama 3: words by an expression, then bytes."""
    tokenizer = Tokenizer(models.BPE())
    cut = pre_tokenizers.Split(Regex(r" ?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+|\s+"), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [cut, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    return trained(tokenizer, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), **options)


def sentence_piece(**options: Any) -> Any:
    """As of Llama 2: the whole text is one word; what has no token becomes bytes, or unknown."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(steps)
    return trained(tokenizer, special_tokens=["<unk>", *(f"<0x{byte:02X}>" for byte in range(256))], **options)


def trained(tokenizer: Any, size: int = 900, **options: Any) -> Any:
    trainer = trainers.BpeTrainer(vocab_size=size, show_progress=False, **options)
    tokenizer.train_from_iterator([*TEXT.split("\n"), "aaaa aaaa", "ab ab abab"], trainer)
    tokenizer.add_tokens(
        [
            AddedToken("<end>", special=True, normalized=False),
            AddedToken("<pad>", special=True, lstrip=True, rstrip=True),
            AddedToken("the", single_word=True),
        ]
    )
    return tokenizer


def with_model(tokenizer: Any, **fields: Any) -> str:
    """Its tokenizer.json, with fields of the model replaced."""
    description = json.loads(tokenizer.to_str())
    description["model"] |= fields
    return json.dumps(description)


def packed(text: str) -> MergingTokenizer:
    return MergingTokenizer(np.frombuffer(pack_tokenizer(text), np.uint8).copy())


def texts(seed: int, count: int) -> list[str]:
    rng, words = random.Random(seed), TEXT.split(" ")
    made = ["".join(rng.choices(LETTERS + words[:200], k=rng.randrange(12))) for _ in range(count)]
    return [*made, TEXT, "", " ", "a" * 1000]


WITH_TABLES = {
    "byte-level": lambda: with_model(byte_level()),
    "whole-words": lambda: with_model(byte_level(), ignore_merges=True),
    # Whole words that the merges would not make.
    "whole-words-only": lambda: with_model(byte_level(), ignore_merges=True, merges=[["a", "b"]]),
    "byte-fallback": lambda: with_model(sentence_piece(), byte_fallback=True),
    "unknown": lambda: with_model(sentence_piece(), unk_token="<unk>"),
    "unknown-fused": lambda: with_model(sentence_piece(), unk_token="<unk>", fuse_unk=True),
    "dropped": lambda: with_model(sentence_piece()),
    "equal-merges": lambda: with_model(byte_level(), merges=[["a", "b"], ["b", "a"], ["a", "b"]], vocab=EQUAL),
}
EQUAL = {letter: i for i, letter in enumerate([*sorted(pre_tokenizers.ByteLevel.alphabet()), "ab", "ba"])}


@pytest.mark.parametrize("kind", WITH_TABLES)
def test_the_same_ids_and_texts(kind: str) -> None:
    text = WITH_TABLES[kind]()
    theirs, ours = Tokenizer.from_str(text), packed(text)
    kept = json.loads(unpack_tokenizer(np.frombuffer(pack_tokenizer(text), np.uint8)).json)["model"]
    assert kept["merges"] == []
    for sample in texts(len(kind), 300):
        ids = theirs.encode(sample, add_special_tokens=False).ids
        assert ours.encode(sample) == ids, sample
        assert ours.decode(ids) == theirs.decode(ids)
    for token in range(theirs.get_vocab_size() + 3):
        assert ours.id_to_token(token) == theirs.id_to_token(token)
    assert ours.get_added_tokens_decoder() == theirs.get_added_tokens_decoder()


@pytest.mark.parametrize("kind", ["suffix", "letters-are-missing", "words", "a-letter-added", "a-huge-id"])
def test_others_are_kept_as_they_are(kind: str) -> None:
    made: Any = byte_level(end_of_word_suffix="</w>") if kind == "suffix" else byte_level(size=400)
    if kind == "words":
        made = Tokenizer(models.WordLevel({"a": 0, "b": 1, "?": 2}, "?"))
        made.pre_tokenizer = pre_tokenizers.Whitespace()
    elif kind == "a-letter-added":
        made.add_tokens([AddedToken("🌊", single_word=True)])
    text = made.to_str()
    if kind == "letters-are-missing":
        text = with_model(made, ignore_merges=True, merges=[], vocab={"Ġthe": 0, "a": 1, "the": 2})
    elif kind == "a-huge-id":
        text = with_model(made, vocab=json.loads(text)["model"]["vocab"] | {"zz": 1 << 31})
    theirs, ours = Tokenizer.from_str(text), packed(text)
    assert unpack_tokenizer(np.frombuffer(pack_tokenizer(text), np.uint8)).tables is None
    for sample in texts(7, 50):
        ids = theirs.encode(sample, add_special_tokens=False).ids
        assert ours.encode(sample) == ids
        assert ours.decode(ids) == theirs.decode(ids)


def test_a_long_word_takes_no_longer_than_its_length() -> None:
    ours = packed(with_model(sentence_piece(), byte_fallback=True))
    ours.encode("a")
    started = time.process_time()
    assert len(ours.encode("ab" * 100_000)) > 10_000
    assert time.process_time() - started < 3
