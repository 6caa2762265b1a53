"""What the next tokens will read, and how unevenly, estimated from what the last ones read.  L layers of G groups.

A token costs what it used: the averages of all other groups only fall, which one common factor tells.
"""

from statistics import NormalDist
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from warmfront.coordinator.balancing.interface import BalancerState, Floats, Masks, Owners, PromptLoad, Used
from warmfront.shared.kernels.atomics import address_of
from warmfront.shared.kernels.jit import compile_for, inlined, kernel
from warmfront.shared.kernels.rows import bits_of, prefetch

__all__ = ["ActivityEstimate", "Margin"]

# Below it a common factor is multiplied into its average: far above the smallest float32, and rarely reached.
_SMALLEST_SCALE = 1e-12


class Averages(NamedTuple):
    """Two moving averages; float32, which is enough for what scatters by far more than 1e-7."""

    long: npt.NDArray[np.float32]  # [L, G], times scales[0]
    short: npt.NDArray[np.float32]  # [L, G], times scales[1]
    scales: Floats  # [2]
    # Of the averages as vectors: long . long, long . short, short . short. Kept up with every token, since to compute
    # them takes all groups; what rounding adds falls with the averages.
    dots: Floats  # [3]


class _Sides(NamedTuple):
    """Who owns what, as homes and caches, and what a byte costs them."""

    owner: Owners  # [L, G]
    homes: int  # workers below are homes
    home_ns: float  # of a byte, all workers of the side together; both 0 where a side is missing
    cache_ns: float


class _Rows(NamedTuple):
    """A layer of what `_learn` reads and writes, [G] each."""

    asked: Masks
    computed: Masks
    owner: npt.NDArray[np.uint8]
    long: npt.NDArray[np.float32]
    short: npt.NDArray[np.float32]


class _Factors(NamedTuple):
    """What a token's words are multiplied by."""

    gate_bytes: np.float32
    rest_bytes: np.float32
    long_add: np.float32
    short_add: np.float32
    home_ns: np.float32
    cache_ns: np.float32
    homes: np.uint8


@inlined
def _learn_groups(rows: _Rows, by: _Factors, first: int, last: int, sums: Floats) -> None:
    """The groups from `first` to before `last`."""
    zero = np.float32(0)
    with_long, with_short, with_itself, ns, total = zero, zero, zero, zero, zero
    for group in range(first, last):
        word = rows.asked[group]
        whole = np.float32(bits_of(rows.computed[group] & word))
        read = np.float32(bits_of(word)) * by.gate_bytes + whole * by.rest_bytes
        with_long += rows.long[group] * read
        with_short += rows.short[group] * read
        with_itself += read * read
        total += read
        ns += read * (by.home_ns if rows.owner[group] < by.homes else by.cache_ns)
        rows.long[group] += by.long_add * read
        rows.short[group] += by.short_add * read
    sums[0] += with_long
    sums[1] += with_short
    sums[2] += with_itself
    sums[3] += ns
    sums[4] += total


@kernel
def _learn(used: Used, averages: Averages, kept: tuple[float, float], sides: _Sides, gaps: Floats) -> Any:
    """Take a token in; `kept` of the long and the short average. Fills `gaps` [L]: by how many ns the homes were later
    than the caches. Returns (short - long) . (token - long) and |short - long|^2 as they were before; and the sums of
    the token's bytes and of their squares."""
    layers = len(gaps)
    old, new = averages.scales.copy(), averages.scales * np.array(kept)
    by = _Factors(
        np.float32(used.gate_bytes),
        np.float32(used.rest_bytes),
        np.float32((1 - kept[0]) / new[0]),
        np.float32((1 - kept[1]) / new[1]),
        np.float32(sides.home_ns),
        np.float32(-sides.cache_ns),
        np.uint8(sides.homes),
    )
    sums = np.zeros(5)
    for layer in range(layers):
        rows = _Rows(
            used.asked[layer], used.computed[layer], sides.owner[layer], averages.long[layer], averages.short[layer]
        )
        sums[3] = 0
        # A mixture's token uses one of sixteen experts: the others are not looked at. Its rows are nowhere near each
        # other, and have left the caches since the last token: without fetching them at once, four fifths of the time.
        for branch in range(len(used.bounds) - 1):
            if used.uses[layer, branch] != 0:
                first, count = used.bounds[branch], used.bounds[branch + 1] - used.bounds[branch]
                for words in (rows.asked, rows.computed):
                    prefetch(address_of(words) + 4 * first, 4 * count, 64)
                for average in (rows.long, rows.short):
                    prefetch(address_of(average) + 4 * first, 4 * count, 64)
                prefetch(address_of(rows.owner) + first, count, 64)
        for branch in range(len(used.bounds) - 1):
            if used.uses[layer, branch] != 0:
                _learn_groups(rows, by, used.bounds[branch], used.bounds[branch + 1], sums)
        gaps[layer] = sums[3]
    averages.scales[:] = new
    long_token, short_token, square = sums[0] * old[0], sums[1] * old[1], sums[2]
    dots = averages.dots
    cross, drift = short_token - long_token - dots[1] + dots[0], dots[2] - 2 * dots[1] + dots[0]
    (p, q), (a, b) = kept, (1 - kept[0], 1 - kept[1])
    dots[0] = p * p * dots[0] + 2 * p * a * long_token + a * a * square
    dots[1] = p * q * dots[1] + p * b * long_token + q * a * short_token + a * b * square
    dots[2] = q * q * dots[2] + 2 * q * b * short_token + b * b * square
    return cross, drift, sums[4], square


class ActivityEstimate:
    """Bytes per token that each group is expected to read: a blend of a long and a short moving average.

    The long one starts from the profile. The short one follows a change of topic at once, but is noisy while nothing
    changes: over 20 tokens its noise is 1 / sqrt(40) of a token's. How far to trust it, the tokens tell: expected is
    long + s (short - long) with the share s that would have predicted the last tokens best (least squares), which is
    about 0 while nothing changes and 1 after a change of topic.
    """

    def __init__(
        self, long_run: Floats, long_tokens: float, short_tokens: float, trust_tokens: float, *, unit: float = 0.0
    ) -> None:
        """`long_run` [L, G]: bytes per token by the profile; time constants of the averages and of s, in tokens that
        are observed: nothing is known of others, however many go by. `unit`: bytes that are read at a time, until
        tokens tell."""
        start = long_run.astype(np.float32)
        self.averages = Averages(start, start.copy(), np.ones(2), np.full(3, float((long_run * long_run).sum())))
        self._kept = 1 - 1 / long_tokens, 1 - 1 / short_tokens, 1 - 1 / trust_tokens
        # Moving averages of the regression of (token - long) on (short - long): s is their quotient.
        self._cross = self._square = 0.0
        # Likewise, of a token's bytes and their squares.
        self._bytes, self._squares = 1.0, float(unit)
        self._times = long_tokens, short_tokens
        self._gaps = np.zeros(len(long_run))
        self._sides = _Sides(np.zeros(long_run.shape, np.uint8), 0, 0.0, 0.0)
        # Now, not between the first two tokens.
        words, uses = np.zeros(long_run.shape, np.uint32), np.zeros(long_run.shape, np.uint8)
        nothing = Used(words, words, uses, np.zeros(1, np.int64), 0, 0)
        compile_for(_learn, nothing, self.averages, (1.0, 1.0), self._sides, self._gaps)

    def watch(self, state: BalancerState, owner: Owners) -> None:
        """From now on these are the owners and the costs, of which `observe` tells the gaps."""
        is_home, byte_ns = state.is_home, state.costs[:, 1]
        # Workers of a side share its bytes: their speeds add up.
        home, cache = (float(1 / (1 / byte_ns[side]).sum()) if side.any() else 0.0 for side in (is_home, ~is_home))
        both = bool(home and cache)
        self._sides = _Sides(owner, int(is_home.sum()), home * both, cache * both)

    def read(self, prompt: PromptLoad) -> None:
        """Take in a prompt's tokens, as so many that all read their mean.

        How far to trust the short average follows from the distance d between the two, as the prompt leaves them: from
        d . (mean - long), but for what chance adds to that. The mean of n tokens scatters by the unit times its bytes
        over n, and has gone into both averages.
        """
        mean, tokens = prompt.bytes_read, prompt.tokens
        kept_long, kept_short, kept = (each**tokens for each in self._kept)
        averages = self.averages
        for average, scale, part in ((averages.long, 0, kept_long), (averages.short, 1, kept_short)):
            average *= np.float32(averages.scales[scale] * part)
            average += ((1 - part) * mean).astype(np.float32)
            averages.scales[scale] = 1.0
        long, short = averages.long.astype(np.float64), averages.short.astype(np.float64)
        averages.dots[:] = np.vdot(long, long), np.vdot(long, short), np.vdot(short, short)
        chance = (kept_long - kept_short) * self._unit * mean.sum() / tokens
        cross, square = np.vdot(mean - long, short - long) - chance, np.vdot(short - long, short - long)
        self._cross += (1 - kept) * (float(cross) - self._cross)
        self._square += (1 - kept) * (float(square) - self._square)

    def observe(self, used: Used) -> Floats:
        """Take in what a token used. Returns by how many ns the homes were later than the caches, [L], valid until the
        next; 0 where one side is missing."""
        long, short, kept = self._kept
        # Before the averages learn the token: s is judged by prediction, not by fit.
        cross, square, total, squares = _learn(used, self.averages, (long, short), self._sides, self._gaps)
        self._cross += (1 - kept) * (cross - self._cross)
        self._square += (1 - kept) * (square - self._square)
        self._bytes += (1 - kept) * (total - self._bytes)
        self._squares += (1 - kept) * (squares - self._squares)
        for average, scale in ((self.averages.long, 0), (self.averages.short, 1)):
            if self.averages.scales[scale] < _SMALLEST_SCALE:
                average *= np.float32(self.averages.scales[scale])
                self.averages.scales[scale] = 1.0
        return self._gaps

    @property
    def _share(self) -> float:
        # Outside of 0..1 the quotient is chance: neither average is extrapolated.
        return min(max(self._cross / self._square, 0.0), 1.0) if self._square > 0 else 0.0

    @property
    def _unit(self) -> float:
        return self._squares / self._bytes if self._bytes > 0 else 0.0

    @property
    def blend(self) -> tuple[float, float]:
        """What is expected of each group: these parts of the arrays of the averages, long and short, in bytes."""
        return (1 - self._share) * float(self.averages.scales[0]), self._share * float(self.averages.scales[1])

    @property
    def noise_bytes(self) -> float:
        """The variance of what is expected of a group, per byte that is expected of it.

        A group that is read x bytes of at some tokens, by chance, has the variance E[x^2] - E[x]^2 at each, of which
        E[x^2] is nearly all: a unit times E[x], whose unit, as large as what is read at a time, is taken to be that of
        all groups. An average over T tokens has 1 / 2T of it.
        """
        (long, short), share = self._times, self._share
        return self._unit * ((1 - share) ** 2 / (2 * long) + share**2 / (2 * short))


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
        self._variance, self._last = np.zeros(layers), np.zeros(layers)
        self._weight = 0.0
        self._is_first = True
        self._quantile = 0.0

    def watch(self, state: BalancerState) -> None:
        """From now on the owners are others, and these the costs."""
        is_home, byte_ns = state.is_home, state.costs[:, 1]
        home, cache = (1 / (1 / byte_ns[side]).sum() if side.any() else 0.0 for side in (is_home, ~is_home))
        self._quantile = NormalDist().inv_cdf(home / (home + cache)) if home and cache else 0.0
        # The next gap is of other owners: its difference to the last one would be no noise.
        self._is_first = True

    def observe(self, gaps: Floats) -> None:
        """Take in the gaps [L] of a token: ns by which the homes were later."""
        if not self._is_first:
            self._variance = self._kept * self._variance + (gaps - self._last) ** 2 / 2
            self._weight = self._kept * self._weight + 1
        self._last[:], self._is_first = gaps, False

    def ns(self, balanced_ns: Floats, home_ns: Floats, least: float) -> Floats:
        """[L]; 0 where caches are the slower ones, or one side is missing. `balanced_ns`: what each layer takes in
        balance; `home_ns`: what its homes' bytes take now.

        Capped: in real runs the noise is not only the loads', and a wide margin left the caches the slower side. At
        `least` of the layer's time, or at the time of a lump: where loads come in lumps, such as experts, their
        variance is a lump times their mean. Homes that a single lump makes late are late whenever they have any: they
        get nothing that caches hold.
        """
        variance = self._variance / max(self._weight, 1.0)
        lump = variance / np.maximum(home_ns, 1.0)
        capped = np.minimum(self._quantile * np.sqrt(variance), np.maximum(least * balanced_ns, lump))
        return np.where(lump > balanced_ns, balanced_ns, capped) if self._quantile > 0 else np.zeros_like(variance)
