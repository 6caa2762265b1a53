"""A text under way: its tokens, and the pages of the KV cache that hold them."""

import copy
import sys
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from warmfront.coordinator.scheduling.pages import Pages, page_key
from warmfront.shared.model.kv_layout import PAGE, pages_of

__all__ = ["Text"]

_CLEAN = sys.maxsize


class Text:
    """One sequence, of at most `context` tokens; whoever owns `pages` calls one method of its texts at a time."""

    def __init__(self, pages: Pages, context: int) -> None:
        self._pages = pages
        # The tokens that the KV cache holds.
        self.ids: list[int] = []
        # int64 [pages of a context]: the page of each 32 positions; behind the last one any.
        self.table: npt.NDArray[np.int64] = np.zeros(pages_of(context), np.int64)
        self._held = self._reserved = 0
        self._keys: list[bytes] = []  # of the first pages, as far as they are a prompt's
        # Up to where the tokens were computed as a prompt's, from the beginning: only that is the same whatever else
        # the engine computes, and shared with other texts.
        self._prompt = 0
        # Of the last pass: tokens behind those that are not of the text yet, how many have become so, the row of the
        # first one's logits, and the number of the pass.
        self.guesses: list[int] = []
        self.accepted = self.row = self.job = 0
        # No key or value before `clean` is infinite or NaN, and none from `_spoiled_end` on.
        self.clean, self._spoiled_end = _CLEAN, 0
        # Its owner is done with it; or it was ended by another text.
        self.left = self.over = False

    def moved(self) -> "Text":
        """The same text with another owner; for this one it is over."""
        text = copy.copy(self)
        text.left = False
        self.over = True
        return text

    def __len__(self) -> int:
        return len(self.ids)

    def grow(self, until: int) -> None:
        """Have pages for the positions before `until`; raises UsageError if there are none."""
        while self._held * PAGE < until:
            self.table[self._held] = self._pages.take(reserved=self._reserved > 0)
            self._reserved -= self._reserved > 0
            self._held += 1

    def needs(self, ids: Sequence[int], until: int) -> int:
        """How many pages must be available for a text that begins with the prompt `ids` and ends before `until`."""
        pages, key = pages_of(until), b""
        for first in range(0, (len(ids) - 1) // PAGE * PAGE, PAGE):
            key = page_key(key, ids[first : first + PAGE])
            there, idle = self._pages.holds(key)
            if not there:
                break
            # A page of no text counts as available, until it is taken.
            pages -= not idle
        return pages

    def reserve(self, until: int) -> None:
        """Have `grow` succeed for all positions before `until`."""
        more = pages_of(until) - self._held - self._reserved
        self._pages.reserve(more)
        self._reserved += more

    def known(self, ids: Sequence[int], most: int) -> int:
        """How many of `ids`, at most `most`, need not be computed: the text has them, finite."""
        most, known = min(len(self.ids), most, self.clean), 0
        while known < most and self.ids[known] == ids[known]:
            known += 1
        return known

    def find(self, ids: Sequence[int], most: int) -> None:
        """Be the beginning of `ids`, at most `most` of them, as far as it is known from other texts' prompts, if that
        is more than this one knows of them. What it held is given up."""
        keys: list[bytes] = []
        for first in range(0, most // PAGE * PAGE, PAGE):
            key = page_key(keys[-1] if keys else b"", ids[first : first + PAGE])
            if not self._pages.holds(key)[0]:
                break
            keys.append(key)
        if len(keys) * PAGE <= self.known(ids, most):
            return
        # Shared first: what is given up may be of these pages, and may be taken by nobody in between.
        shared = [self._pages.share(key) for key in keys]
        self._leave(0)
        self.table[: len(keys)] = [page for page in shared if page is not None]
        self._keys, self._held = keys, len(keys)
        self._prompt = len(keys) * PAGE
        self.ids = list(ids[: self._prompt])

    def spoil(self, position: int, until: int) -> None:
        """A key or value from `position` on, and before `until`, is infinite or NaN."""
        self.clean, self._spoiled_end = min(self.clean, position), max(self._spoiled_end, until)

    def spoiled(self, position: int) -> tuple[int, int]:
        """What is to be scrubbed before the positions from `position` on may be used for anything else."""
        return max(position, self.clean), self._spoiled_end

    def cut(self, position: int) -> None:
        """End before `position`, or before the page that it is in, if other texts have that too: see `spoiled`."""
        first, inside = divmod(position, PAGE)
        if inside and first < self._held:
            page = int(self.table[first])
            if self._pages.alone(page):
                # What comes now is another's page.
                self._pages.unname(page)
            else:
                position = first * PAGE
        self._leave(pages_of(position))
        del self.ids[position:], self._keys[position // PAGE :]
        self.guesses = []
        self._prompt = min(self._prompt, position)
        self._spoiled_end = min(self._spoiled_end, max(position, self.clean))
        if position <= self.clean:
            self.clean = _CLEAN

    def _leave(self, first: int) -> None:
        """Give up the pages from `first` on, the last ones soonest to be used again."""
        for page in self.table[first : self._held][::-1].tolist():
            self._pages.leave(page)
        self._held = min(self._held, first)

    def read(self, tokens: Sequence[int]) -> None:
        """A job has computed `tokens`, the next ones, as a prompt's: complete pages can be found from now on."""
        if self._prompt == len(self.ids):
            self._prompt += len(tokens)
        self.ids += tokens
        for first in range(len(self._keys) * PAGE, min(self._prompt, self.clean) // PAGE * PAGE, PAGE):
            self._keys.append(page_key(self._keys[-1] if self._keys else b"", self.ids[first : first + PAGE]))
            self._pages.name(int(self.table[first // PAGE]), self._keys[-1])

    def close(self) -> None:
        """Give up all pages and what is reserved."""
        self.cut(0)
        self._pages.reserve(-self._reserved)
        self._reserved = 0
