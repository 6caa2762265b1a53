"""Tokens as they become text, around special ones.  pytest tests/coordinator/text/test_reply.py"""

from typing import Any

import numpy as np
import pytest
from tokenizers import AddedToken, Tokenizer, models

from warmfront.coordinator.text.reply import Reply, Wishes
from warmfront.coordinator.text.stream import TextStream, token_speller

TOKENS = ["a", "b", "c", "<|mark|>", "<|end|>"]


class Letters:
    """Letters and two special tokens, of which one ends an answer."""

    end_ids = frozenset({4})

    def __init__(self) -> None:
        self._fast = Tokenizer(models.WordLevel({token: i for i, token in enumerate(TOKENS)}, "a"))
        self._fast.add_tokens([AddedToken(token, special=True) for token in TOKENS[3:]])
        self.bytes_of = token_speller(self._fast)

    def stream(self, prompt: Any) -> TextStream:
        return TextStream(self._fast, prompt)


@pytest.mark.parametrize(
    ("stop", "texts"),
    [
        ("", ["a", " b", "", " c"]),
        (" bc", ["a", "", " b", " c"]),
        (" b c", ["a", "", " b", " c"]),
        (" b", ["a", ""]),
    ],
)
def test_no_stop_string_spans_a_special_token(stop: str, texts: list[str]) -> None:
    """What was held back belongs in front of it."""
    tokenizer: Any = Letters()
    reply = Reply([0], tokenizer, 100, Wishes(stop=stop))
    pieces = [reply.choose(np.eye(len(TOKENS), dtype=np.float32)[token]) for token in (0, 1, 3, 2)[: len(texts)]]
    assert [piece and piece.text for piece in pieces] == [" a", *texts[1:]]
    assert reply.finish_reason == ("stop" if len(texts) == 2 else "")
