"""The architecture that a GGUF file's fields describe.  pytest tests/coordinator/models/gguf/test_config.py"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from tests.conftest import GGUF_SHAPES
from tests.coordinator.models.gguf.tensors import NAMES
from warmfront.coordinator.models.open import open_source
from warmfront.shared.errors import ModelError
from warmfront.shared.model.architecture import Architecture, Attention, Experts, FeedForward, Norm, Positions, Rotary
from warmfront.shared.model.formats import Kind

Make = Callable[..., Path]


def frequencies_of(path: Path) -> tuple[float, ...]:
    """Of the one rotary table that all layers have."""
    (rotary,) = open_source(path).spec.architecture.positions.rotary
    return rotary.frequencies


def test_rope_frequencies(tiny_gguf: Make) -> None:
    plain = 10000.0 ** (-np.arange(32) / 32)
    assert frequencies_of(tiny_gguf()) == pytest.approx(plain, rel=1e-12)
    linear = {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 4.0, "llama.rope.freq_base": 500.0}
    frequencies = frequencies_of(tiny_gguf(fields=linear))
    assert frequencies == pytest.approx(500.0 ** (-np.arange(32) / 32) / 4, rel=1e-12)
    factors = np.linspace(1, 8, 32, dtype=np.float32)
    path = tiny_gguf(shapes={"rope_freqs.weight": (32,)}, values={"rope_freqs.weight": factors})
    assert frequencies_of(path) == pytest.approx(plain / factors, rel=1e-6)


def test_biases_and_head_are_found(tiny_gguf: Make) -> None:
    shapes = {"output.weight": (64, 256), "blk.0.attn_q.bias": (256,), "blk.0.ffn_down.bias": (256,)}
    path = tiny_gguf(kind="Q8_0", shapes=shapes)
    source = open_source(path)
    assert source.names() - NAMES.keys() == {"head", "layers.0.q.bias", "layers.0.down.bias"}
    assert source.tensor("layers.0.q.bias").kind == Kind.F32
    bias = next(t.data for t in gguf.GGUFReader(path).tensors if t.name == "blk.0.ffn_down.bias")
    np.testing.assert_array_equal(source.tensor("layers.0.down.bias").float32(), bias)


# A Mixtral of one layer.
MIXTURE: dict[str, Any] = {
    "kind": "F32",
    "fields": {"llama.expert_count": 4, "llama.expert_used_count": 2},
    "shapes": {
        "blk.0.ffn_gate_inp.weight": (4, 256),
        "blk.0.ffn_gate_exps.weight": (4, 64, 256),
        "blk.0.ffn_up_exps.weight": (4, 64, 256),
        "blk.0.ffn_down_exps.weight": (4, 256, 64),
    },
    "without": [f"blk.0.ffn_{part}.weight" for part in ("gate", "up", "down")],
}


def test_a_mixtral_is_a_llama_with_experts(tiny_gguf: Make) -> None:
    spec = open_source(tiny_gguf(**MIXTURE)).spec
    assert (spec.family, spec.ffn) == ("llama", 64)
    assert spec.architecture.feed_forward.experts == Experts(number=4, active=2, normalised=True)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"architecture": "mamba"}, "architecture 'mamba' is not supported; llama, mistral, .* are"),
        ({"fields": {"llama.expert_count": 8}}, "blk.0.ffn_gate.weight does not belong to a llama model with experts"),
        (
            {"architecture": "gemma", "fields": {"gemma.expert_count": 8}},
            "gemma models with experts are not supported; those without are",
        ),
        (
            {**MIXTURE, "without": [*MIXTURE["without"], "blk.0.ffn_up_exps.weight"]},
            "blk.0.ffn_up_exps.weight is missing",
        ),
        (
            {**MIXTURE, "without": [*MIXTURE["without"], "blk.0.ffn_gate_inp.weight"]},
            "blk.0.ffn_gate_inp.weight is missing",
        ),
        (
            {**MIXTURE, "fields": {**MIXTURE["fields"], "llama.expert_count": 3}},
            r"has shape \(4, 64, 256\), not that of a stack of 3 experts",
        ),
        (
            {**MIXTURE, "fields": {**MIXTURE["fields"], "llama.expert_used_count": 5}},
            "number of active experts is 5, not a whole number from 1 to 4",
        ),
        (
            {**MIXTURE, "fields": {**MIXTURE["fields"], "llama.expert_gating_func": 2}},
            "llama.expert_gating_func is 2, not 1, a softmax, which a llama model has",
        ),
        ({"fields": {"split.count": 2}}, "is part 1 of 2, whatever its name says: name the parts NAME-00001-of-00002"),
        ({"architecture": "phi2"}, "'phi2' is not supported: it has a bias of the head; llama"),
        ({"architecture": "opt"}, "tensor blk.0.ffn_gate.weight does not belong to a opt model"),
        ({"architecture": "qwen4"}, r"'qwen4' is not supported; llama, .* are \(did you mean qwen3\?\)$"),
        ({"fields": {"llama.rope.scaling.type": "su"}}, "RoPE scaling 'su'"),
        ({"fields": {"llama.rope.dimension_count": 72}}, "RoPE on 72 of the 64 numbers"),
        ({"fields": {"llama.rope.dimension_count": 31}}, "RoPE on 31 of the 64 numbers"),
        ({"fields": {"llama.attention.head_count_kv": 3}}, "do not share"),
        ({"fields": {"llama.attention.head_count": [4, 4]}}, "head_count is"),
        ({"fields": {"llama.block_count": 2}}, "blk.1.attn_norm.weight is missing"),
        ({"without": ["llama.embedding_length"]}, "llama.embedding_length is missing"),
        ({"without": ["token_embd.weight"]}, "token_embd.weight is missing"),
        ({"without": ["blk.0.ffn_up.weight"]}, "blk.0.ffn_up.weight is missing"),
        ({"shapes": {"blk.0.attn_k.weight": (256, 256)}}, "shape"),
        ({"shapes": {"blk.1.attn_k.weight": (128, 256)}}, "blk.1.attn_k.weight is unexpected"),
        ({"shapes": {"blk.0.fc1.weight": (256, 256)}}, "blk.0.fc1.weight does not belong to a llama model"),
        ({"shapes": {"blk.0.ffn_down_t.weight": (512, 256)}}, "blk.0.ffn_down.weight does not belong to a PowerInfer"),
        ({"shapes": {"blk.0.attn_sinks.weight": (4,)}}, "attn_sinks"),
        ({"shapes": {"rope_freqs.weight": (16,)}}, "rope_freqs.weight"),
        ({"fields": {"tokenizer.ggml.model": "bert"}}, "tokenizer 'bert' is not supported"),
        ({"shapes": {"blk.0.attn_norm.bias": (256,)}}, "blk.0.attn_norm.bias is unexpected"),
        ({"shapes": {"blk.0.ffn_norm.bias": (256,)}}, "blk.0.ffn_norm.bias is unexpected"),
        (
            {"fields": {"general.architecture": 5}, "architecture": "llama"},
            "field general.architecture is 5, not a text",
        ),
        ({"fields": {"general.name": 5}}, "field general.name is 5, not a text"),
        ({"fields": {"llama.block_count": 0}}, "field llama.block_count is 0, not a whole number from 1"),
        ({"fields": {"llama.block_count": 1.0}}, "field llama.block_count is 1.0, not a whole number"),
        ({"fields": {"llama.block_count": True}}, "field llama.block_count is True, not a whole number"),
        ({"fields": {"llama.block_count": 2**32 - 1}}, "field llama.block_count is 4294967295, not a whole number"),
        ({"fields": {"llama.attention.head_count": 0}}, "field llama.attention.head_count is 0"),
        ({"fields": {"llama.attention.head_count": 2**31 - 1}}, "head size 0 is not a multiple|x head size 0"),
        ({"fields": {"llama.attention.key_length": 2**31 - 8}}, r"shape \(256, 256\) instead of \(8589934560, 256\)"),
        ({"fields": {"llama.context_length": "long"}}, "field llama.context_length is 'long'"),
        *(
            ({"fields": {f"llama.{key}": value}}, rf"field llama\.{key} is .*, not a positive number$")
            for key in ("attention.layer_norm_rms_epsilon", "rope.freq_base", "rope.scale_linear")
            for value in (float("nan"), float("inf"), float("-inf"), -1.0, 0.0, "1", True, [1.0])
        ),
        (
            {"fields": {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": float("nan")}},
            "field llama.rope.scaling.factor is nan",
        ),
        ({"fields": {"llama.rope.scaling.type": 5}}, "field llama.rope.scaling.type is 5, not a text"),
        (
            {"shapes": {"rope_freqs.weight": (32,)}, "values": {"rope_freqs.weight": np.zeros(32, np.float32)}},
            "base and scaling factors give no positive frequencies",
        ),
        (
            {"shapes": {"rope_freqs.weight": (32,)}, "values": {"rope_freqs.weight": np.full(32, np.nan, np.float32)}},
            "rope_freqs.weight holds NaN",
        ),
        (
            {"shapes": {"rope_freqs.weight": (1, 32)}, "kinds": {"rope_freqs.weight": "Q8_0"}},
            r"rope_freqs.weight has shape \(1, 32\) and type Q8_0",
        ),
    ],
)
def test_unsupported_files_are_refused(tiny_gguf: Make, options: dict[str, object], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        open_source(tiny_gguf(**options))


@pytest.mark.parametrize(
    ("options", "changes"),
    [
        ({}, {}),
        ({"fields": {"llama.attention.layer_norm_rms_epsilon": 0.5}}, {"norm": Norm(epsilon=0.5)}),
        ({"shapes": {"output.weight": (64, 256)}}, {"tied_head": False}),
        (
            {"shapes": {"blk.0.attn_v.bias": (128,), "blk.0.attn_q.bias": (256,)}},
            {"attention": Attention(heads=4, kv_heads=2, head_dim=64, biases=("q", "v"))},
        ),
        (
            {"shapes": {"blk.0.ffn_down.bias": (256,)}},
            {"feed_forward": FeedForward(activation="silu", biases=("down",))},
        ),
        (
            {"shapes": {"blk.0.ffn_down_t.weight": (512, 256)}, "without": ["blk.0.ffn_down.weight"]},
            {"feed_forward": FeedForward(activation="relu")},
        ),
    ],
)
def test_the_whole_architecture(tiny_gguf: Make, options: dict[str, Any], changes: dict[str, Any]) -> None:
    """What is not said here is as in the plainest Llama."""
    found = open_source(tiny_gguf(**options)).spec.architecture
    plain = Architecture(
        norm=Norm(epsilon=float(np.float32(1e-5))),
        positions=Positions(),
        attention=Attention(heads=4, kv_heads=2, head_dim=64),
        feed_forward=FeedForward(activation="silu"),
        tied_head=True,
    )
    assert found == replace(plain, positions=found.positions, **changes)
    assert found.positions == Positions(rotary=(Rotary(frequencies=found.positions.rotary[0].frequencies),))


def test_a_bias_of_some_layers_only(tiny_gguf: Make) -> None:
    shapes = {name.replace("blk.0", "blk.1"): shape for name, shape in GGUF_SHAPES.items()}
    path = tiny_gguf(shapes=shapes | {"blk.1.attn_q.bias": (256,)}, fields={"llama.block_count": 2})
    with pytest.raises(ModelError, match=r"tensor blk\.0\.attn_q\.bias is missing; the file is incomplete$"):
        open_source(path)
