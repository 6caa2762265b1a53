"""The selector lowbit where no gate ever closes: thresholds against float64, logits against transformers with the same
mask in torch.

Run: pytest tests/integration/test_weighed_neurons.py
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.integration.command import assert_refused, prepack, run
from tests.integration.gpu import budget_for
from tests.integration.reference import all_logits, llama_from_folder
from warmfront.coordinator import Engine
from warmfront.coordinator.engine import load
from warmfront.coordinator.selectors.calibration import calibrate
from warmfront.shared.kernels.lowbit import unpack_lowbit
from warmfront.shared.wire.board import ALL_NEURONS

Make = Callable[..., Path]
# Less than its whole weight is ever computed of a layer.
RECALL = 0.8
IDS = [3 + (7 * i + i // 13) % 290 for i in range(90)]

pytestmark = pytest.mark.usefixtures("compiled")


class Layer:
    """A feed-forward of transformers' as float64, with the copies and the thresholds of an engine."""

    def __init__(self, mlp: Any, engine: Engine, number: int) -> None:
        lowbit, layout = engine.session.runtime.lowbit, engine.model.layout
        assert lowbit is not None
        names = ("gate_proj", "up_proj") if hasattr(mlp, "gate_proj") else ("c_fc",)
        self.parts = [getattr(mlp, name).double() for name in names]
        self.down = (mlp.down_proj if hasattr(mlp, "down_proj") else mlp.c_proj).double()
        self.activation = mlp.act_fn if hasattr(mlp, "act_fn") else mlp.act
        neurons = self.down.weight.shape[1]
        packed = lowbit.file.bytes_of(f"layers.{number}.lowbit").reshape(layout.groups, len(names), 32, -1)
        self.copies = [
            torch.from_numpy(
                unpack_lowbit(packed[:, part].reshape(layout.groups * 32, -1), lowbit.bits, layout.hidden)
            ).double()[:neurons]
            for part in range(len(names))
        ]
        threshold, *offsets = torch.from_numpy(lowbit.thresholds[number, :, :neurons].copy()).double()
        self.threshold, self.offsets = threshold, offsets
        # bool [tokens, neurons]: what the engine selected.
        self.selected = torch.empty(0)

    def _factors(self, products: list[Tensor]) -> Tensor:
        return self.activation(products[0]) * (products[1] if len(products) > 1 else 1)

    def products(self, x: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """Of the weights, and of their copies."""
        return [part(x) for part in self.parts], [x @ copy.T for copy in self.copies]

    def weights_and_scores(self, x: Tensor) -> tuple[Tensor, Tensor]:
        exact, copied = self.products(x)
        shifted = [product + offset for product, offset in zip(copied, self.offsets, strict=True)]
        return self._factors(exact).abs() * self.down.weight.norm(dim=0), self._factors(shifted).abs()

    def __call__(self, x: Tensor) -> Tensor:
        """The feed-forward of the selected neurons alone, which behind the prompt are those above the threshold but for
        rounding."""
        wide = x[0].double()
        scores = self.weights_and_scores(wide)[1][1:]
        differ = (scores > self.threshold) != self.selected[1:]
        assert differ.double().mean() < 1e-3
        assert ((scores / self.threshold - 1).abs()[differ] < 1e-2).all()
        exact, _ = self.products(wide)
        return self.down(self._factors(exact) * self.selected).to(x.dtype)[None]


@pytest.mark.parametrize(
    ("name", "bits", "overrides"),
    [("llama biases", 2, {}), ("gemma3", 4, {}), ("qwen3", 1, {"gpu": "host"}), ("starcoder2", 2, {})],
    ids=["silu", "gelu", "gpu", "no-gate"],
)
def test_logits_are_those_of_transformers_with_the_same_mask(
    tiny_family: Make, name: str, bits: int, overrides: dict[str, Any]
) -> None:
    folder = tiny_family(name)
    memory = {"vram_budget": budget_for(4, hidden=64, ffn=96)} if overrides else {}
    how = {"dtype": "f32", "selector": "lowbit", "bits": bits, "recall": RECALL, "verify": True}
    with Engine.load(str(folder), **how, **overrides, **memory) as engine:
        lowbit = engine.session.runtime.lowbit
        assert lowbit is not None
        inputs = engine.session.feed_forward_inputs(IDS)
        calibrate(lowbit, engine.model, inputs)
        model = llama_from_folder(folder)
        dense = all_logits(model, IDS)
        layers = [Layer(block.mlp, engine, number) for number, block in enumerate(model.model.layers)]
        ours, masks = [], []
        for row in engine.forced_logits(IDS, 1):
            ours.append(row)
            masks.append(engine.session.runtime.board.mask[0].copy())
        masks[0][:] = ALL_NEURONS  # a prompt, of one token too, is computed whole
        selected = np.unpackbits(np.stack(masks).view(np.uint8), axis=2, bitorder="little").astype(bool)
        for block, layer, own, x in zip(model.model.layers, layers, selected.swapaxes(0, 1), inputs, strict=True):
            assert_calibrated(layer, torch.from_numpy(x).double())
            layer.selected = torch.from_numpy(own)
            block.mlp.forward = layer
        theirs = all_logits(model, IDS)
    assert np.abs(ours - theirs).max() < 1e-3 * np.abs(theirs).max()
    assert np.abs(dense - theirs).max() > 5e-2 * np.abs(theirs).max()
    assert 0.1 < selected.mean() < 0.8


def assert_calibrated(layer: Layer, x: Tensor) -> None:
    """The offsets are the copies' mean errors, and the threshold the highest that leaves the wished share."""
    for exact, copied, offset in zip(*layer.products(x), layer.offsets, strict=True):
        torch.testing.assert_close((exact - copied).mean(0), offset, atol=1e-5, rtol=1e-4)
    weights, scores = layer.weights_and_scores(x)
    threshold = float(layer.threshold[0])
    assert (layer.threshold == threshold).all()
    for factor, enough in ((1 - 1e-4, True), (1 + 1e-4, False)):
        share = weights[scores > threshold * factor].sum() / weights.sum()
        assert bool(share >= RECALL) == enough or abs(share - RECALL) < 1e-4


def test_it_is_asked_for(tiny_llama: Make, tiny_family: Make) -> None:
    """`auto` loses nothing; a mixture of experts has no copies."""
    model = tiny_llama()
    with Engine.load(str(model)) as engine:
        assert engine.plan.selector.name == "all"
    outcome = run("generate", "-m", prepack(tiny_family("mixtral")), "--prompt-ids", "3", "--selector", "lowbit")
    assert_refused(outcome, 2, "mixture of experts", "all")


def test_it_gives_way_where_it_loses_too_much(tiny_llama: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the divergence in float64 of what `forced_logits` gives with it and with all neurons; measured once."""
    monkeypatch.setattr(load, "sample_ids", lambda _session, *, held_out=False: IDS[:40] if held_out else IDS)
    model, lines = str(tiny_llama(seed=4)), []
    how = {"selector": "lowbit", "bits": 1, "recall": 0.6}
    with Engine.load(model, **how, say=lines.append) as engine:
        lowbit = engine.session.runtime.lowbit
        assert lowbit is not None
        sparse = torch.from_numpy(np.stack(list(engine.forced_logits(IDS[:40], 1)))).double()
    with Engine.load(model, **how, max_loss=lowbit.loss / 2, look_ahead=True, say=lines.append) as engine:
        assert engine.plan.selector.name == "all"
        dense = torch.from_numpy(np.stack(list(engine.forced_logits(IDS[:40], 1)))).double()
    loss = torch.nn.functional.kl_div(
        sparse.log_softmax(1), dense.log_softmax(1), reduction="batchmean", log_target=True
    )
    assert lowbit.loss == pytest.approx(float(loss), rel=1e-2)
    assert lowbit.loss > 0.01
    assert [line.partition(" ")[0] for line in lines[-3:]] == ["calibrating", "it", "the"]
    with Engine.load(model, **how, max_loss=lowbit.loss * 2, say=lines.append) as engine:
        assert engine.plan.selector.name == "lowbit"
    assert_refused(run("generate", "-m", model, "-p", "Hi", "--max-loss", "-1"), 2, "-1.0", "0 or more nats")
