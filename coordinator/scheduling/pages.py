"""Which pages of the KV cache are in use, and which hold the beginning of a prompt that may come again.

    free        holds nothing of use
    in use      of one text or, where prompts begin alike, of several
    kept        of no text, but found by the tokens that it holds: the least lately used one is given away when no page
                is free

A page is found by a key, which is made of its tokens and all that are before them: what is computed for a token depends
on those. Keys are cryptographic (BLAKE2b, 16 bytes), so that no request can be made to find another one's page.
"""

from collections import OrderedDict
from collections.abc import Sequence
from hashlib import blake2b

import numpy as np

from warmfront.shared.errors import UsageError

__all__ = ["Pages", "page_key"]


def page_key(before: bytes, ids: Sequence[int]) -> bytes:
    """The key of a page of tokens `ids` that follows the page with the key `before`; of the first page: b""."""
    return blake2b(before + np.array(ids, np.int64).tobytes(), digest_size=16).digest()


class Pages:
    """The pages 0 to `count` - 1; not for several threads at once."""

    def __init__(self, count: int) -> None:
        self.count = count
        self._free = list(range(count - 1, -1, -1))
        self._users = [0] * count
        self._keys: dict[int, bytes] = {}
        self._found: dict[bytes, int] = {}
        self._kept: OrderedDict[int, None] = OrderedDict()  # least lately used first
        self._reserved = 0

    @property
    def available(self) -> int:
        """Pages that may be taken or reserved."""
        return len(self._free) + len(self._kept) - self._reserved

    @property
    def used(self) -> int:
        """Pages of texts."""
        return self.count - len(self._free) - len(self._kept)

    def reserve(self, change: int) -> None:
        """So many pages more, or fewer, are to be there for `take` with `reserved`."""
        self._reserved += change

    def take(self, *, reserved: bool) -> int:
        """A page for a text; raises UsageError if all are in use or reserved."""
        if reserved:
            self._reserved -= 1
        elif self.available <= 0:
            raise UsageError(
                "the KV cache is full of other texts that are under way: end one of them, or load with a larger "
                "parallel or context"
            )
        if self._free:
            page = self._free.pop()
        else:
            page, _ = self._kept.popitem(last=False)
            self.unname(page)
        self._users[page] = 1
        return page

    def share(self, key: bytes) -> int | None:
        """The page with that key, for one text more; None if there is none."""
        page = self._found.get(key)
        if page is not None:
            self._kept.pop(page, None)
            self._users[page] += 1
        return page

    def holds(self, key: bytes) -> tuple[bool, bool]:
        """Whether there is a page with that key, and whether it is of no text."""
        page = self._found.get(key)
        return page is not None, page in self._kept

    def leave(self, page: int) -> None:
        """A text does not use `page` any more."""
        self._users[page] -= 1
        if self._users[page] == 0:
            if page in self._keys:
                self._kept[page] = None
            else:
                self._free.append(page)

    def alone(self, page: int) -> bool:
        """Whether a single text uses `page`."""
        return self._users[page] == 1

    def name(self, page: int, key: bytes) -> None:
        """`page` is complete, and may be found by `key`, unless another is."""
        if key not in self._found:
            self._found[key], self._keys[page] = page, key

    def unname(self, page: int) -> None:
        """`page` is not to be found any more."""
        if page in self._keys:
            del self._found[self._keys.pop(page)]

    def clear(self) -> None:
        """No page is to be found any more."""
        self._keys.clear()
        self._found.clear()
        self._free += self._kept
        self._kept.clear()
