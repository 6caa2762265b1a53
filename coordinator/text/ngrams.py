"""What may come next in a text, by what followed its last tokens when they stood in it before.

Texts repeat what they quote, edit or enumerate: names, code, JSON. No model is asked for such a guess, it is looked up
(prompt lookup decoding; llama.cpp's ngram-simple): the longest n-gram that ends the text and stood in it before, at its
most recent place. Each n-gram length has a table of where it was last, so that a token costs the same few look-ups
however long the text is.
"""

from collections.abc import Iterable

__all__ = ["LONGEST", "SHORTEST", "NgramIndex"]

# n-grams that are looked up. What follows two tokens came true for a quarter of the guesses in free text, which pays
# nowhere; one place of a longer n-gram is mostly that of the five tokens, too.
SHORTEST, LONGEST = 3, 5
# How far back it is counted how much of the text agrees with what is before the guess.
_FAR = 32


class NgramIndex:
    """The tokens of a growing text."""

    def __init__(self, tokens: Iterable[int] = ()) -> None:
        self._tokens: list[int] = []
        # For n = LONGEST down to SHORTEST: n-gram -> the position behind its last place.
        self._behind: list[tuple[int, dict[tuple[int, ...], int]]] = [(n, {}) for n in range(LONGEST, SHORTEST - 1, -1)]
        self._source = 0  # where what follows the last tokens may be found; 0: nowhere
        for token in tokens:
            self.push(token)

    def push(self, token: int) -> None:
        """The text goes on with `token`."""
        tokens = self._tokens
        tokens.append(token)
        end = len(tokens)
        last = tuple(tokens[-LONGEST:])
        self._source = 0
        for n, behind in self._behind:
            if n > end:
                continue
            ngram = last[-n:]
            if not self._source:
                self._source = behind.get(ngram, 0)
            behind[ngram] = end

    def guess(self, count: int) -> tuple[list[int], int]:
        """Up to `count` tokens that may come next, and how many before them agree, at most 32; none: [] and 0.

        Where the place is so near that the guess runs into the end of the text, it goes on with itself: what was
        repeated will be again.
        """
        tokens, source = self._tokens, self._source
        if not source:
            return [], 0
        guess = tokens[source : source + count]
        for i in range(count - len(guess)):
            guess.append(guess[i])
        length, end = SHORTEST, len(tokens)
        while length < min(_FAR, source) and tokens[source - length - 1] == tokens[end - length - 1]:
            length += 1
        return guess, length
