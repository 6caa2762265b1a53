"""Encoding and decoding with a packed tokenizer: the library up to the characters of words, compiled merges from there.

Has what the rest asks of the library's own tokenizer, under its names.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from warmfront.coordinator.models.packed_tokenizer import unpack_tokenizer
from warmfront.coordinator.models.tokenizer_json import load_tokenizer

__all__ = ["MergingTokenizer"]


class MergingTokenizer:
    """The tokenizer of a packed model's bytes, as `pack_tokenizer` makes them: the same ids as the library's."""

    def __init__(self, data: npt.NDArray[np.uint8]) -> None:
        packed = unpack_tokenizer(data)
        self._fast = load_tokenizer(packed.json)
        self._tables, self._whole_words = packed.tables, packed.whole_words
        self.decoder = self._fast.decoder
        self._special = {token.content for token in self.get_added_tokens_decoder().values() if token.special}

    def get_added_tokens_decoder(self) -> dict[int, Any]:
        """The tokens that are found in the text before it is cut into words, with their flags, by id."""
        added: dict[int, Any] = self._fast.get_added_tokens_decoder()
        return added

    def id_to_token(self, token: int) -> str | None:
        """The text of a token as the vocabulary has it; None for an unknown id."""
        if self._tables is None:
            text: str | None = self._fast.id_to_token(token)
            return text
        bounds = self._tables.bounds
        if not 0 <= token < len(bounds) - 1 or bounds[token] == bounds[token + 1]:
            return None
        return self._tables.texts[bounds[token] : bounds[token + 1]].tobytes().decode()

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`, without tokens around it."""
        encoding = self._fast.encode(text, add_special_tokens=False)
        ids: list[int] = encoding.ids
        if self._tables is None:
            return ids
        # Not at the top: numba is imported while the workers start.
        from warmfront.coordinator.text.merging_kernels import merge_words

        symbols, words = np.array(ids, np.int32), np.array(encoding.word_ids, np.int32)
        count = merge_words(symbols, words, self._tables, self._whole_words)
        return list(symbols[:count].tolist())

    def decode(self, ids: Sequence[int]) -> str:
        """The text of `ids`, without special tokens."""
        texts = [text for token in ids if (text := self.id_to_token(token)) is not None and text not in self._special]
        return " ".join(texts) if self.decoder is None else str(self.decoder.decode(texts))
