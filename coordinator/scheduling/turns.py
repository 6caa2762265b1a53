"""Whose turn it is: what the engine does next, decided from plain data, without doing it.

    admit     the request that has waited longest, once the KV cache has room for all that it may become (so that none
              is ever thrown out) and nobody's prompt is being read: the next one may begin like it, and share its pages
    read      the next tokens of the prompt of the one that was admitted last; between two such jobs the others decode
    decode    a token for each of the others; where those are more than a pass takes, for the least lately served

First come, first served: a large request is not overtaken by small ones. A prompt is read in shorter jobs while others
decode, so that they wait for a tenth of a second rather than for all of it (Sarathi-Serve's chunked prefill). What is
computed is the same bit for bit either way.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

__all__ = ["Admit", "Decode", "Idle", "Limits", "Read", "Running", "Step", "decide"]


class Limits(NamedTuple):
    """How much is done at once."""

    # Texts under way, and tokens of a pass.
    running: int
    batch: int
    # Tokens of a prompt that are read at a time: alone, and while others decode.
    alone: int
    beside: int


class Running(NamedTuple):
    """A request under way."""

    # Tokens of its prompt that are to be read; 0: it decodes.
    unread: int
    # When it was last served: of all tokens the number of its last one, no two the same.
    served: int


@dataclass(frozen=True, slots=True)
class Admit:
    """Begin the request that has waited longest."""


@dataclass(frozen=True, slots=True)
class Read:
    """Read so many tokens of the prompt of a request under way."""

    index: int
    tokens: int


@dataclass(frozen=True, slots=True)
class Decode:
    """A pass of a token for each of these requests."""

    indices: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Idle:
    """There is nothing to do."""


Step = Admit | Read | Decode | Idle


def decide(fits: bool, running: Sequence[Running], limits: Limits, *, read_last: bool) -> Step:
    """What to do next.

    `fits`: a request waits, and there is room for it; `read_last`: the last step that computed was to read.
    """
    reading = next((i for i, each in enumerate(running) if each.unread), None)
    decoding = [i for i, each in enumerate(running) if not each.unread]
    if reading is None and fits and len(running) < limits.running:
        return Admit()
    if reading is not None and not (read_last and decoding):
        return Read(reading, min(running[reading].unread, limits.beside if decoding else limits.alone))
    if decoding:
        return Decode(tuple(sorted(decoding, key=lambda i: running[i].served)[: limits.batch]))
    return Idle()
