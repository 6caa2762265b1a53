"""What a CPU worker's cache of the packed file holds: the table that says it, and the policies that change it.

One thread plans: the first of the worker's, at the start of a job. `held` is the only truth of what has memory;
`arrived` says which of that has been read already, and is set by the readers. A unit that a job wants and that is not
held takes the place of another, is asked for on the ring of requests, and arrives while the job computes.

    policy      evicted first
    lru         what has not been used for longest
    window      what none of the last k tokens used, at once; then as lru
    frequency   what is used least often, by a moving average over some thousand tokens
    balance     what is expected to be used least: half by the profile, half by a moving average over some tokens; what
                comes in and is worth less than what has to go is the next to go itself. A unit costs the disk as much
                as any other, so that what is used more often is what pays.

For the last two the units are in lists by the magnitude of their rate, each of them in the order of use. A rate falls
while its unit is not used, so a list's oldest unit is looked at again before it is taken for what it was.
"""

from typing import Any, NamedTuple

import numpy as np

from warmfront.shared.kernels.atomics import drop_pages, fetch_add, load_acquire
from warmfront.shared.kernels.feed_forward.bundles import Bundles
from warmfront.shared.kernels.feed_forward.neuron_lists import lowest_bit
from warmfront.shared.kernels.jit import kernel
from warmfront.shared.wire.handoff import announce, await_sequence

__all__ = [
    "BALANCE",
    "BYTES_READ",
    "CAPACITY",
    "COUNTERS",
    "EVICTED",
    "FREE",
    "FREQUENCY",
    "HEAD",
    "HITS",
    "LATE",
    "LEVELS",
    "LRU",
    "MISSES",
    "NOW",
    "READING_NS",
    "REQUESTS",
    "RING",
    "SHARES",
    "STALL_NS",
    "STATE_WORDS",
    "TOKENS",
    "WINDOW",
    "Cache",
    "admit_units",
    "all_held",
    "begin_job",
    "fill_cache",
    "post",
    "publish_requests",
    "put_unit",
    "touch_units",
    "unit_at",
]

LRU, WINDOW, FREQUENCY, BALANCE = range(4)
# Lists of units by rate: list 0 is what goes first, list 15 is used by every token.
LEVELS = 16
# Requests that may be outstanding; a power of two.
RING = 1 << 14
# Words of `Cache.state`: places without a unit, and how many there may be; number of the job; requests posted; units
# that this token wanted and had, and wanted and missed; the list that is looked through next; groups of the job that
# are late.
FREE, CAPACITY, NOW, HEAD, _TOKEN_HITS, _TOKEN_MISSES, _HAND, LATE = range(8)
STATE_WORDS = 8
# Words of `Cache.counters`: see `shared/offload.py`.
HITS, MISSES, EVICTED, REQUESTS, BYTES_READ, READING_NS, STALL_NS, TOKENS = range(8)
SHARES = 8
COUNTERS = SHARES + 101
# Tokens over which the averages go.
_LONG, _SHORT = 2048.0, 64.0


class Cache(NamedTuple):
    """The cache as its kernels take it; `*_at` are addresses, tables [layers, groups] those of the board."""

    # As in `CacheLayout`; `at`: of all groups.
    at: int
    units: int
    unit_bytes: int
    pinned_bytes: int
    group_bytes: int
    skipped: int
    step: int
    tail_at: int
    biases_at: int
    apart: bool
    # The same of the packed file: `BundleLayout`, and the start of each layer, int64 [layers].
    bundle_bytes: int
    packed_bytes: int
    tail_offset: int
    starts: Any
    bundles: Bundles
    # The file, and the multiple at which it may be read.
    fd: int
    alignment: int
    # uint32: what has memory; int64: what has been read, of that. A bit for each unit.
    held: Any
    arrived: Any
    # uint8: whether the group was read as a whole and its checksum was right: then uint64 [layers, groups, units] has a
    # sum of each unit; uint64: the checksum of each group.
    known: Any
    unit_sums: Any
    group_sums: Any
    # int32 [all units + LEVELS]: rings of units, the last LEVELS are their ends; uint8: in which; float32: the average
    # at the time of the last use, and what the profile says; int32: number of the job of that use.
    following: Any
    preceding: Any
    level: Any
    score: Any
    prior: Any
    used: Any
    policy: int
    # In jobs, of `window`.
    window: int
    state: Any
    counters: Any
    # int64 [RING, 4]: layer, group, units, whether the pinned part is wanted.
    ring: Any
    # Lines: requests posted; requests done. A word: requests that readers have taken.
    posted_at: int
    done_at: int
    taken_at: int
    # Words: to give up; the number of what went wrong, with layer, group and error behind it.
    quit_at: int
    failure: Any
    # [threads that read, bytes]: what they read into.
    buffers: Any
    # Of the job: uint32 [groups] units that are there; int32 [groups] those of its groups that are late; uint32
    # [groups] wanted neurons of the others. A word: late groups that a thread has taken.
    present: Any
    late: Any
    late_taken_at: int
    # Groups of a prompt's job that are read at a time.
    chunk: int
    # Whether nothing is computed before all has been read.
    waits: bool
    # Words: readers that read, and since when any does.
    reading_at: int


@kernel
def unit_at(c: Cache, group: int, unit: int) -> int:
    """The address of a unit of a group, counted over all layers."""
    return c.at + group * c.group_bytes + c.pinned_bytes + unit * c.unit_bytes


@kernel
def _unlink(c: Cache, unit: int) -> None:
    before, after = c.preceding[unit], c.following[unit]
    c.following[before] = after
    c.preceding[after] = before


@kernel
def _link(c: Cache, unit: int, level: int) -> None:
    """Make `unit` the last that was used of a list."""
    end = len(c.following) - LEVELS + level
    before = c.preceding[end]
    c.following[before], c.preceding[unit] = unit, before
    c.following[unit], c.preceding[end] = end, unit
    c.level[unit] = level


@kernel
def _rate(c: Cache, unit: int) -> Any:
    """How often `unit` is used, of all tokens: its average has fallen since it was used."""
    tokens = np.float32(c.state[NOW] - c.used[unit]) / np.float32(len(c.starts))
    length = np.float32(_LONG if c.policy == FREQUENCY else _SHORT)
    return c.score[unit] * np.exp2(-tokens / length)


@kernel
def _level_of(c: Cache, unit: int) -> int:
    """The list that a unit belongs to."""
    if c.policy <= WINDOW:
        return 1
    rate = _rate(c, unit)
    if c.policy == BALANCE:
        rate = np.float32(0.5) * (rate + c.prior[unit])
    if rate <= 0:
        return 1
    # Two lists for each halving of the rate.
    return int(min(max(LEVELS - 1 + int(np.floor(np.float32(2) * np.log2(rate))), 1), LEVELS - 1))


@kernel
def _note_use(c: Cache, unit: int) -> None:
    if c.policy > WINDOW:
        length = np.float32(_LONG if c.policy == FREQUENCY else _SHORT)
        gain = np.float32(1) - np.exp2(np.float32(-1) / length)
        c.score[unit] = min(_rate(c, unit) + gain, np.float32(1))
    c.used[unit] = c.state[NOW]


@kernel
def _is_free_to_go(c: Cache, unit: int) -> bool:
    """Whether a unit is neither used by this job nor still being read."""
    group, bit = unit // c.units, np.int64(1) << np.int64(unit % c.units)
    groups = c.held.shape[1]
    arrived = c.arrived[group // groups, group % groups]
    return bool(c.used[unit] != c.state[NOW] and arrived & bit != 0)


@kernel
def _reconsider(c: Cache, level: int) -> int:
    """The oldest unit of a list, moved to the list where it belongs by now if that is a lower one; -1 if it is empty or
    in use, -2 if it was moved."""
    end = len(c.following) - LEVELS + level
    unit = c.following[end]
    if unit == end or not _is_free_to_go(c, unit):
        return -1
    now = _level_of(c, unit)
    if now < level and level > 1:
        _unlink(c, unit)
        _link(c, unit, now)
        return -2
    return int(unit)


@kernel
def _oldest_free(c: Cache, level: int) -> int:
    """The first unit of a list that is free to go; -1 if all are in use.

    Those in use before it become the last: what has come from a higher list stands behind them.
    """
    end = len(c.following) - LEVELS + level
    last, unit = c.preceding[end], c.following[end]
    while unit != end:
        if _is_free_to_go(c, unit):
            return int(unit)
        _unlink(c, unit)
        _link(c, unit, level)
        if unit == last:
            return -1
        unit = c.following[end]
    return -1


@kernel
def _victim(c: Cache) -> int:
    """The unit that is to go; -1 if all are in use."""
    if c.policy > WINDOW:
        c.state[_HAND] = 2 + (c.state[_HAND] - 1) % (LEVELS - 2)
        _reconsider(c, c.state[_HAND])
    level = 0
    while level < LEVELS:
        unit = _reconsider(c, level)
        if unit >= 0:
            return unit
        level = 1 if unit == -2 else level + 1
    for every in range(LEVELS):
        unit = _oldest_free(c, every)
        if unit >= 0:
            return unit
    return -1


@kernel
def _evict(c: Cache, unit: int) -> None:
    group, bit = unit // c.units, unit % c.units
    groups = c.held.shape[1]
    layer, place = group // groups, group % groups
    _unlink(c, unit)
    c.held[layer, place] &= ~(np.uint32(1) << np.uint32(bit))
    fetch_add(c.arrived.ctypes.data + 8 * group, -(np.int64(1) << np.int64(bit)))
    drop_pages(unit_at(c, group, bit), c.unit_bytes)
    c.state[FREE] += 1
    c.counters[EVICTED] += 1


@kernel
def put_unit(c: Cache, unit: int) -> bool:
    """Give a unit that is not held memory, if need be another's; False if all others are in use."""
    level = 1
    _note_use(c, unit)
    if c.policy > WINDOW:
        level = _level_of(c, unit)
    if c.state[FREE] == 0:
        other = _victim(c)
        if other < 0:
            return False
        if c.policy == BALANCE and level < c.level[other]:
            level = 0
        _evict(c, other)
    c.state[FREE] -= 1
    _link(c, unit, level)
    group = unit // c.units
    groups = c.held.shape[1]
    c.held[group // groups, group % groups] |= np.uint32(1) << np.uint32(unit % c.units)
    return True


@kernel
def begin_job(c: Cache, layer: int) -> None:
    """A job begins; with layer 0 a token does, or a batch of them."""
    c.state[NOW] += 1
    if layer == 0:
        wanted = c.state[_TOKEN_HITS] + c.state[_TOKEN_MISSES]
        if wanted > 0:
            c.counters[TOKENS] += 1
            c.counters[SHARES + 100 * c.state[_TOKEN_MISSES] // wanted] += 1
        c.state[_TOKEN_HITS], c.state[_TOKEN_MISSES] = 0, 0
    while c.policy == WINDOW:
        unit = c.following[len(c.following) - LEVELS + 1]
        if unit >= len(c.following) - LEVELS or c.state[NOW] - c.used[unit] <= c.window or not _is_free_to_go(c, unit):
            break
        _evict(c, unit)


@kernel
def touch_units(c: Cache, layer: int, group: int, wanted: int) -> None:
    """A job uses those of `wanted` that are held."""
    first = (layer * c.held.shape[1] + group) * c.units
    word = np.uint32(wanted) & c.held[layer, group]
    while word != 0:
        unit = first + lowest_bit(word)
        _note_use(c, unit)
        _unlink(c, unit)
        _link(c, unit, _level_of(c, unit))
        c.state[_TOKEN_HITS] += 1
        c.counters[HITS] += 1
        word &= word - np.uint32(1)


@kernel
def admit_units(c: Cache, layer: int, group: int, wanted: int) -> None:
    """Hold those of `wanted` that are not held yet, and ask for them. The cache holds a layer at least."""
    first = (layer * c.held.shape[1] + group) * c.units
    missing = np.uint32(wanted) & ~c.held[layer, group]
    word = missing
    while word != 0:
        put_unit(c, first + lowest_bit(word))
        c.state[_TOKEN_MISSES] += 1
        c.counters[MISSES] += 1
        word &= word - np.uint32(1)
    if missing != 0:
        post(c, layer, group, int(missing), 0)


@kernel
def post(c: Cache, layer: int, group: int, units: int, pinned: int) -> None:
    """Put a request on the ring; of a group whose units have known sums one for each run of neighbours."""
    while True:
        some = units
        if c.known[layer, group] != 0 and pinned == 0 and c.units > 1:
            # The lowest run: adding its lowest bit carries through it.
            some = units & ~(units + (units & -units))
        if c.state[HEAD] - load_acquire(c.done_at) >= RING:
            publish_requests(c)
            if await_sequence(c.done_at, c.state[HEAD], c.quit_at, 0, 0) != 0:
                return
        entry = c.ring[c.state[HEAD] % RING]
        entry[0], entry[1], entry[2], entry[3] = layer, group, some, pinned
        c.state[HEAD] += 1
        units &= ~some
        if units == 0:
            return


@kernel
def publish_requests(c: Cache) -> None:
    """Let the readers see what was posted."""
    if load_acquire(c.posted_at) != c.state[HEAD]:
        announce(c.posted_at, c.state[HEAD])


@kernel
def fill_cache(c: Cache, pinned: Any, units: Any) -> int:
    """Ask for what is to be there at first, uint8 and uint32 [layers, groups], and wait for it."""
    for layer in range(units.shape[0]):
        for group in range(units.shape[1]):
            for unit in range(c.units):
                if units[layer, group] & (np.uint32(1) << np.uint32(unit)):
                    put_unit(c, (layer * units.shape[1] + group) * c.units + unit)
            if units[layer, group] != 0 or pinned[layer, group] != 0:
                post(c, layer, group, int(units[layer, group]), int(pinned[layer, group]))
    publish_requests(c)
    return int(await_sequence(c.done_at, c.state[HEAD], c.quit_at, 0, 0))


@kernel
def all_held(c: Cache, layer: int, group: int, wanted: int) -> bool:
    """Whether all of `wanted` have been read."""
    arrived = load_acquire(c.arrived.ctypes.data + 8 * (layer * c.held.shape[1] + group))
    return bool(np.int64(wanted) & ~arrived == 0)
