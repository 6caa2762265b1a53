"""What a model takes on a torch device.  pytest tests/coordinator/decode/test_torch_network.py"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.coordinator.decode.teams import CONTEXT, packed
from warmfront.coordinator.decode.torch_network import TorchNetwork, device_bytes
from warmfront.shared.model.formats import Kind
from warmfront.shared.selector import ALL

MakeLlama = Callable[..., Path]


def tensors_of(values: Any) -> Iterator[torch.Tensor]:
    for value in values:
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from tensors_of(value)


@pytest.mark.parametrize("tied", [False, True])
def test_bytes_on_the_device(tiny_llama: MakeLlama, tied: bool) -> None:
    """Said before anything is loaded; the tables of RoPE and the like apart."""
    with packed(tiny_llama(attention_bias=True, tie_word_embeddings=tied), "q8") as model:
        network = TorchNetwork(model, "cpu", CONTEXT, Kind.F32, ALL)
        network.load(lambda: True)
        have = {tensor.data_ptr(): tensor.nbytes for tensor in tensors_of(vars(network).values())}
        small = network._rotary.nbytes + network._bits.nbytes
        assert sum(have.values()) - small == device_bytes(model, CONTEXT, Kind.F32, ALL)
