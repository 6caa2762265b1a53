"""Whose turn it is.  pytest tests/coordinator/scheduling/test_turns.py"""

from collections import Counter

import pytest

from warmfront.coordinator.scheduling.turns import Admit, Decode, Idle, Limits, Read, Running, decide

LIMITS = Limits(running=6, batch=4, alone=288, beside=96)


@pytest.mark.parametrize(
    ("fits", "running", "read_last", "step"),
    [
        (False, [], False, Idle()),
        (True, [], False, Admit()),
        (False, [Running(500, 0)], False, Read(0, 288)),
        (False, [Running(100, 0)], True, Read(0, 100)),
        (True, [Running(500, 0)], True, Read(0, 288)),  # the next may begin like it
        (False, [Running(0, 3), Running(500, 0)], False, Read(1, 96)),
        (False, [Running(0, 3), Running(500, 0)], True, Decode((0,))),
        (False, [Running(0, 3), Running(50, 0)], False, Read(1, 50)),
        (True, [Running(0, 3)], True, Admit()),
        (True, [Running(0, 3)] * 6, False, Decode((0, 1, 2, 3))),
        (False, [Running(0, turn) for turn in (5, 1, 4, 2, 3)], False, Decode((1, 3, 4, 2))),
    ],
)
def test_what_is_next(fits: bool, running: list[Running], read_last: bool, step: object) -> None:
    assert decide(fits, running, LIMITS, read_last=read_last) == step


def test_all_are_served_alike() -> None:
    """Six requests with long prompts, in passes of four: all get their turns, and prompts end in order."""
    unread, served, seen, ends, read_last = [700] * 6, [0] * 6, Counter[int](), [], False
    turns = 0
    for _ in range(400):
        running = [Running(*each) for each in zip(unread, served, strict=True)]
        step = decide(False, running, LIMITS, read_last=read_last)
        read_last = isinstance(step, Read)
        if isinstance(step, Read):
            unread[step.index] -= step.tokens
            if not unread[step.index]:
                ends.append(step.index)
        else:
            assert isinstance(step, Decode)
            assert len(step.indices) <= LIMITS.batch
            for index in step.indices:
                served[index] = turns = turns + 1
                seen[index] += not any(unread)
    assert ends == [0, 1, 2, 3, 4, 5]
    counts = [seen[index] for index in range(6)]
    assert min(counts) > 100
    assert max(counts) - min(counts) <= 1
