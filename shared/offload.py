"""Running a model that is larger than the memory: what a user can wish for, and what a worker's cache counts.

preset        RAM for the neurons             leaves first
max-speed     all that is free                what is expected to be used least
balanced      two fifths of them              the same
min-memory    a fifth of them                 what the last 5 tokens did not use, at once
"""

from dataclasses import astuple, dataclass

from warmfront.shared.errors import UsageError

__all__ = ["OFFLOAD_POLICIES", "PRESETS", "CacheCounters", "OffloadStrategy"]

# Which neurons leave the memory first, in the order of cpu_worker/cache_table.py.
OFFLOAD_POLICIES = ("lru", "window", "frequency", "balance")


@dataclass(frozen=True, slots=True, kw_only=True)
class OffloadStrategy:
    """How much of the neurons is kept where, and which leave first; raises UsageError for what cannot be."""

    # Shares of the feed-forward weights: in RAM, None: as much as is free; in a GPU's memory, None: what it has free.
    ram_share: float | None = None
    gpu_share: float | None = None
    policy: str = "balance"
    # Of the policy `window`, tokens; 0: each layer's neurons leave before the next is computed.
    window: int = 5
    # What is there is computed while the rest is read.
    asynchronous: bool = True

    def __post_init__(self) -> None:
        for name, share in (("RAM", self.ram_share), ("GPU", self.gpu_share)):
            if share is not None and not 0 < share <= 1:
                raise UsageError(f"a share of {share} of the neurons in {name}: it must be above 0, up to 1")
        if self.policy not in OFFLOAD_POLICIES:
            raise UsageError(f"no policy {self.policy!r} of offloading: use one of {', '.join(OFFLOAD_POLICIES)}")
        if self.window < 0:
            raise UsageError(f"a window of {self.window} tokens: it must be 0 or more")


PRESETS = {
    "max-speed": OffloadStrategy(),
    "balanced": OffloadStrategy(ram_share=0.4),
    "min-memory": OffloadStrategy(ram_share=0.2, policy="window"),
}


@dataclass(frozen=True, slots=True)
class CacheCounters:
    """What the caches of all CPU workers counted on decoded tokens, and of reads for prompts too."""

    # Units (neurons, or groups of 32 where these are small) that were wanted and there, and not there.
    hits: int
    misses: int
    evicted: int
    # Reads, their bytes, and the time in which any was on its way.
    requests: int
    bytes_read: int
    reading_ns: int
    # That the first thread of a worker waited for them.
    stall_ns: int
    # Decoded tokens, or batches of them; then how many of these missed which share of their units, in hundredths.
    tokens: int
    shares: tuple[int, ...]

    @classmethod
    def of(cls, numbers: list[int]) -> "CacheCounters":
        """From the numbers of a `LoadReport`."""
        hits, misses, evicted, requests, bytes_read, reading_ns, stall_ns, tokens, *shares = numbers
        return cls(hits, misses, evicted, requests, bytes_read, reading_ns, stall_ns, tokens, tuple(shares))

    def since(self, earlier: "CacheCounters") -> "CacheCounters":
        """What was counted after `earlier`."""
        pairs = zip(self._numbers(), earlier._numbers(), strict=True)
        return CacheCounters.of([later - before for later, before in pairs])

    def _numbers(self) -> list[int]:
        """As `of` takes them."""
        *numbers, shares = astuple(self)
        return [*numbers, *shares]

    @property
    def hit_share(self) -> float:
        """Of the wanted units those that were there."""
        return self.hits / max(1, self.hits + self.misses)

    def miss_share(self, quantile: float) -> float:
        """The share of its units that so many of the tokens missed at most."""
        seen, total = 0, sum(self.shares)
        for hundredths, count in enumerate(self.shares):
            seen += count
            if count and seen >= quantile * total:
                return hundredths / 100
        return 0.0

    @property
    def bandwidth(self) -> float:
        """Bytes a second, while any were on their way."""
        return self.bytes_read / (self.reading_ns / 1e9) if self.reading_ns else 0.0

    def facts(self) -> dict[str, float]:
        """As an object of JSON has it."""
        return {
            "hit_share": round(self.hit_share, 4),
            "miss_share_p99": self.miss_share(0.99),
            "hits": self.hits,
            "misses": self.misses,
            "evicted": self.evicted,
            "requests": self.requests,
            "bytes_read": self.bytes_read,
            "bandwidth": round(self.bandwidth),
            "stall_s": round(self.stall_ns / 1e9, 4),
            "tokens": self.tokens,
        }

    def described(self) -> str:
        """In a line."""
        tokens = max(1, self.tokens)
        return (
            f"from the disk {self.bytes_read / tokens / 1e6:.1f} MB a token at {self.bandwidth / 1e6:.0f} MB/s · "
            f"{self.hit_share:.1%} of the neurons were in memory, of 99 % of the tokens "
            f"{1 - self.miss_share(0.99):.0%} or more · waited {self.stall_ns / tokens / 1e6:.1f} ms a token"
        )
