"""An answer in a chat, told apart while its tokens come: reasoning, text for the user, messages for others."""

import re
from collections.abc import Iterator, Sequence

from warmfront.coordinator.text.harmony import ANSWER, MARKS, START, Harmony, Part
from warmfront.coordinator.text.reasoning import Reasoning
from warmfront.coordinator.text.tokenizer import Tokenizer

__all__ = ["Parts"]

# Tokens at the end of a prompt in which the template may have opened a message, or the reasoning.
_TAIL = 16
_THOUGHT = re.compile("</think>")


class Parts:
    """Divides the answer to the chat `prompt`, as <think> or harmony's channels say.

    `spelled`: special tokens that are to be text all the same; none of harmony's.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int], spelled: Sequence[str] = ()) -> None:
        tail = prompt[-_TAIL:]
        self._reasoning = Reasoning(tokenizer.decode(tail))
        self.marks = tokenizer.ids_of(MARKS)  # texts of the tokens that are marks, by id
        opened = [self.marks[token] for token in tail if token in self.marks][-1:] == [START]
        self._harmony = Harmony() if opened and len(self.marks) == len(MARKS) else None
        if self._harmony is None:
            self.marks = tokenizer.ids_of(spelled)
        # What the answer proper comes behind, marks spelled out; None: nothing, it comes at once.
        self.begins = ANSWER if self.in_channels else _THOUGHT if self._reasoning.is_open else None

    @property
    def in_channels(self) -> bool:
        """Whether the answer is divided as harmony has it, and reasoning is no part of the text."""
        return self._harmony is not None

    def push(self, token: int, text: str) -> Iterator[Part]:
        """The parts that are certain after a token and the `text` that it completes."""
        mark = self.marks.get(token, "")
        text = text.removesuffix(mark)
        if self._harmony is not None:
            yield from self._harmony.push(text, mark)
        elif text or mark:
            for piece, is_reasoning in self._reasoning.push(text + mark):
                yield Part(piece, is_reasoning)

    def rest(self) -> Iterator[Part]:
        """What was held back, at the end of the answer."""
        if self._harmony is not None:
            yield from self._harmony.rest()
        else:
            yield Part(*self._reasoning.rest())
