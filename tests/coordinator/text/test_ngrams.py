"""Guesses against a search through the whole text.  pytest tests/coordinator/text/test_ngrams.py"""

import time

import numpy as np
import pytest

from warmfront.coordinator.text.ngrams import LONGEST, SHORTEST, NgramIndex


def searched(tokens: list[int], count: int) -> tuple[list[int], int]:
    """What `NgramIndex.guess` promises, by trying every length and place."""
    end = len(tokens)
    for n in range(LONGEST, SHORTEST - 1, -1):
        for source in range(end - 1, n - 1, -1):
            if tokens[source - n : source] == tokens[end - n :]:
                # The text as it would be if everything came true.
                grown = list(tokens)
                for i in range(count):
                    grown.append(grown[source + i])
                agreeing = next(
                    i for i in range(source + 1) if i == source or tokens[source - 1 - i] != tokens[end - 1 - i]
                )
                return grown[end:], min(agreeing, 32)
    return [], 0


@pytest.mark.parametrize("vocab", [1, 2, 3, 12, 200])
def test_against_a_search(vocab: int) -> None:
    rng = np.random.default_rng(vocab)
    found = 0
    for _ in range(60):
        tokens = rng.integers(vocab, size=rng.integers(0, 70)).tolist()
        if rng.random() < 0.5:  # that repeats a part of itself
            tokens += tokens[len(tokens) // 4 : len(tokens) // 2]
        split = int(rng.integers(len(tokens) + 1))
        index = NgramIndex(tokens[:split])
        for at in range(split, len(tokens) + 1):
            count = int(rng.integers(1, 20))
            guess = index.guess(count)
            assert guess == searched(tokens[:at], count)
            found += bool(guess[0])
            if at < len(tokens):
                index.push(tokens[at])
    assert found > 10


def test_the_longest_match_then_the_latest() -> None:
    #        1 2 3 4 -> 9, then 2 3 4 -> 7 and 8
    tokens = [1, 2, 3, 4, 9, 5, 2, 3, 4, 7, 6, 2, 3, 4, 8]
    assert NgramIndex([*tokens, 2, 3, 4]).guess(1) == ([8], 3)
    assert NgramIndex([*tokens, 1, 2, 3, 4]).guess(1) == ([9], 4)
    assert NgramIndex([*tokens, 6, 2, 3, 4]).guess(2) == ([8, 6], 4)


def test_what_repeats_is_taken_to_go_on() -> None:
    assert NgramIndex([7, 1, 2, 3, 1, 2, 3]).guess(8) == ([1, 2, 3, 1, 2, 3, 1, 2], 3)
    assert NgramIndex([5, 5, 5, 5]).guess(4) == ([5, 5, 5, 5], 3)


@pytest.mark.parametrize("tokens", [[], [1], [1, 1, 1], [1, 2, 3, 1, 2]])
def test_nothing_to_guess(tokens: list[int]) -> None:
    assert NgramIndex(tokens).guess(5) == ([], 0)


def test_a_long_text_costs_no_more() -> None:
    """Some microseconds a token, at its end as at its beginning; a search through it would take milliseconds."""
    tokens = np.random.default_rng(1).integers(50_000, size=16_000).tolist()
    index = NgramIndex(tokens)
    best = 1.0
    for _ in range(20):
        began = time.perf_counter()
        for token in tokens[100:110]:
            index.push(token)
            index.guess(15)
        best = min(best, (time.perf_counter() - began) / 10)
    assert best < 200e-6
