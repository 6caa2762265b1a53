"""The messages of gpt-oss, in OpenAI's harmony form, told apart while they come.

    <|channel|>analysis<|message|>TEXT<|end|><|start|>assistant<|channel|>final<|message|>TEXT<|return|>
    <|channel|>commentary to=functions.NAME <|constrain|>json<|message|>{"KEY": VALUE}<|call|>

A prompt ends with <|start|>assistant, so that an answer begins in the middle of a head. The recipient may also stand in
front of the channel. The marks are special tokens, and come here apart from the text: what spells them out is text.
"""

import re
from collections.abc import Iterator
from typing import NamedTuple

__all__ = ["ANSWER", "MARKS", "START", "Harmony", "Part"]

START, _CHANNEL, _MESSAGE, _CONSTRAIN = "<|start|>", "<|channel|>", "<|message|>", "<|constrain|>"
MARKS = (START, _CHANNEL, _MESSAGE, _CONSTRAIN, "<|end|>", "<|call|>", "<|return|>")
# The head of the message that is for the user, with the marks in it.
ANSWER = re.compile(r"<\|channel\|>final[^<]*(<\|constrain\|>[^<]*)?<\|message\|>")


class Part(NamedTuple):
    """A part of an answer. What is for a `recipient`, such as functions.NAME, is a whole message."""

    text: str
    is_reasoning: bool
    recipient: str = ""


class Harmony:
    """Divides the pieces of an answer to a prompt that has opened a message."""

    def __init__(self) -> None:
        self._head: str | None = ""  # of the message that begins; None within one
        self._marked = False  # whether there has been a mark yet
        self._held = ""  # of a message for a recipient
        self._reasons, self._recipient = False, ""
        self._shown = {True: False, False: False}  # whether there was a message of reasoning, and one for the user
        self._first = False  # whether the next piece is its message's first

    def push(self, text: str, mark: str = "") -> Iterator[Part]:
        """The parts that are certain after `text` and then `mark`, one of `MARKS`."""
        if text:
            yield from self._text(text)
        if not mark:
            return
        if self._head is None and mark not in (_MESSAGE, _CONSTRAIN):
            yield from self._end()
        if self._head is not None:
            if mark == _MESSAGE:
                self._begin(self._head)
            else:
                self._head = f"{self._head} {mark} " if mark in (_CHANNEL, _CONSTRAIN) else ""
        self._marked = True

    def rest(self) -> Iterator[Part]:
        """What was held back at the end of the answer; half a head is no text."""
        if self._head is None:
            yield from self._end()
        elif self._head and not self._marked:
            yield Part(self._head, False)

    def _text(self, text: str) -> Iterator[Part]:
        if self._head is not None:
            self._head += text
            start = self._head.lstrip()
            if self._marked or start.startswith("to=") or "to=".startswith(start):
                return
            # A model that was asked in another form answers in another.
            text = self._head
            self._begin("")
        if self._recipient:
            self._held += text
            return
        if self._first and self._shown[self._reasons]:
            text = "\n" + text
        self._first, self._shown[self._reasons] = False, True
        yield Part(text, self._reasons)

    def _begin(self, head: str) -> None:
        words = head.split()
        self._reasons = "analysis" in words[words.index(_CHANNEL) + 1 :][:1] if _CHANNEL in words else False
        self._recipient = next((word[3:] for word in words if word.startswith("to=")), "")
        self._head, self._first = None, True

    def _end(self) -> Iterator[Part]:
        if self._recipient:
            yield Part(self._held, self._reasons, self._recipient)
        self._head, self._held, self._recipient = "", "", ""
