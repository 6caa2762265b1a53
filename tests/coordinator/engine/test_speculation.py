"""When guesses are computed, and that the answer is the same.  pytest tests/coordinator/engine/test_speculation.py"""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from warmfront.coordinator.engine import speculation
from warmfront.coordinator.engine.speculation import Acceptance, PassCosts, Speculation, worth

VOCAB = 50


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def perf_counter(self) -> float:
        return self.now


class Text:
    """In place of a session: a text that is known, passes that take a given time, and what was asked of them."""

    def __init__(self, following: Callable[[list[int]], int], seconds: Callable[[int], float], clock: Clock) -> None:
        self.following, self.seconds, self.clock = following, seconds, clock
        self.tokens: list[int] = []
        self.pending: list[int] = []
        self.passes: list[int] = []

    def _logits(self, tokens: list[int]) -> np.ndarray:
        return np.eye(VOCAB, dtype=np.float32)[self.following(tokens)]

    def verify(self, turn: int, batch: list[int]) -> np.ndarray:
        self.passes.append(len(batch))
        self.clock.now += self.seconds(len(batch))
        self.pending = batch[1:]
        before = [*self.tokens]
        self.tokens.append(batch[0])
        return np.stack([self._logits([*before, *batch[: i + 1]]) for i in range(len(batch))])

    def step(self, turn: int, token: int) -> np.ndarray:
        return np.asarray(self.verify(turn, [token])[0])

    def is_last(self, turn: int) -> bool:
        return True

    def accept(self, turn: int) -> None:
        self.tokens.append(self.pending.pop(0))


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(speculation, "time", clock)
    return clock


def answered(text: Text, prompt: list[int], count: int, costs: PassCosts, acceptance: Acceptance) -> Any:
    """Speculation after an answer of `count` tokens, each checked to be the one without."""
    text.tokens, text.passes = list(prompt), []
    session: Any = text
    guessing = Speculation(session, prompt, costs, acceptance)
    seen, token = list(prompt), text.following(prompt)
    for most in range(count, 0, -1):
        seen.append(token)
        logits = guessing.step(1, token, most)
        assert text.tokens == seen, "the cache holds the text, and no guess"
        token = int(logits.argmax())
        assert token == text.following(seen)
    return guessing


def copied(tokens: list[int]) -> int:
    """Says the same 30 tokens over and over."""
    return len(tokens) % 30 + 10


def unlike(tokens: list[int]) -> int:
    """Says nothing twice in the same way."""
    return int(np.random.default_rng(len(tokens)).integers(VOCAB))


def cheap(tokens: int) -> float:
    return 0.01 * (1 + 0.2 * (tokens - 1))


def test_a_copy_is_verified_in_long_batches(clock: Clock) -> None:
    text, costs, acceptance = Text(copied, cheap, clock), PassCosts(), Acceptance()
    answered(text, [], 60, costs, acceptance)
    assert costs.further_s == pytest.approx(0.002, rel=0.5)
    guessing = answered(text, [], 300, costs, acceptance)
    assert guessing.accepted > 0.9 * guessing.drafted
    assert max(text.passes) == 16
    assert sum(map(cheap, text.passes)) < 300 * cheap(1) / 2


def test_nothing_is_computed_in_vain_for_long(clock: Clock) -> None:
    """One token of four is new, where trigrams promise a wrong one: less than 2 % of the time is lost."""

    def often_wrong(tokens: list[int]) -> int:
        kind, block = len(tokens) % 4, len(tokens) // 4
        return (1, 2, 3)[kind] if kind < 3 else int(np.random.default_rng(block).integers(4, VOCAB))

    text = Text(often_wrong, cheap, clock)
    answered(text, [], 1500, PassCosts(), Acceptance())
    assert sum(map(cheap, text.passes)) < 1.02 * 1500 * cheap(1)


def test_it_depends_on_what_a_pass_costs(clock: Clock) -> None:
    """Where a further token costs as much as the first, nothing can be won, even by guesses that come true."""

    def dear(tokens: int) -> float:
        return 0.01 * tokens * 1.1

    text = Text(copied, dear, clock)
    answered(text, [], 600, PassCosts(), Acceptance())
    assert sum(size > 1 for size in text.passes) < 12
    assert sum(map(dear, text.passes)) < 1.02 * 600 * dear(1)


def test_it_begins_again_when_the_text_repeats_itself(clock: Clock) -> None:
    text, costs, acceptance = Text(unlike, cheap, clock), PassCosts(), Acceptance()
    answered(text, [], 800, costs, acceptance)
    text = Text(copied, cheap, clock)
    guessing = answered(text, [], 200, costs, acceptance)
    assert guessing.accepted > 100


def test_never_more_than_may_follow(clock: Clock) -> None:
    text, costs, acceptance = Text(copied, cheap, clock), PassCosts(), Acceptance()
    answered(text, [], 300, costs, acceptance)
    for count in range(1, 20):
        answered(text, [copied([0] * i) for i in range(60)], count, costs, acceptance)
        assert sum(text.passes) <= count


def test_the_worth_of_a_guess() -> None:
    costs, acceptance = PassCosts(), Acceptance()
    assert worth(costs, acceptance, 5, 15) == 0, "nothing is known yet"
    costs.note(1, 0.01)
    assert worth(costs, acceptance, 5, 15) == 3, "a short one, to learn what it costs"
    costs.note(4, 0.01 + 3 * 0.006)
    assert costs.seconds(11) == pytest.approx(0.07)
    assert worth(costs, acceptance, 5, 15) == 0, "half of the guesses come true, and a further token costs 0.6"
    for _ in range(100):
        acceptance.note(5, True)
    assert worth(costs, acceptance, 5, 15) > 0
    assert worth(costs, acceptance, 9, 15) == 0, "longer ones are others"
    assert worth(costs, acceptance, 5, 0) == 0
    for _ in range(100):
        acceptance.note(5, False)
    assert acceptance.rate(5) < 0.3
    assert worth(costs, acceptance, 5, 15) == 0
