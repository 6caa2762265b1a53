"""What the next tokens will read, and how unevenly, from what the last ones read."""

from statistics import NormalDist

import numpy as np
import numpy.typing as npt

from warmfront.coordinator.balancing.interface import BalancerState, Floats, Owners

__all__ = ["ActivityEstimate", "Margin"]

Reals = npt.NDArray[np.floating]


class ActivityEstimate:
    """Bytes per token that each group will read: its long run, and the last tokens as far as they can be trusted.

    How far that is, the tokens tell: the share s of the difference (recent - long run) that would have foretold them
    best (least squares). While nothing changes the difference is noise and s about 0; after a change of topic s is 1.
    """

    def __init__(self, long_run: Floats, long_tokens: float, recent_tokens: float, trust_tokens: float) -> None:
        self._long = long_run.astype(np.float64)
        self._recent = self._long.copy()
        self._times = long_tokens, recent_tokens, trust_tokens
        self._told = self._drift = 0.0

    def observe(self, bytes_read: Reals) -> None:
        """Take in a token's bytes [L, G]."""
        long, recent, trust = self._times
        drift, new = self._recent - self._long, bytes_read - self._long
        # Sums, not dot products, for which BLAS would wake its threads.
        self._told += float((drift * new).sum()) - self._told / trust
        self._drift += float((drift * drift).sum()) - self._drift / trust
        self._long += new / long
        self._recent += (bytes_read - self._recent) / recent

    @property
    def bytes(self) -> Floats:
        """[L, G] per token."""
        share = min(max(self._told / self._drift, 0.0), 1.0) if self._drift > 0 else 0.0
        return self._long + share * (self._recent - self._long)


class Margin:
    """By how much the homes should on average be done before the caches.

    Loads vary from token to token, and the later side is what a layer takes. A byte costs a home more than a cache, so
    the mean of the later side's time is least where the homes are late less often: as often as the costs of a byte
    relate, b_cache / (b_home + b_cache) of the tokens (its derivative by the bytes moved is 0). The variation is that
    of the difference of the two times, from one token to the next.
    """

    def __init__(self, layers: int, tokens: float) -> None:
        self._kept = 1 - 1 / tokens
        self._variance = np.zeros(layers)
        self._weight = 0.0
        self._pace: Floats | None = None  # [L, G]: ns per byte, of caches negative
        self._gap: Floats | None = None
        self._quantile = 0.0

    def watch(self, situation: BalancerState, owner: Owners) -> None:
        """From now on these are the owners and the costs."""
        homes, byte_ns = situation.homes, situation.costs[:, 1]
        # Workers of a side share its bytes.
        home, cache = (1 / (1 / byte_ns[side]).sum() if side.any() else 0.0 for side in (homes, ~homes))
        self._pace = np.where(homes[owner], home, -cache) if home and cache else None
        self._quantile = NormalDist().inv_cdf(home / (home + cache)) if home and cache else 0.0
        self._gap = None

    def observe(self, bytes_read: Reals) -> None:
        """Take in a token's bytes [L, G]."""
        if self._pace is None:
            return
        gap = (self._pace * bytes_read).sum(1)
        if self._gap is not None:
            self._variance = self._kept * self._variance + (gap - self._gap) ** 2 / 2
            self._weight = self._kept * self._weight + 1
        self._gap = gap

    @property
    def ns(self) -> Floats:
        """[L]."""
        return np.asarray(max(self._quantile, 0.0) * np.sqrt(self._variance / max(self._weight, 1.0)))
