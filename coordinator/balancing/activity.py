"""What the next tokens will read, and how unevenly, estimated from what the last ones read.  L layers of G groups."""

from statistics import NormalDist

import numpy as np

from warmfront.coordinator.balancing.interface import BalancerState, Floats, Owners, Reals

__all__ = ["ActivityEstimate", "Margin"]


class ActivityEstimate:
    """Bytes per token that each group is expected to read: a blend of a long and a short moving average.

    The long one starts from the profile. The short one follows a change of topic at once, but is noisy while nothing
    changes: over 20 tokens its noise is 1 / sqrt(40) of a token's. How far to trust it, the tokens tell: expected is
    long + s (short - long) with the share s that would have predicted the last tokens best (least squares), which is
    about 0 while nothing changes and 1 after a change of topic.
    """

    def __init__(self, long_run: Floats, long_tokens: float, short_tokens: float, trust_tokens: float) -> None:
        """`long_run` [L, G]: bytes per token by the profile; time constants in tokens of the averages and of s."""
        self._long = long_run.astype(np.float64)
        self._short = self._long.copy()
        self._long_tokens, self._short_tokens, self._trust_tokens = long_tokens, short_tokens, trust_tokens
        # Moving sums of the regression of (token - long) on (short - long): s is their quotient.
        self._cross = self._square = 0.0

    def observe(self, bytes_read: Reals) -> None:
        """Take in a token's bytes [L, G]."""
        # Before the averages learn the token: s is judged by prediction, not by fit.
        drift, new = self._short - self._long, bytes_read - self._long
        # Sums, not dot products, for which BLAS would wake its threads on the workers' cores.
        self._cross += float((drift * new).sum()) - self._cross / self._trust_tokens
        self._square += float((drift * drift).sum()) - self._square / self._trust_tokens
        self._long += new / self._long_tokens
        self._short += (bytes_read - self._short) / self._short_tokens

    @property
    def expected_load(self) -> Floats:
        """[L, G]: bytes per token."""
        # Outside of 0..1 the quotient is chance: neither average is extrapolated.
        share = min(max(self._cross / self._square, 0.0), 1.0) if self._square > 0 else 0.0
        return self._long + share * (self._short - self._long)


class Margin:
    """By how many ns homes should on average finish before caches.

    Loads vary from token to token, and a layer takes the later side's time. A byte costs a home more than a cache, so
    the mean of the later side's time is least where the homes are late less often than the caches: in the share
    b_cache / (b_home + b_cache) of the tokens, where its derivative by the bytes moved is 0. For a normally distributed
    gap between the two sides that is a quantile times its deviation. The deviation comes from the gap's change between
    two tokens, half of whose mean square is the variance: what drifts slowly does not count as noise.
    """

    def __init__(self, layers: int, tokens: float) -> None:
        """`tokens`: time constant of the variance."""
        self._kept = 1 - 1 / tokens
        self._variance = np.zeros(layers)
        self._weight = 0.0
        self._signed_byte_ns: Floats | None = None  # [L, G]: of homes positive, of caches negative
        self._last_gap: Floats | None = None  # [L]: ns by which the homes were later than the caches
        self._quantile = 0.0

    def watch(self, state: BalancerState, owner: Owners) -> None:
        """From now on these are the owners and the costs."""
        is_home, byte_ns = state.is_home, state.costs[:, 1]
        # Workers of a side share its bytes: their speeds add up.
        home, cache = (1 / (1 / byte_ns[side]).sum() if side.any() else 0.0 for side in (is_home, ~is_home))
        self._signed_byte_ns = np.where(is_home[owner], home, -cache) if home and cache else None
        self._quantile = NormalDist().inv_cdf(home / (home + cache)) if home and cache else 0.0
        # The next gap is of other owners: its difference to the last one would be no noise.
        self._last_gap = None

    def observe(self, bytes_read: Reals) -> None:
        """Take in a token's bytes [L, G]."""
        if self._signed_byte_ns is None:
            return
        gap = (self._signed_byte_ns * bytes_read).sum(1)
        if self._last_gap is not None:
            self._variance = self._kept * self._variance + (gap - self._last_gap) ** 2 / 2
            self._weight = self._kept * self._weight + 1
        self._last_gap = gap

    @property
    def ns(self) -> Floats:
        """[L]; 0 where caches are the slower ones, or one side is missing."""
        return np.asarray(max(self._quantile, 0.0) * np.sqrt(self._variance / max(self._weight, 1.0)))
