"""The text of an answer while its tokens come: what a token adds is found once, not by decoding all of them again.

A tokenizer's decoder is a chain of steps over the tokens' texts. Those in use fit one form:

    steps that look at one token, and whether it is the first    Replace, Strip, Metaspace, WordPiece
    its bytes: ByteLevel's alphabet, or tokens like <0x0A>       ByteLevel, ByteFallback
    after Fuse, steps on the whole text                          Strip at its beginning

So a token is some bytes, known by its id; the bytes go through a decoder of UTF-8 that waits for the rest of a
character and writes U+FFFD for what is not one: ByteLevel once for the beginning of a character, ByteFallback for every
byte. (At a wrong byte ByteFallback gives up the whole run of byte tokens, even letters that were shown; only then the
stream differs from `Tokenizer.decode`.) For any other chain the tokens are decoded anew with each, and what has been
added is shown.
"""

import codecs
import json
import re
from collections.abc import Callable, Sequence
from typing import Any

from tokenizers import Tokenizer as FastTokenizer
from tokenizers.pre_tokenizers import ByteLevel

__all__ = ["TextStream"]

_BYTE_TOKEN = re.compile("<0x([0-9A-Fa-f]{2})>")
_EVERY_BYTE = "warmfront.every_byte"


def _replace_every_byte(error: UnicodeError) -> tuple[str, int]:
    assert isinstance(error, UnicodeDecodeError)
    return "\ufffd" * (error.end - error.start), error.end


codecs.register_error(_EVERY_BYTE, _replace_every_byte)


def _alphabet() -> dict[str, int]:
    """The byte that each letter of ByteLevel stands for: printable ones for themselves, the others from U+0100 on."""
    printable = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    hidden = (byte for byte in range(256) if byte not in printable)
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(hidden)}


_ALPHABET = _alphabet()
assert _ALPHABET.keys() == set(ByteLevel.alphabet())


class TextStream:
    """Text of a growing answer to `prompt`; a character that spans tokens comes out whole, a broken one as U+FFFD."""

    def __init__(self, fast: Any, prompt: Sequence[int] = ()) -> None:
        self._decoder = _Nothing() if fast is None else _by_token(fast) or _Again(fast)
        self._decoder.skip(prompt)

    def push(self, token: int) -> str:
        """The text that `token` completes."""
        return self._decoder.push(token)

    def rest(self) -> str:
        """What is left of an incomplete character when the answer has ended."""
        return self._decoder.rest()


class _Nothing:
    """Without a tokenizer there is no text."""

    def skip(self, _ids: Sequence[int]) -> None:
        pass

    def push(self, _token: int) -> str:
        return ""

    def rest(self) -> str:
        return ""


class _ByToken:
    """Adds up the tokens' bytes."""

    def __init__(
        self, spell: Callable[[int, bool], bytes | None], errors: str = "replace", strip: str = "", most: int = 0
    ) -> None:
        """`spell`: bytes of a token, the first or a later one; up to `most` letters `strip` are left out in front."""
        self._spell = spell
        self._known: dict[int, bytes | None] = {}
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors)
        self._begun = False
        self._strip, self._most = strip, most

    def skip(self, ids: Sequence[int]) -> None:
        for token in ids:
            self.push(token)
        self.rest()

    def push(self, token: int) -> str:
        if not self._begun:
            spelled = self._spell(token, True)
            self._begun = spelled is not None
        elif token in self._known:
            spelled = self._known[token]
        else:
            spelled = self._known[token] = self._spell(token, False)
        return self._stripped(self._utf8.decode(spelled)) if spelled else ""

    def rest(self) -> str:
        text = self._stripped(self._utf8.decode(b"", final=True))
        self._utf8.reset()
        return text

    def _stripped(self, text: str) -> str:
        while self._most and text:
            if text[0] != self._strip:
                self._most = 0
            else:
                text, self._most = text[1:], self._most - 1
        return text


class _Again:
    """Decodes all tokens with each: right for any decoder, and slower the longer the answer is."""

    def __init__(self, fast: Any) -> None:
        self._fast = fast
        self._ids: list[int] = []
        self._shown = 0

    def skip(self, ids: Sequence[int]) -> None:
        self._ids += ids
        self.rest()

    def push(self, token: int) -> str:
        self._ids.append(token)
        return self._new("\ufffd")

    def rest(self) -> str:
        return self._new("")

    def _new(self, unripe: str) -> str:
        """What has been added to the text, without letters `unripe` at its end."""
        text = str(self._fast.decode(self._ids)).rstrip(unripe)
        new = text[self._shown :]
        self._shown = max(self._shown, len(text))
        return new


def _by_token(fast: Any) -> _ByToken | None:
    """The tokens' bytes by the tokenizer's own decoder; None if its steps are not of the form above."""
    if fast.decoder is None:  # the library puts spaces between the tokens
        return _ByToken(_speller(fast, lambda text, first: text.encode() if first else b" " + text.encode()))
    steps = _flat(json.loads(fast.decoder.__getstate__()))
    kinds = [step["type"] for step in steps]
    count = next((i for i, step in enumerate(steps) if not _is_by_token(step)), len(steps))
    by_token, kinds = _decoder(steps[:count]), kinds[count:]
    to_bytes: Callable[[str], bytes] = str.encode
    errors, strip, most = "replace", "", 0
    if kinds == ["ByteLevel"]:
        to_bytes, kinds = _byte_level, []
    elif kinds[:1] == ["ByteFallback"]:
        to_bytes, errors, kinds = _byte_fallback, _EVERY_BYTE, kinds[1:]
    if kinds == ["Fuse", "Strip"] and not steps[-1]["stop"]:
        strip, most = steps[-1]["content"], steps[-1]["start"]
    elif kinds not in ([], ["Fuse"]):
        return None

    def spell(text: str, first: bool) -> bytes:
        # After an empty token, which adds nothing, it is not the first.
        return to_bytes(text if by_token is None else by_token.decode([text] if first else ["", text]))

    return _ByToken(_speller(fast, spell), errors, strip, most)


def _speller(fast: Any, spell: Callable[[str, bool], bytes]) -> Callable[[int, bool], bytes | None]:
    """Bytes of a token by its id; None for special and unknown ones, which are left out of a text."""
    special = {token.content for token in fast.get_added_tokens_decoder().values() if token.special}

    def of_id(token: int, first: bool) -> bytes | None:
        text = fast.id_to_token(token)
        return None if text is None or text in special else spell(text, first)

    return of_id


def _flat(step: dict[str, Any]) -> list[dict[str, Any]]:
    return [s for inner in step["decoders"] for s in _flat(inner)] if step["type"] == "Sequence" else [step]


def _is_by_token(step: dict[str, Any]) -> bool:
    """Whether it looks at one token, and whether that is the first. (Strip at the end panics at an empty token.)"""
    return step["type"] in ("Replace", "Metaspace", "WordPiece") or (step["type"] == "Strip" and not step["stop"])


def _decoder(steps: list[dict[str, Any]]) -> Any:
    """The library's decoder with these steps; None for none."""
    if not steps:
        return None
    empty = {"type": "BPE", "vocab": {}, "merges": []}
    chain = {"type": "Sequence", "decoders": steps}
    return FastTokenizer.from_str(json.dumps({"version": "1.0", "model": empty, "decoder": chain})).decoder


def _byte_level(text: str) -> bytes:
    """Text with a letter outside the alphabet stands for itself."""
    try:
        return bytes(_ALPHABET[letter] for letter in text)
    except KeyError:
        return text.encode()


def _byte_fallback(text: str) -> bytes:
    match = _BYTE_TOKEN.fullmatch(text)
    return bytes([int(match[1], 16)]) if match else text.encode()
