"""The byte layout of packed feed-forward weights: neuron bundles and groups of them.

    layer   = groups x group                   the last group is padded with all-zero neurons
    group   = 32 x bundle | tail               the unit that is owned, stored and moved
    bundle  = [gate row | up row | biases | down row | zeros up to a multiple of 64 bytes]
    tail    = with down rows of type Q4C: [float16 scale, float16 minimum] of each column, for the 32 down rows
              together: hidden scales, hidden minima, zeros up to a multiple of 64 bytes; else nothing

Gate and up rows are of `gate_kind`; the down row, the neuron's column of W_down, is of `down_kind`. A row is
packed as in `formats.py`. Computing a neuron: h = activation(gate . x) * (up . x), FFN(x) = sum over h * down.

Without a gate the up row has its place, and all that is said of gates, for h = activation(up . x): computing such a
neuron is computing one whose up is 1. Biases are float32, of gate and of up where there are any, behind the rows that
they are added to; the down row then starts at a multiple of 64 bytes.
"""

from dataclasses import dataclass

from warmfront.shared.model.formats import Kind, row_bytes

__all__ = ["GROUP", "BundleLayout"]

# Neurons of a group: one for each lane of a GPU's warp, one for each bit of a mask word.
GROUP = 32

# Bundles and groups start on cache lines.
_ALIGNMENT = 64


def _padded(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT


@dataclass(frozen=True, slots=True, kw_only=True)
class BundleLayout:
    """Sizes of one model's bundles; all properties but `groups` are in bytes."""

    # Weights of a row, a multiple of 32.
    hidden: int
    # Neurons of a layer.
    ffn: int
    # Weight type of gate and up rows.
    gate_kind: Kind
    # Weight type of down rows.
    down_kind: Kind
    # Whether there are gate rows.
    gated: bool = True
    # Which of gate and up have a bias.
    biases: tuple[str, ...] = ()

    @property
    def gate_row_bytes(self) -> int:
        """Length of the gate row and of the up row."""
        return row_bytes(self.gate_kind, self.hidden)

    @property
    def down_row_bytes(self) -> int:
        """Length of the down row."""
        return row_bytes(self.down_kind, self.hidden)

    @property
    def gate_bytes(self) -> int:
        """What is read of a neuron to know its gate."""
        return self.gate_row_bytes

    @property
    def rest_bytes(self) -> int:
        """What else is read of a neuron that is computed whole: its up row, if it has a gate, and its down row."""
        return self.up_offset + self.down_row_bytes

    @property
    def up_offset(self) -> int:
        """Where the up row starts in a bundle: behind the gate row, which starts at 0."""
        return self.gate_row_bytes if self.gated else 0

    def bias_offset(self, part: str) -> int:
        """Where a neuron's bias of gate or up starts in its bundle, at a multiple of 4; 0 if there is none."""
        if part not in self.biases:
            return 0
        return -(-(self.up_offset + self.gate_row_bytes) // 4) * 4 + 4 * self.biases.index(part)

    @property
    def gate_bias_offset(self) -> int:
        """The same of the row that the activation takes, which without a gate is the up row."""
        return self.bias_offset("gate" if self.gated else "up")

    @property
    def up_bias_offset(self) -> int:
        """The same of the up row beside a gate row."""
        return self.bias_offset("up") if self.gated else 0

    @property
    def down_offset(self) -> int:
        """Where the down row starts in a bundle."""
        if not self.biases:
            return self.up_offset + self.gate_row_bytes
        return _padded(self.bias_offset(self.biases[-1]) + 4)

    def place_of(self, part: str) -> tuple[int, Kind]:
        """Where a neuron's row of `part` (gate, up or down) starts in its bundle, and the row's weight type."""
        starts = {"gate": 0, "up": self.up_offset, "down": self.down_offset}
        return starts[part], self.down_kind if part == "down" else self.gate_kind

    @property
    def bundle_bytes(self) -> int:
        """Length of a neuron's bundle, padding included."""
        return _padded(self.down_offset + self.down_row_bytes)

    @property
    def group_bytes(self) -> int:
        """Length of a group."""
        return self.tail_offset + self._tail_bytes

    @property
    def tail_offset(self) -> int:
        """Where the tail starts in a group."""
        return GROUP * self.bundle_bytes

    @property
    def _tail_bytes(self) -> int:
        return _padded(4 * self.hidden) if self.down_kind == Kind.Q4C else 0

    @property
    def groups(self) -> int:
        """Groups of a layer, counting the padded last one."""
        return -(-self.ffn // GROUP)
