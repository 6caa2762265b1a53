"""Pages of texts: shared where prompts begin alike, never where they part, and all given back.

pytest tests/coordinator/scheduling/test_text.py
"""

import numpy as np
import pytest

from warmfront.coordinator.scheduling.pages import Pages
from warmfront.coordinator.scheduling.text import Text
from warmfront.shared.errors import UsageError

CONTEXT = 320  # ten pages


def read(text: Text, ids: list[int]) -> None:
    """Compute `ids`, but for what is there, as a prompt in jobs of 50."""
    text.find(ids, len(ids) - 1)
    text.cut(text.known(ids, len(ids) - 1))
    while len(text) < len(ids):
        tokens = ids[len(text) : len(text) + 50]
        text.grow(len(text) + len(tokens))
        text.read(tokens)


def decode(text: Text, tokens: list[int]) -> None:
    for token in tokens:
        text.grow(len(text) + 1)
        text.ids.append(token)


def pages_of(text: Text) -> list[int]:
    return text.table[: -(-len(text) // 32)].tolist()


def test_a_common_beginning_is_held_once() -> None:
    pages = Pages(20)
    first, second = Text(pages, CONTEXT), Text(pages, CONTEXT)
    shared = list(range(100))
    read(first, [*shared, 1])
    second.find([*shared, 2, 3], 101)
    assert second.ids == shared[:96]
    read(second, [*shared, 2, 3])
    assert pages_of(first)[:3] == pages_of(second)[:3]
    assert pages_of(first)[3] != pages_of(second)[3]
    assert pages.used == 5


def test_the_whole_prompt_is_known_but_for_its_last_token() -> None:
    pages = Pages(20)
    first, second = Text(pages, CONTEXT), Text(pages, CONTEXT)
    read(first, list(range(64)))
    second.find(list(range(64)), 63)
    assert len(second) == 32


def test_what_was_decoded_is_nobody_elses() -> None:
    pages = Pages(20)
    first, second = Text(pages, CONTEXT), Text(pages, CONTEXT)
    read(first, list(range(40)))
    decode(first, list(range(40, 100)))
    read(first, first.ids + [7] * 40)  # behind decoded tokens: not what a prompt alone gives
    second.find(list(range(130)), 130)
    assert second.ids == list(range(32))


def test_a_text_that_is_cut_within_a_page_does_not_write_into_anothers() -> None:
    pages = Pages(20)
    first, second = Text(pages, CONTEXT), Text(pages, CONTEXT)
    ids = list(range(96))
    read(first, [*ids, 1])
    read(second, [*ids, 2])
    second.cut(70)
    assert len(second) == 64, "the page is the other's too"
    first.cut(70)
    assert len(first) == 70
    read(first, [*ids[:70], *[5] * 30])
    third = Text(pages, CONTEXT)
    third.find([*ids, 3], 96)
    assert third.ids == ids[:64], "the third page has been written over"


def test_the_least_lately_used_page_is_given_away() -> None:
    pages = Pages(4)
    for start in (0, 1000):
        text = Text(pages, CONTEXT)
        read(text, list(range(start, start + 64)))
        text.close()
    assert (pages.used, pages.available) == (0, 4)
    text = Text(pages, CONTEXT)
    read(text, list(range(5000, 5032)))
    assert pages.used == 1
    again = [Text(pages, CONTEXT) for _ in range(2)]
    for found, start in zip(again, (0, 1000), strict=True):
        found.find(list(range(start, start + 65)), 64)
    assert [len(found) for found in again] == [32, 64], "the end of the older one is gone"


def test_a_full_cache() -> None:
    pages = Pages(4)
    first, second, third = (Text(pages, CONTEXT) for _ in range(3))
    first.reserve(64)
    read(second, list(range(40)))
    with pytest.raises(UsageError, match="the KV cache is full"):
        read(third, list(range(5)))
    first.grow(64)
    first.close()
    second.close()
    third.close()
    assert (pages.used, pages.available) == (0, 4)


@pytest.mark.parametrize("seed", range(30))
def test_any_sequence_of_uses(seed: int) -> None:
    """No page is of two texts unless their tokens up to its end are the same; what is needed is there; none is lost."""
    chance = np.random.default_rng(seed)
    pages, texts = Pages(24), list[Text]()
    for _ in range(200):
        kind = chance.integers(5)
        if kind == 0 or not texts:
            ids = [*([1] * int(chance.integers(1, 90))), *chance.integers(0, 3, chance.integers(1, 60)).tolist()]
            text = Text(pages, CONTEXT)
            until = len(ids) + int(chance.integers(1, 40))
            if text.needs(ids, until) > pages.available:
                continue
            text.find(ids, len(ids) - 1)
            text.reserve(until)
            read(text, ids)
            decode(text, [9] * (until - len(ids)))
            texts.append(text)
        elif kind == 1:
            texts.pop(int(chance.integers(len(texts)))).close()
        elif kind == 2:
            texts[int(chance.integers(len(texts)))].cut(int(chance.integers(0, 100)))
        elif kind == 3 and chance.random() < 0.1:
            pages.clear()
        holders: dict[int, list[int]] = {}
        for text in texts:
            for number, page in enumerate(pages_of(text)):
                known = holders.setdefault(page, text.ids[: 32 * number + 32])
                assert known == text.ids[: 32 * number + 32]
        assert pages.used >= len(holders)
        assert pages.available >= 0
    for text in texts:
        text.close()
    assert (pages.used, pages.available) == (0, 24)
