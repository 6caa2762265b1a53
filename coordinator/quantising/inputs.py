"""What a model's matrices get as inputs, sampled on text: the model runs in torch, layer by layer, in its own weights.

Each text passes a layer before the next layer is read, so that of the feed-forward one layer is in memory.
"""

from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt
import torch

from warmfront.coordinator.decode.team_config import Place
from warmfront.coordinator.decode.torch_network import TorchNetwork
from warmfront.coordinator.quantising.samples import Samples
from warmfront.coordinator.selectors.calibration import factors, matrix_products
from warmfront.coordinator.selectors.lowbit import groups_of
from warmfront.shared.model.formats import Kind, unpack
from warmfront.shared.model.kv_layout import pages_of
from warmfront.shared.model.store import PackedModel
from warmfront.shared.selector import ALL

__all__ = ["sample"]

Floats = npt.NDArray[np.float32]


class _Wide(TorchNetwork):
    """In float32: for products of float16 most CPUs have no instruction, and torch takes minutes instead of seconds."""

    def _read(self, name: str) -> torch.Tensor:
        return super()._read(name).float()


def sample(
    model: PackedModel, texts: Sequence[Sequence[int]], samples: Samples, progress: Callable[[int, int], None]
) -> None:
    """Sample what the matrices of `model`, in floats, get for texts of token ids, each no longer than its context.

    `progress` gets layers.
    """
    spec, layers = model.spec, model.spec.layers
    longest = max(map(len, texts))
    network, begin = _Wide(model, "cpu", longest, Kind.F32, ALL), Place(0, np.arange(pages_of(longest)))
    network.load(lambda: True)
    with torch.inference_mode():
        streams = [network.embed(torch.tensor(list(ids)), 0) for ids in texts]
        for layer in range(layers):
            attention, mixed, inputs = [], [], []
            for i, x in enumerate(streams):
                attention.append(network.attention_input(layer, x))
                mixed.append(network.mixed(layer, attention[-1], begin))
                streams[i], _, normed = network.add_attention(layer, x, begin)
                inputs.append(normed)
            samples.add(f"layers.{layer}.attention", torch.cat(attention).float().numpy())
            samples.add(f"layers.{layer}.o", torch.cat(mixed).float().numpy())
            samples.add(f"layers.{layer}.feed-forward", torch.cat(inputs).float().numpy())
            fired, output = _feed_forward(model, layer, torch.cat(inputs).numpy())
            samples.add(f"layers.{layer}.down", fired)
            parts = torch.split_with_sizes(torch.from_numpy(output), [len(ids) for ids in texts])
            streams = [network.add_feed_forward(layer, x, part, None) for x, part in zip(streams, parts, strict=True)]
            progress(layer + 1, layers)
        # An embedding that is the head as well: as the embedding it is only looked up.
        head = ".embed" if spec.architecture.tied_head else ".head"
        samples.add(head, torch.cat([network.head_input(x) for x in streams]).float().numpy())


def _feed_forward(model: PackedModel, layer: int, x: Floats) -> tuple[Floats, Floats]:
    """The factors of all neurons for inputs [tokens, hidden], and what they make of their down rows."""
    layout, groups = model.layout, groups_of(model, layer)
    fired = factors(model.spec.architecture.feed_forward, matrix_products(model, groups, x))
    bundles = groups[:, : layout.tail_offset].reshape(-1, layout.bundle_bytes)
    rows = bundles[:, layout.down_offset : layout.down_offset + layout.down_row_bytes]
    return fired, fired @ unpack(rows, layout.down_kind, layout.hidden)
