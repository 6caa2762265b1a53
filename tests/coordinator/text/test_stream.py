"""The text of a stream of tokens against the library's own decoding.  pytest tests/coordinator/text/test_stream.py"""

import json
import random
import re
from itertools import chain
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders
from tokenizers.pre_tokenizers import ByteLevel

from warmfront.coordinator.text.stream import TextStream

SPECIAL = ["<s>", "</s>", "<|end|>"]
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
WORDS = [
    "▁",
    "▁▁",
    "▁warm",
    "front",
    "▁a▁b▁",
    "é",
    "▁€",
    "🌊",
    ".",
    "▁.",
    "ing",
    "##ing",
    "##",
    "n't",
    "</w>",
    "x</w>",
    "|",
]
LETTERS = sorted(ByteLevel.alphabet())
STEPS = {
    "spaces": None,
    "byte-level": decoders.ByteLevel(),
    "metaspace": decoders.Metaspace(),
    "metaspace-never": decoders.Metaspace(prepend_scheme="never"),
    "wordpiece": decoders.WordPiece(),
    "wordpiece-as-it-is": decoders.WordPiece(prefix="▁", cleanup=False),
    "strip-of-each": decoders.Sequence([decoders.Replace("▁", " "), decoders.Strip(" ", 1, 0)]),
    "strip-of-all": decoders.Sequence([decoders.WordPiece(), decoders.Fuse(), decoders.Strip(" ", 2, 0)]),
    "fuse": decoders.Fuse(),
    # Not of a form that the stream knows.
    "bpe": decoders.BPEDecoder(),
    "ctc": decoders.CTC(pad_token="##"),
    "replace-in-all": decoders.Sequence([decoders.Fuse(), decoders.Replace("▁", " ")]),
}
LLAMA = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
BYTE_FALLBACK = {
    "llama": decoders.Sequence([*LLAMA, decoders.Strip(" ", 1, 0)]),
    "gemma": decoders.Sequence(LLAMA),
    "nested": decoders.Sequence([decoders.Sequence(LLAMA[:1]), decoders.Sequence(LLAMA[1:])]),
}


def tokenizer(decoder: Any, tokens: list[str]) -> Any:
    """A tokenizer of these tokens, good for decoding only."""
    vocab = {token: number for number, token in enumerate(dict.fromkeys([*SPECIAL, *tokens]))}
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False) | {"special": True}
    added = [{"id": vocab[token], "content": token} | flags for token in SPECIAL]
    model = {"type": "WordLevel", "vocab": vocab, "unk_token": SPECIAL[0]}
    made = Tokenizer.from_str(json.dumps({"version": "1.0", "added_tokens": added, "model": model}))
    if decoder is not None:
        made.decoder = decoder
    return made


def sequences(fast: Any, seed: int, count: int) -> list[list[int]]:
    """Random token ids; unknown ones are among them, and special ones come often."""
    rng, size = random.Random(seed), fast.get_vocab_size() + 2
    return [
        [rng.choice((0, 1, rng.randrange(size), rng.randrange(size))) for _ in range(rng.randrange(10))]
        for _ in range(count)
    ]


def streamed(fast: Any, ids: list[int], prompt: list[int] | None = None) -> str:
    stream = TextStream(fast, prompt or [])
    return "".join(stream.push(token) for token in ids) + stream.rest()


def one_by_one(text: str) -> str:
    """`text` with one U+FFFD in place of several."""
    return re.sub("\ufffd+", "\ufffd", text)


@pytest.mark.parametrize("steps", STEPS)
def test_any_ids_are_what_the_library_makes_of_them(steps: str) -> None:
    fast = tokenizer(STEPS[steps], LETTERS if steps == "byte-level" else WORDS)
    shown = 0
    for ids in sequences(fast, 1, 1500):
        text = fast.decode(ids)
        assert streamed(fast, ids) == text, [fast.id_to_token(token) for token in ids]
        shown += len(text)
    assert shown > 1500


@pytest.mark.parametrize("steps", BYTE_FALLBACK)
def test_byte_tokens(steps: str) -> None:
    """As the library decodes them; where it also drops bytes before a wrong one, those that are UTF-8 are kept."""
    fast = tokenizer(BYTE_FALLBACK[steps], [*BYTES, *WORDS])
    rng, broken = random.Random(2), 0
    pieces = [[token] for token in range(fast.get_vocab_size())]
    pieces += [[fast.token_to_id(f"<0x{byte:02X}>") for byte in letter.encode()] for letter in "aé€🌊\n"] * 60
    for _ in range(3000):
        ids = list(chain.from_iterable(rng.choices(pieces, k=rng.randrange(8))))
        text = fast.decode(ids)
        got = streamed(fast, ids)
        if "\ufffd" in text:
            broken += 1
            tokens = [fast.id_to_token(token) for token in ids if token >= len(SPECIAL)]
            data = b"".join(bytes([int(t[3:5], 16)]) if t in BYTES else t.replace("▁", " ").encode() for t in tokens)
            expected = data.decode(errors="replace")
            if steps == "llama":
                expected = expected.removeprefix(" ")
            assert one_by_one(got) == one_by_one(expected), tokens
        else:
            assert got == text
    assert 500 < broken < 2500


@pytest.mark.parametrize("steps", sorted(STEPS.keys() - {"bpe"} | BYTE_FALLBACK.keys()))
def test_an_answer_goes_on_where_its_prompt_ends(steps: str) -> None:
    """The text of the prompt and the pieces of the answer are the text of both: the space between them is not lost.

    (BPEDecoder alone writes the space behind a token only when another follows.)
    """
    decoder = (STEPS | BYTE_FALLBACK)[steps]
    fast = tokenizer(decoder, LETTERS[:95] if steps == "byte-level" else WORDS)
    rng = random.Random(3)
    for ids in sequences(fast, 4, 1500):
        cut = rng.randrange(len(ids) + 1)
        assert fast.decode(ids[:cut]) + streamed(fast, ids[cut:], ids[:cut]) == fast.decode(ids)


def test_the_first_word_keeps_its_space() -> None:
    fast = tokenizer(BYTE_FALLBACK["llama"], [*BYTES, *WORDS])
    warm, front = fast.token_to_id("▁warm"), fast.token_to_id("front")
    assert streamed(fast, [warm, front]) == "warmfront"
    assert streamed(fast, [warm, front], prompt=[0]) == "warmfront"  # special tokens are not text
    assert streamed(fast, [warm, front], prompt=[0, warm]) == " warmfront"


@pytest.mark.parametrize("steps", ["byte-level", "llama"])
def test_characters_come_whole_and_at_once(steps: str) -> None:
    fast = tokenizer((STEPS | BYTE_FALLBACK)[steps], LETTERS if steps == "byte-level" else BYTES)
    ((letters, _),) = ByteLevel(add_prefix_space=False, use_regex=False).pre_tokenize_str("a€b")
    tokens = list(letters) if steps == "byte-level" else [f"<0x{byte:02X}>" for byte in "a€b".encode()]
    stream = TextStream(fast)
    assert [stream.push(fast.token_to_id(token)) for token in tokens] == ["a", "", "", "€", "b"]
    assert stream.rest() == ""


def test_half_a_character_at_the_end_is_seen() -> None:
    fast = tokenizer(STEPS["byte-level"], LETTERS)
    ids = [fast.token_to_id(letter) for letter in "aâĤ"]  # two of the three bytes of a euro sign
    stream = TextStream(fast)
    assert [stream.push(token) for token in ids] == ["a", "", ""]
    assert stream.rest() == "\ufffd"
    assert stream.rest() == ""


class WithoutDecode:
    """The library's tokenizer as far as a stream needs it, without decoding all tokens again."""

    def __init__(self, fast: Any) -> None:
        self.decoder, self.id_to_token = fast.decoder, fast.id_to_token
        self.get_added_tokens_decoder = fast.get_added_tokens_decoder


@pytest.mark.parametrize("steps", ["byte-level", "llama", "gemma", "metaspace", "wordpiece"])
def test_the_decoders_in_use_look_at_each_token_once(steps: str) -> None:
    fast = tokenizer((STEPS | BYTE_FALLBACK)[steps], [*LETTERS, *BYTES, *WORDS])
    for ids in sequences(fast, 5, 50):
        assert streamed(WithoutDecode(fast), ids) == streamed(fast, ids)


def test_without_a_tokenizer_there_is_no_text() -> None:
    assert streamed(None, [1, 2, 3], prompt=[4]) == ""
