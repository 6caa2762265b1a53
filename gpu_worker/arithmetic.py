"""What the emulated device computes: one call of compiled code for each `execute`, one for each layer and token.

Why one call: it costs 5 us beside the neurons; lists, sums and inputs made in Python cost 17 to 27 (two cores,
AVX-512).
"""

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from warmfront.shared.kernels.atomics import address_of
from warmfront.shared.kernels.byte_dot import quantise_input
from warmfront.shared.kernels.feed_forward.bundles import Bundles, Vectors
from warmfront.shared.kernels.feed_forward.ffn import (
    Batch,
    Selection,
    listed_neurons,
    open_gates,
    open_neurons,
    whole_groups,
)
from warmfront.shared.kernels.feed_forward.neuron_lists import list_masked
from warmfront.shared.kernels.jit import kernel
from warmfront.shared.kernels.prefill.dense_groups import dense_groups
from warmfront.shared.kernels.prefill.notes import NO_NOTES
from warmfront.shared.model.bundle import GROUP
from warmfront.shared.model.panels import LANES

__all__ = ["HostWorkspace", "Tokens", "add_masked", "add_whole"]

Ints = npt.NDArray[np.int32]
Words = npt.NDArray[np.uint32]


class HostWorkspace(NamedTuple):
    """The slots, and addresses of what computing them needs: see `HostDevice.ledger`."""

    bundles: Bundles
    # float32 [neurons of a layer]: gates that fire.
    gates: Any
    quantised_at: int
    scratch_at: int


class Tokens(NamedTuple):
    """What is computed: see `device.Device`."""

    x: Any
    inverse: Any
    out: Any


@kernel
def add_masked(
    work: HostWorkspace, slots: Ints, listed: Ints, tokens: Tokens, sparse: bool, mask: Words, computed: Words
) -> int:
    """One token after the other: the neurons of `mask`, those whose gate does not fire left out if `sparse`; gates that
    are apart mean both, of all neurons.

    Returns the number computed; `computed` tells which they were.
    """
    b, groups = work.bundles, len(slots)
    computed[:groups] = 0
    count, total = list_masked(mask, groups, listed), 0
    for token in range(len(tokens.x)):
        x_at, out = address_of(tokens.x[token]), tokens.out[token]
        out[:] = 0
        quantised_at = quantise_input(x_at, work.quantised_at, b.hidden)
        inverse_at = address_of(tokens.inverse) + 4 * token
        batch = Batch(1, x_at, quantised_at, 0, inverse_at, address_of(out), work.scratch_at)
        if b.tiled:
            whole_groups(b, slots, 0, groups, batch)
            total += groups * GROUP
        elif b.apart:
            opened = open_gates(b, slots, 0, groups, batch, mask.reshape(1, -1), work.gates, listed)
            total += open_neurons(b, slots, work.gates, listed, 0, opened, batch, computed.reshape(1, -1))
        else:
            selection = Selection(mask.reshape(1, -1), sparse, computed.reshape(1, -1))
            total += listed_neurons(b, slots, listed, 0, count, selection, batch)
    if b.tiled:
        computed[:groups] = 0xFFFFFFFF
    return total


@kernel
def add_whole(work: HostWorkspace, slots: Ints, tokens: Tokens) -> None:
    """All neurons for several tokens in panels, as matrix products."""
    tokens.out[:] = 0
    x_at, inverse_at, out_at = address_of(tokens.x), address_of(tokens.inverse), address_of(tokens.out)
    vectors = Vectors(x_at, inverse_at, out_at, work.scratch_at)
    dense_groups(work.bundles, slots, 0, len(slots), vectors, len(tokens.x) * LANES, slots, NO_NOTES)
