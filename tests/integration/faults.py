"""What the tests of dying and closing share: how long an end may take, and tokens with something done meanwhile."""

from collections.abc import Callable
from typing import Any

from warmfront.coordinator.engine.engine import Engine

LIMIT_S = 2.0


def worker_pid(engine: Engine, name: str) -> int:
    return next(worker.pid for worker in engine.statistics.workers() if worker.name == name)


def take(engine: Engine, count: int, after: int, action: Callable[[], Any]) -> list[int]:
    """The ids of `count` tokens; `action` is called once `after` of them are there."""
    tokens = []
    for token in engine.generate([1, 2, 3], max_new_tokens=count):
        tokens.append(token.id)
        if len(tokens) == after:
            action()
    return tokens
