"""The text of an answer while its tokens come: each token is decoded once, not all of them again with every token.

A tokenizer's decoder is a chain of steps over the texts of the tokens. Those in use fit one form:

    steps that look at one token, and whether it is the first    Replace, Strip, Metaspace, WordPiece
    its bytes: ByteLevel's alphabet, or tokens like <0x0A>       ByteLevel, ByteFallback
    after Fuse, steps on the whole text                          Strip at its beginning

So each token id stands for some bytes. They go through a UTF-8 decoder that waits for the rest of a character and
writes U+FFFD for bytes that are not one: ByteLevel once for the beginning of a character, ByteFallback for every byte.
(At a wrong byte ByteFallback replaces the whole run of byte tokens, even letters that were already shown; only there
does the stream differ from `Tokenizer.decode`.) For any other chain all tokens are decoded anew with each, and what has
been added is shown.
"""

import codecs
import json
import re
from collections.abc import Callable, Sequence
from typing import Any

from tokenizers import Tokenizer as FastTokenizer
from tokenizers.pre_tokenizers import ByteLevel

__all__ = ["TextStream", "token_speller"]

_BYTE_TOKEN = re.compile("<0x([0-9A-Fa-f]{2})>")
_EVERY_BYTE = "warmfront.every_byte"


def _replace_every_byte(error: UnicodeError) -> tuple[str, int]:
    assert isinstance(error, UnicodeDecodeError)
    return "\ufffd" * (error.end - error.start), error.end


codecs.register_error(_EVERY_BYTE, _replace_every_byte)


def _alphabet() -> dict[str, int]:
    """The byte of each letter in ByteLevel's alphabet: printable ones are themselves, others follow from U+0100."""
    printable = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    hidden = (byte for byte in range(256) if byte not in printable)
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(hidden)}


_ALPHABET = _alphabet()
assert _ALPHABET.keys() == set(ByteLevel.alphabet())


class TextStream:
    """The text of a growing answer to `prompt`; a character of several tokens comes whole, a broken one as U+FFFD."""

    def __init__(self, fast: Any, prompt: Sequence[int] = ()) -> None:
        self._decoder = _NoText() if fast is None else _by_token(fast) or _Redecoder(fast)
        self._decoder.skip(prompt)

    def push(self, token: int) -> str:
        """The text that `token` completes."""
        return self._decoder.push(token)

    def rest(self) -> str:
        """What is left of an incomplete character at the end of the answer."""
        return self._decoder.rest()


def token_speller(fast: Any) -> Callable[[int], bytes]:
    """A function of a token: the bytes that it adds to a text that has begun; none if it is special or unknown."""
    decoder = _by_token(fast)
    if decoder is None:
        return lambda token: str(fast.decode([token])).encode()
    return lambda token: decoder.spell(token, False) or b""


class _NoText:
    """Without a tokenizer there is no text."""

    def skip(self, _ids: Sequence[int]) -> None:
        pass

    def push(self, _token: int) -> str:
        return ""

    def rest(self) -> str:
        return ""


class _TokenDecoder:
    """Decodes the bytes of one token after the other."""

    def __init__(
        self, spell: Callable[[int, bool], bytes | None], errors: str = "replace", strip: str = "", max_strip: int = 0
    ) -> None:
        """`spell`: bytes of a token, the first or a later one; up to `max_strip` letters `strip` in front are cut."""
        self.spell = spell
        self._known: dict[int, bytes | None] = {}
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors)
        self._started = False
        self._strip, self._max_strip = strip, max_strip

    def skip(self, ids: Sequence[int]) -> None:
        for token in ids:
            self.push(token)
        self.rest()

    def push(self, token: int) -> str:
        if not self._started:
            spelled = self.spell(token, True)
            self._started = spelled is not None
        elif token in self._known:
            spelled = self._known[token]
        else:
            spelled = self._known[token] = self.spell(token, False)
        return self._stripped(self._utf8.decode(spelled)) if spelled else ""

    def rest(self) -> str:
        text = self._stripped(self._utf8.decode(b"", final=True))
        self._utf8.reset()
        return text

    def _stripped(self, text: str) -> str:
        while self._max_strip and text:
            if text[0] != self._strip:
                self._max_strip = 0
            else:
                text, self._max_strip = text[1:], self._max_strip - 1
        return text


class _Redecoder:
    """Decodes all tokens with each new one: right for any decoder, and slower the longer the answer is."""

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

    def _new(self, incomplete: str) -> str:
        """What has been added to the text, without letters `incomplete` at its end."""
        text = str(self._fast.decode(self._ids)).rstrip(incomplete)
        new = text[self._shown :]
        self._shown = max(self._shown, len(text))
        return new


def _by_token(fast: Any) -> _TokenDecoder | None:
    """The stream for a decoder of the form above; None for any other."""
    if fast.decoder is None:  # then the library joins the tokens with spaces
        return _TokenDecoder(_speller(fast, lambda text, first: text.encode() if first else b" " + text.encode()))
    steps = _flat(json.loads(fast.decoder.__getstate__()))
    kinds = [step["type"] for step in steps]
    count = next((i for i, step in enumerate(steps) if not _is_by_token(step)), len(steps))
    by_token, kinds = _decoder(steps[:count]), kinds[count:]
    to_bytes: Callable[[str], bytes] = str.encode
    errors, strip, max_strip = "replace", "", 0
    if kinds == ["ByteLevel"]:
        to_bytes, kinds = _byte_level, []
    elif kinds[:1] == ["ByteFallback"]:
        to_bytes, errors, kinds = _byte_fallback, _EVERY_BYTE, kinds[1:]
    if kinds == ["Fuse", "Strip"] and not steps[-1]["stop"]:
        strip, max_strip = steps[-1]["content"], steps[-1]["start"]
    elif kinds not in ([], ["Fuse"]):
        return None

    def spell(text: str, first: bool) -> bytes:
        # An empty token in front adds nothing, and makes this one a later one.
        return to_bytes(text if by_token is None else by_token.decode([text] if first else ["", text]))

    return _TokenDecoder(_speller(fast, spell), errors, strip, max_strip)


def _speller(fast: Any, spell: Callable[[str, bool], bytes]) -> Callable[[int, bool], bytes | None]:
    """The bytes of a token by its id; None for special and unknown ones, which are not text."""
    special = {token.content for token in fast.get_added_tokens_decoder().values() if token.special}

    def of_id(token: int, first: bool) -> bytes | None:
        text = fast.id_to_token(token)
        return None if text is None or text in special else spell(text, first)

    return of_id


def _flat(step: dict[str, Any]) -> list[dict[str, Any]]:
    """The steps of nested sequences in one list."""
    return [s for inner in step["decoders"] for s in _flat(inner)] if step["type"] == "Sequence" else [step]


def _is_by_token(step: dict[str, Any]) -> bool:
    """Whether the step needs one token only, and whether it is the first. (Strip at the end panics on empty tokens.)"""
    return step["type"] in ("Replace", "Metaspace", "WordPiece") or (step["type"] == "Strip" and not step["stop"])


def _decoder(steps: list[dict[str, Any]]) -> Any:
    """The library's decoder with these steps; None without steps."""
    if not steps:
        return None
    empty = {"type": "BPE", "vocab": {}, "merges": []}
    chain = {"type": "Sequence", "decoders": steps}
    return FastTokenizer.from_str(json.dumps({"version": "1.0", "model": empty, "decoder": chain})).decoder


def _byte_level(text: str) -> bytes:
    """The bytes of a text in ByteLevel's alphabet; a text with any other letter stands for itself."""
    try:
        return bytes(_ALPHABET[letter] for letter in text)
    except KeyError:
        return text.encode()


def _byte_fallback(text: str) -> bytes:
    match = _BYTE_TOKEN.fullmatch(text)
    return bytes([int(match[1], 16)]) if match else text.encode()
