"""What generation yields and what it costs: tokens, rates, each worker's share."""

from dataclasses import dataclass
from typing import NamedTuple

__all__ = ["Selection", "Stats", "Token", "WorkerStats"]


class Token(NamedTuple):
    """One generated token; `text` is what it completes, and may be empty.

    If asked for: its log probability, and the most probable tokens (id, log probability).
    """

    id: int
    text: str
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


class Selection(NamedTuple):
    """How well the predicted neurons met those that fire: shares of all neurons, then recall and precision."""

    fired: float
    selected: float
    recall: float
    precision: float


@dataclass(slots=True)
class Stats:
    """What the last answer cost. Rates are tokens a second; decode counts the tokens after the first.

    finish_reason: "stop" at an end-of-turn token or a stop string, "length" after the most tokens or at the context's
    end, None while the answer goes on.
    """

    load_s: float = 0.0
    prompt_tokens: int = 0
    new_tokens: int = 0
    prefill_s: float = 0.0
    decode_s: float = 0.0
    prefilled: int = 0
    finish_reason: str | None = None

    @property
    def prefill_tps(self) -> float:
        """Prompt tokens computed per second."""
        return self.prefilled / self.prefill_s if self.prefill_s else 0.0

    @property
    def decode_tps(self) -> float:
        """New tokens per second, without the first."""
        return (self.new_tokens - 1) / self.decode_s if self.new_tokens > 1 and self.decode_s else 0.0


@dataclass(frozen=True, slots=True)
class WorkerStats:
    """One worker's work on single tokens since the model was loaded; neurons: computed in all; groups: owned.

    bytes: of weights read; nodes: bytes of weights held by NUMA node, as the kernel says where they lie.
    """

    name: str
    device: str
    pid: int
    busy_s: float
    neurons: int
    bytes: int
    groups: int
    jobs: int
    nodes: dict[str, int]
