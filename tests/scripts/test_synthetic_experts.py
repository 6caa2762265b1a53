"""Synthetic experts of ReLU neurons.  pytest tests/scripts/test_synthetic_experts.py"""

import importlib
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import MixtralForCausalLM

SCRIPT = Path(__file__).parents[2] / "scripts" / "make_synthetic_model.py"
SIZES = "--hidden=128 --layers=3 --ffn=256 --heads=4 --kv-heads=2 --vocab=512 --rank=15 --experts=8 --used=2"


def test_as_many_neurons_of_the_used_experts_fire_as_wished(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(SCRIPT.parent)
    monkeypatch.setenv("HF_DEACTIVATE_ASYNC_LOAD", "1")
    out = tmp_path / "model"
    how = ["--expert-activation=relu", "--active=0.1", "--formats=hf"]
    assert importlib.import_module(SCRIPT.stem).main([str(out), *SIZES.split(), *how]) == 0
    model = MixtralForCausalLM.from_pretrained(out / "hf", dtype=torch.float32, local_files_only=True).eval()
    shares: list[float] = []
    for layer in model.model.layers:
        layer.mlp.experts.act_fn.register_forward_hook(
            lambda _module, _gates, fired: shares.append(float((fired > 0).float().mean()))
        )
    with torch.inference_mode():
        model.generate(torch.tensor([[300], [420]]), do_sample=False, max_new_tokens=60)
    assert 0.06 < np.mean(shares) < 0.15
