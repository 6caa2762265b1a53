"""What of a prompt's neurons is written down on the board while they are computed."""

from enum import IntEnum

__all__ = ["Noted"]


class Noted(IntEnum):
    """Each with the layout of its table, 16 bits a number."""

    # Nothing: no table.
    NOTHING = 0
    # Which tokens fire a neuron: [layers, groups, 32, panels], bit t = token t of the panel.
    FIRING = 1
    # How large each neuron's factor is, |h| in the sum over h * down row: bfloat16 [layers, tokens, neurons].
    MAGNITUDES = 2
