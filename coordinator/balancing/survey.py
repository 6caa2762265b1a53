"""What a decision looks at of all groups, compiled: one pass that says which layers need a closer look, and lists.

W workers, L layers, G groups. 48 layers of 3,072 groups take numpy a millisecond for each question asked of all of them
(docs/log.md).
"""

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from warmfront.coordinator.balancing.activity import Averages
from warmfront.coordinator.balancing.interface import BalancerState, Bools, Floats, Ints, Owners
from warmfront.shared.kernels.jit import compile_for, kernel

__all__ = ["Survey", "Surveyor"]

Reals32 = npt.NDArray[np.float32]


class Survey(NamedTuple):
    """What is expected of every group, and the sums and extremes of every layer."""

    expected: Reals32  # [L, G]: bytes per token
    saves: Reals32  # [L, G]: ns per token that they take at the home's pace
    loads: Floats  # [W, L]: bytes per token that each worker is expected to read
    held: Floats  # [W, L]: of all it could: of homes what they are home to, of caches what they have copies of
    missed: Reals32  # [L]: the most that a group saves which no cache has a copy of
    spared: Reals32  # [W, L]: the least that a copy of each cache saves; infinite without copies


class Surveyor:
    """Makes surveys and lists, in memory of its own: each is valid until the next."""

    def __init__(self, layers: int, groups: int) -> None:
        shape = layers, groups
        self._expected, self._saves = np.empty(shape, np.float32), np.empty(shape, np.float32)
        self._places = np.empty(layers * groups, np.int64)
        self._values = np.empty(layers * groups, np.float32)
        # Now, not between two tokens.
        chosen, some, least = np.zeros(shape, np.bool_), np.zeros(layers, np.bool_), np.float32(0)
        compile_for(_list, self._saves, chosen, some, least, least, self._places, self._values)
        owners = np.zeros(shape, np.uint8)
        sums = np.zeros((1, layers))
        averages = Averages(self._saves, self._saves, np.ones(2), np.ones(3))
        tables = _Tables(owners, owners, chosen[None], some)
        extremes = sums.astype(np.float32)
        found = Survey(self._saves, self._saves, sums, sums, extremes[0], extremes)
        compile_for(_survey, averages, (1.0, 1.0), tables, self._values, found)

    def survey(self, state: BalancerState, averages: Averages, blend: tuple[float, float]) -> Survey:
        """The survey of the groups of which these parts of the averages are expected."""
        shape = len(state.is_home), len(state.owner)
        sums = (np.empty(shape), np.empty(shape), np.empty(shape[1], np.float32), np.empty(shape, np.float32))
        found = Survey(self._expected, self._saves, *sums)
        byte_ns = state.costs[:, 1].astype(np.float32)
        tables = _Tables(state.owner, state.home, state.resident, state.is_home)
        _survey(averages, blend, tables, byte_ns, found)
        return found

    def list_groups(
        self, values: Reals32, chosen: Bools, layers: Bools, low: float, high: float, count: int
    ) -> tuple[Ints, Reals32]:
        """Places (layer * G + group) and values of groups `chosen` [L, G] of some `layers` [L], low < value <= high.

        The `count` largest ones if count is positive, else the -count smallest ones; in that order.
        """
        size = _list(values, chosen, layers, np.float32(low), np.float32(high), self._places, self._values)
        places, found = self._places[:size], self._values[:size]
        keys = -found if count > 0 else found
        if size > abs(count):
            best = np.argpartition(keys, abs(count))[: abs(count)]
            best.sort()
            places, found, keys = places[best], found[best], keys[best]
        order = np.argsort(keys, kind="stable")
        return places[order], found[order]


class _Tables(NamedTuple):
    """Of the state."""

    owner: Owners
    home: Owners
    resident: Bools
    is_home: Bools


@kernel
def _survey(averages: Averages, blend: tuple[float, float], tables: _Tables, byte_ns: Any, found: Survey) -> None:
    layers, groups = tables.owner.shape
    zero, of_long, of_short = np.float32(0), np.float32(blend[0]), np.float32(blend[1])
    none, infinite = np.int32(0), np.int32(0x7F800000)
    # Floats from 0 to infinity are in the order of their bits as whole numbers, whose extremes are found by vectors.
    missed, spared = found.missed.view(np.int32), found.spared.view(np.int32)
    cached = np.empty(groups, np.uint8)
    # Loops that do one thing each, which become vectors.
    for layer in range(layers):
        load, saves, long, short = (
            found.expected[layer],
            found.saves[layer],
            averages.long[layer],
            averages.short[layer],
        )
        owners, homes, bits = tables.owner[layer], tables.home[layer], found.saves[layer].view(np.int32)
        for group in range(groups):
            load[group] = of_long * long[group] + of_short * short[group]
            saves[group] = zero
            cached[group] = 0
        for number in range(len(tables.is_home)):
            worker, total, able, least = np.uint8(number), zero, zero, infinite
            for group in range(groups):
                total += load[group] if owners[group] == worker else zero
            if tables.is_home[number]:
                for group in range(groups):
                    ours = load[group] if homes[group] == worker else zero
                    able += ours
                    saves[group] += ours * byte_ns[number]
            else:
                copies = tables.resident[number, layer].view(np.uint8)
                for group in range(groups):
                    able += load[group] if copies[group] != 0 else zero
                for group in range(groups):
                    value = bits[group] if copies[group] != 0 else infinite
                    least = value if value < least else least
                for group in range(groups):
                    cached[group] |= copies[group]
            found.loads[number, layer], found.held[number, layer], spared[number, layer] = total, able, least
        most = none
        for group in range(groups):
            value = bits[group] if cached[group] == 0 else none
            most = value if value > most else most
        missed[layer] = most


@kernel
def _list(values: Reals32, chosen: Bools, layers: Bools, low: Any, high: Any, places: Ints, found: Reals32) -> int:
    count, groups = 0, values.shape[1]
    for layer in range(len(layers)):
        if layers[layer]:
            for group in range(groups):
                value = values[layer, group]
                if chosen[layer, group] and low < value <= high:
                    places[count], found[count] = layer * groups + group, value
                    count += 1
    return count
