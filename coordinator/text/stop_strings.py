"""Stop strings in a stream of text pieces: a stop string, or what may still become one, is not shown."""

from collections.abc import Sequence

from warmfront.shared.errors import UsageError

__all__ = ["StopText", "overlap"]


class StopText:
    """Holds back the longest tail that could still grow into one of `stops`."""

    def __init__(self, stops: str | Sequence[str]) -> None:
        """A single text is one stop string; empty ones are ignored. Raises UsageError for what is not text."""
        if not isinstance(stops, Sequence) or not all(isinstance(stop, str) for stop in stops):
            raise UsageError(f"stop is {stops!r}: give texts")
        self._stops = [stop for stop in ([stops] if isinstance(stops, str) else stops) if stop]
        self._held = ""
        self.found = False

    def push(self, piece: str) -> str:
        """The text that may be shown after `piece`; none once a stop string is complete, which sets `found`."""
        if self.found:
            return ""
        text = self._held + piece
        hits = [text.find(stop) for stop in self._stops if stop in text]
        if hits:
            self.found, self._held = True, ""
            return text[: min(hits)]
        keep = max((overlap(text, stop) for stop in self._stops), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def rest(self) -> str:
        """The text that was held back, for an answer that ended without a stop string."""
        held, self._held = self._held, ""
        return held


def overlap(text: str, stop: str) -> int:
    """Length of the longest suffix of `text` that is a proper prefix of `stop`."""
    return next((n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])), 0)
