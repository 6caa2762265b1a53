"""Whole models rounded to 4 bits, against transformers.  pytest tests/coordinator/quantising/test_quantise.py"""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from warmfront.coordinator.packing.packer import ensure_packed
from warmfront.coordinator.quantising.inputs import sample
from warmfront.coordinator.quantising.quantise import ensure_quantised
from warmfront.coordinator.quantising.samples import Samples
from warmfront.shared.model.formats import Kind
from warmfront.shared.model.store import PackedModel

TEXTS = ([1, 5, 9, 2, 40, 41, 7], [3, 3, 8, 30, 31])


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def quiet(*_: object) -> None:
    pass


@pytest.mark.parametrize("family", ["qwen3", "gemma2", "llama biases"])
def test_sampled_inputs_are_those_of_transformers(
    tiny_family: Callable[..., Path], tmp_path: Path, family: str
) -> None:
    folder = tiny_family(family)
    seen: dict[str, list[torch.Tensor]] = {}
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    places = {"o_proj": "o", "down_proj": "down", "q_proj": "attention", "gate_proj": "feed-forward"}
    hooks = []
    for name, module in model.named_modules():
        *_, layer, _, part = ("", "", *name.split(".")[-3:])
        if part in places and layer.isdigit():
            place = f"layers.{layer}.{places[part]}"
        elif part == "lm_head":
            place = ".head"
        else:
            continue
        hooks.append(
            module.register_forward_hook(lambda _m, given, _o, place=place: seen.setdefault(place, []).append(given[0]))
        )
    with torch.inference_mode():
        for ids in TEXTS:
            model(torch.tensor([ids]))
    assert len(seen) == 4 * model.config.num_hidden_layers + 1
    samples = Samples(tmp_path)
    with PackedModel(ensure_packed(folder, "f32", quiet, quiet)) as packed:
        sample(packed, TEXTS, samples, quiet)
        tied = packed.spec.architecture.tied_head
    for place, inputs in seen.items():
        expected = torch.cat([each.reshape(-1, each.shape[-1]) for each in inputs]).numpy()
        found = samples.at(".embed" if place == ".head" and tied else place)[:, : expected.shape[1]]
        np.testing.assert_allclose(found, expected, rtol=2e-3, atol=2e-3 * np.abs(expected).max(), err_msg=place)
    samples.close()


def test_a_model_in_floats_is_rounded_by_what_it_reads(tiny_llama: Callable[..., Path], tmp_path: Path) -> None:
    said: list[str] = []
    steps: set[str] = set()
    path = ensure_quantised(tiny_llama(), "q4f", said.append, lambda what, done, total: steps.add(what))
    assert steps == {"reading", "sampling", "packing"}
    assert len(said) == 1
    with PackedModel(path) as packed:
        assert {packed.entries[f"layers.1.{part}"].kind for part in "qkvo"} == {Kind.Q4S}
        # What 0.3 bits a weight are spent on.
        assert packed.entries["embed"].kind == packed.entries["head"].kind == Kind.Q4
        assert (packed.layout.gate_kind, packed.layout.down_kind) == (Kind.Q4S, Kind.Q4)
        first = packed.bytes_of("layers.0.q").tobytes()
    assert {file.name for file in path.parent.iterdir()} == {path.name}, "nothing else is left"
    # The second time it is there.
    assert ensure_quantised(tiny_llama(), "q4f", pytest.fail, quiet) == path
    path.unlink()
    plain = ensure_packed(tiny_llama(), "q4f", quiet, quiet)
    with PackedModel(plain) as packed:
        assert packed.bytes_of("layers.0.q").tobytes() != first


def test_a_mixture_is_rounded_by_itself(tiny_family: Callable[..., Path]) -> None:
    steps: set[str] = set()
    path = ensure_quantised(tiny_family("mixtral"), "q4f", quiet, lambda what, done, total: steps.add(what))
    assert steps == {"packing"}
    with PackedModel(path) as packed:
        assert packed.layout.gate_kind == Kind.Q4S
        assert packed.entries["layers.0.router"].kind == Kind.F32


def test_four_bits_are_not_rounded_again(tiny_gguf: Callable[..., Path]) -> None:
    path = ensure_quantised(tiny_gguf(kind="Q4_1"), "q4f", quiet, quiet)
    with PackedModel(path) as packed:
        quantised = packed.bytes_of("layers.0.q").tobytes()
    path.unlink()
    with PackedModel(ensure_packed(tiny_gguf(kind="Q4_1"), "q4f", quiet, quiet)) as packed:
        assert packed.bytes_of("layers.0.q").tobytes() == quantised


def test_what_bits_are_left_v_gets(tiny_llama: Callable[..., Path]) -> None:
    """Layer by layer: here they are enough for one of two."""
    folder = tiny_llama(num_key_value_heads=1, tie_word_embeddings=True)
    with PackedModel(ensure_quantised(folder, "q4f", quiet, quiet)) as packed:
        assert [packed.entries[f"layers.{i}.v"].kind for i in range(2)] == [Kind.Q8, Kind.Q4S]
