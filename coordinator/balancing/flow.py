"""What has changed of who holds and computes what: counts, and the copies one by one."""

from typing import NamedTuple

__all__ = ["Flow", "Transfer"]


class Transfer(NamedTuple):
    """A batch of groups that was copied to a worker."""

    worker: int
    groups: int
    began: int  # ns on the monotonic clock
    ended: int


class Flow(NamedTuple):
    """What has changed so far."""

    moves: int  # groups copied
    flips: int  # owners changed without a copy
    unused: int  # copies dropped before their group fired there
