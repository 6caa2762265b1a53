"""What `info` says of predictors.  pytest tests/coordinator/cli/test_info.py"""

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conftest import GGUF_SHAPES
from warmfront.coordinator.cli.info import describe, render
from warmfront.shared.config import EngineConfig

Make = Callable[..., Path]
ONE = {"blk.0.ffn_down_t.weight": (512, 256), "blk.0.fc1.weight": (96, 256), "blk.0.fc2.weight": (512, 96)}
TWO = {name.replace("blk.0", "blk.1"): shape for name, shape in (GGUF_SHAPES | ONE).items()} | {
    **ONE,
    "blk.1.fc1.weight": (40, 256),
    "blk.1.fc2.weight": (512, 40),
}


@pytest.mark.parametrize(
    ("shapes", "layers", "rank", "line"),
    [
        (ONE, 1, [96, 96], "  predictor      rank 96, active above 0.25"),
        (TWO, 2, [40, 96], "  predictor      ranks 40 to 96, active above 0.25"),
    ],
)
def test_predictors(
    tiny_gguf: Make, shapes: dict[str, tuple[int, ...]], layers: int, rank: list[int], line: str
) -> None:
    fields = {"llama.block_count": layers, "powerinfer.sparse_threshold": 0.25}
    path = tiny_gguf(shapes=shapes, without=["blk.0.ffn_down.weight", "blk.1.ffn_down.weight"], fields=fields)
    facts = describe(str(path), EngineConfig(dtype="q4"), print, print)
    assert facts["predictor"] == {
        "input": "residual",
        "activation": "relu",
        "threshold": 0.25,
        "rank": rank,
        "look_ahead": False,
        "biases": (),
    }
    # Of type Q8: 34 bytes for 32 weights, and ranks are whole blocks.
    padded = [96, 64][:layers]
    assert facts["bytes"]["predictor"] == sum(r * 256 * 34 // 32 + 512 * r * 34 // 32 for r in padded)
    assert facts["dtypes"]["attention"] == "q4s"
    assert line in render(facts).splitlines()


def test_without_predictors(tiny_gguf: Make) -> None:
    facts = describe(str(tiny_gguf()), EngineConfig(), print, print)
    assert facts["predictor"] is None
    assert "predictor" not in render(facts)


def test_experts(tiny_family: Make) -> None:
    facts = describe(str(tiny_family("glm4 moe")), EngineConfig(), print, print)
    assert facts["experts"] == {
        "number": 12,
        "used": 3,
        "neurons": 40,
        "shared_neurons": 40,
        "dense_layers": [0, 1],
        "dense_neurons": 96,
    }
    said = "12 experts of 40 neurons, 3 used; 40 neurons for all tokens; 2 of the layers 96 neurons instead"
    assert said in render(facts)
