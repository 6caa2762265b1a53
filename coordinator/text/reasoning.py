"""The reasoning that a model writes before its answer, as <think> ... </think>, told apart while it comes."""

from collections.abc import Iterator

from warmfront.coordinator.text.stop_strings import overlap

__all__ = ["Reasoning"]

_OPEN, _CLOSE = "<think>", "</think>"


class Reasoning:
    """Divides the pieces of an answer. A tag counts at the beginning only: later an answer may write about it."""

    def __init__(self, prompt: str) -> None:
        """`prompt`: its end, since some templates open the reasoning themselves."""
        self._tag: str | None = _CLOSE if prompt.rstrip().endswith(_OPEN) else _OPEN  # the next; None behind the last
        self._held = ""

    @property
    def is_open(self) -> bool:
        """Whether the answer is in the middle of its reasoning."""
        return self._tag == _CLOSE

    def push(self, piece: str) -> Iterator[tuple[str, bool]]:
        """What may be shown after `piece`, and whether it is reasoning; a part that may become a tag is held back."""
        text, self._held = self._held + piece, ""
        if self._tag == _OPEN:
            start = text.lstrip()
            if start.startswith(_OPEN):
                self._tag = _CLOSE
            elif _OPEN.startswith(start):
                self._held, text = text, ""
            else:
                self._tag = None
        if self._tag == _CLOSE:
            before, tag, behind = text.partition(_CLOSE)
            if tag:
                self._tag, text = None, behind
            else:
                keep = len(text) - overlap(text, _CLOSE)
                before, self._held, text = text[:keep], text[keep:], ""
            if before + tag:
                yield before + tag, True
        if text:
            yield text, False

    def rest(self) -> tuple[str, bool]:
        """What was held back at the end of the answer."""
        held, self._held = self._held, ""
        return held, self.is_open
