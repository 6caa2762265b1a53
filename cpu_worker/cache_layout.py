"""How a CPU worker's memory is laid out when it is a cache of the packed file.

Every group has an address of its own for good, in a reservation as large as all of them together; what is cached is
what has pages there. So the kernels that compute neurons find them as ever, and need not know what is cached:

    group   = pinned part | unit | unit | ...      each a number of whole pages
    pinned    with `exact` the gate rows, as `part_gates` lays them, and their biases, which every token reads; the
              tail of a group whose units are neurons; never dropped
    unit      what is read and dropped as one: a neuron's bundle, without its gate row where that is pinned; or all
              bundles of the group: where all neurons are computed, and where neurons are so small that whole pages
              would waste more than a third
"""

from dataclasses import dataclass

from warmfront.shared.kernels.by_address.records import by_address
from warmfront.shared.kernels.feed_forward.bundles import Bundles
from warmfront.shared.model.bundle import GROUP, BundleLayout
from warmfront.shared.selector import Work

__all__ = ["PAGE", "CacheLayout", "cache_layout"]

PAGE = 4096
# Of a cache.
_LINE = 64
# Neurons that fill their pages by less are cached by groups.
_LEAST_FILLED = 2 / 3


def _pages(size: int) -> int:
    return -(-size // PAGE) * PAGE


@dataclass(frozen=True, slots=True)
class CacheLayout:
    """Sizes in memory, in bytes, of a group of so many units, 1 or 32."""

    units: int
    unit_bytes: int
    pinned_bytes: int
    # Whether the pinned part holds gate rows.
    apart: bool
    # Where the pinned part holds the group's tail; of units that are groups it lies in the unit.
    tail_at: int
    # Where the pinned part holds the gates' biases, float32 [32]; 0 without.
    biases_at: int
    # Of a bundle in the file, how many bytes at its start are not in its unit, and bytes between two bundles of a unit.
    skipped: int
    step: int

    @property
    def group_bytes(self) -> int:
        """From one group to the next."""
        return self.pinned_bytes + self.units * self.unit_bytes

    def bundles(self, bundles: Bundles, layout: BundleLayout) -> Bundles:
        """`bundles`, as `bundles_at` describes those of `layout`, in this one."""
        changes = {"group_bytes": self.group_bytes}
        if not bundles.tiled:
            changes |= {
                "bundle_bytes": self.step,
                "first": self.pinned_bytes - self.skipped,
                "tail_offset": self.tail_at if self.pinned_bytes else layout.tail_offset,
                "gate_biases": self.biases_at,
            }
        fields = {name: getattr(bundles, name) for name in Bundles._fields}
        return by_address(Bundles(**(fields | changes)))


def cache_layout(layout: BundleLayout, work: Work) -> CacheLayout:
    """The layout of a run whose decoded tokens are that work."""
    whole = CacheLayout(1, _pages(layout.group_bytes), 0, False, 0, 0, 0, layout.bundle_bytes)
    if work is Work.DENSE:
        return whole
    tail = layout.group_bytes - layout.tail_offset
    if work is Work.MASK:
        if layout.bundle_bytes < _LEAST_FILLED * _pages(layout.bundle_bytes):
            return whole
        padded = _pages(layout.bundle_bytes)
        return CacheLayout(GROUP, padded, _pages(tail), False, 0, 0, 0, padded)
    row = layout.gate_row_bytes
    tail_at = -(-GROUP * row // _LINE) * _LINE
    biases_at = tail_at + tail if layout.gate_bias_offset else 0
    pinned, rest = _pages(tail_at + tail + 4 * GROUP), layout.bundle_bytes - row
    if rest < _LEAST_FILLED * _pages(rest):
        return CacheLayout(1, _pages(GROUP * rest), pinned, True, tail_at, biases_at, row, rest)
    return CacheLayout(GROUP, _pages(rest), pinned, True, tail_at, biases_at, row, _pages(rest))
