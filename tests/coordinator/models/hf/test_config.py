"""What config.json describes, against transformers.  pytest tests/coordinator/models/hf/test_config.py"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import transformers
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from tests.coordinator.models.hf.folders import LINEAR, LLAMA3, edited, frequencies_of
from warmfront.coordinator.models.open import open_source
from warmfront.shared.errors import ModelError
from warmfront.shared.model.architecture import Architecture, Attention, FeedForward, Norm, Positions, Rotary

Make = Callable[..., Path]


@pytest.mark.parametrize("rope", [None, LINEAR, LLAMA3])
def test_rope_frequencies(tiny_llama: Make, tmp_path: Path, rope: dict[str, Any] | None) -> None:
    folder = tiny_llama(rope_parameters=rope)
    theirs = LlamaRotaryEmbedding(transformers.AutoConfig.from_pretrained(folder)).inv_freq.numpy()
    assert frequencies_of(open_source(folder)) == pytest.approx(theirs, rel=1e-5)
    # As transformers wrote it before version 5.
    settings = dict(rope or {"rope_theta": 10000.0})
    old = {"rope_theta": settings.pop("rope_theta"), "rope_scaling": settings or None}
    if settings:
        settings["type"] = settings.pop("rope_type")
    older = edited(folder, tmp_path / "older", rope_parameters=None, **old)
    assert frequencies_of(open_source(older)) == pytest.approx(theirs, rel=1e-5)


def test_spec(tiny_llama: Make) -> None:
    folder = tiny_llama(hidden_act="gelu_pytorch_tanh", tie_word_embeddings=True, num_key_value_heads=4, head_dim=24)
    source = open_source(folder)
    spec, architecture = source.spec, source.spec.architecture
    attention, activation = architecture.attention, architecture.feed_forward.activation
    assert (spec.layers, spec.hidden, spec.ffn) == (2, 64, 96)
    assert (attention.heads, attention.kv_heads, attention.head_dim) == (4, 4, 24)
    assert (spec.family, activation, spec.context, architecture.norm.epsilon) == ("llama", "gelu_tanh", 512, 1e-6)
    assert spec.vocab == source.tensor("embed").shape[0]
    assert "head" not in source.names()
    assert source.tensor("layers.0.o").shape == (64, 96)
    for name, meant in (("relu", "relu"), ("gelu", "gelu"), ("gelu_new", "gelu_tanh"), ("silu", "silu")):
        assert open_source(tiny_llama(hidden_act=name)).spec.architecture.feed_forward.activation == meant


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "mamba"}, "model type 'mamba' is not supported; llama, mistral, .* are"),
        ({"hidden_act": "softplus"}, "activation 'softplus' is not supported"),
        ({"quantization_config": {"quant_method": "hqq"}}, "quantised by hqq"),
        ({"rope_parameters": {"rope_type": "su", "factor": 4.0}}, "RoPE type 'su' is not supported"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1.0}}, "rope_theta is 1.0, not above"),
        ({"rope_parameters": {"rope_type": "linear"}}, "field rope_parameters.factor is missing"),
        ({"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.1}}, "RoPE on 1 of the 16 numbers"),
        ({"hidden_size": None}, "field hidden_size is missing"),
        ({"hidden_size": "wide"}, "field hidden_size is 'wide', not a whole number from 1 to"),
        ({"num_attention_heads": 0}, "heads is 0"),
        ({"num_attention_heads": 0, "head_dim": None}, "field num_attention_heads is 0"),
        ({"rope_parameters": [1]}, r"field rope_parameters is \[1\], not an object"),
        ({"hidden_size": 72, "head_dim": 16}, "hidden size 72 is not a multiple of 32"),
        ({"head_dim": 20, "hidden_size": 64}, "heads x head size 80 is not a multiple of 32"),
        ({"head_dim": 4, "num_attention_heads": 16}, "head size 4 is not a multiple of 8"),
        ({"num_hidden_layers": 0}, "layers is 0"),
        ({"num_key_value_heads": 3}, "do not share"),
        ({"model_type": ["llama"]}, r"field model_type is \['llama'\], not a text"),
        ({"hidden_act": ["silu"]}, r"field hidden_act is \['silu'\], not a text"),
        ({"hidden_act": {"a": 1}}, "field hidden_act is {'a': 1}, not a text"),
        ({"quantization_config": [1]}, r"field quantization_config is \[1\], not an object"),
        ({"quantization_config": "gptq"}, "field quantization_config is 'gptq', not an object"),
        ({"quantization_config": {"quant_method": 5}}, "field quantization_config.quant_method is 5, not a text"),
        ({"head_dim": 10**12}, "field head_dim is 1000000000000, not a whole number from 1 to 2147483647"),
        ({"head_dim": 10**9}, r"q_proj\.weight has shape \(64, 64\), config\.json says \(4000000000, 64\)"),
        ({"head_dim": 16.0}, r"field head_dim is 16\.0, not a whole number"),
        ({"head_dim": True}, "field head_dim is True, not a whole number"),
        ({"num_attention_heads": 128, "head_dim": None}, "heads x head size 0|head size 0 is not a multiple of 8"),
        ({"num_hidden_layers": 2**31 - 1}, "layers.2.input_layernorm.weight is missing"),
        ({"vocab_size": 10**30}, "field vocab_size is 1000"),
        ({"max_position_embeddings": -1}, "field max_position_embeddings is -1"),
        ({"rms_norm_eps": float("nan")}, "field rms_norm_eps is nan, not a positive number"),
        ({"rms_norm_eps": float("inf")}, "field rms_norm_eps is inf, not a positive number"),
        ({"rms_norm_eps": -1e-6}, "field rms_norm_eps is -1e-06, not a positive number"),
        ({"rms_norm_eps": 0}, "field rms_norm_eps is 0, not a positive number"),
        ({"rms_norm_eps": 1e-60}, "field rms_norm_eps is 1e-60, not a positive number"),
        ({"rms_norm_eps": "1e-6"}, "field rms_norm_eps is '1e-6', not a positive number"),
        ({"rms_norm_eps": 10**400}, "field rms_norm_eps is 1000"),
        ({"rope_parameters": {"rope_theta": float("nan")}}, "field rope_parameters.rope_theta is nan"),
        ({"rope_parameters": {"rope_theta": 0}}, "field rope_parameters.rope_theta is 0"),
        ({"rope_parameters": {"rope_theta": -1.0}}, "field rope_parameters.rope_theta is -1"),
        ({"rope_parameters": {"rope_theta": [1]}}, "field rope_parameters.rope_theta is"),
        ({"rope_parameters": None, "rope_theta": float("inf")}, "field rope_theta is inf"),
        ({"rope_parameters": {"rope_type": ["linear"]}}, "field rope_parameters.rope_type is"),
        ({"rope_parameters": {"rope_type": "linear", "factor": 0}}, "field rope_parameters.factor is 0"),
        ({"rope_parameters": {"rope_type": "linear", "factor": float("nan")}}, "field rope_parameters.factor is nan"),
        ({"rope_parameters": LLAMA3 | {"factor": -8.0}}, "field rope_parameters.factor is -8"),
        (
            {"rope_parameters": LLAMA3 | {"low_freq_factor": 4.0}},
            "low_freq_factor is 4.0, not below high_freq_factor, 4",
        ),
        ({"rope_parameters": LLAMA3 | {"original_max_position_embeddings": -1}}, "original_max_position_embeddings is"),
        ({"partial_rotary_factor": 1.2}, "RoPE on 19 of the 16 numbers of a head is not supported"),
        ({"attention_bias": "yes"}, "field attention_bias is 'yes', not true or false"),
        ({"tie_word_embeddings": 1}, "field tie_word_embeddings is 1, not true or false"),
        ({"bos_token_id": "0"}, "field bos_token_id is '0', not a token id below 300"),
        *(
            (
                {"eos_token_id": value},
                r"config\.json: field eos_token_id is .*, not a token id below 300 or a list of them",
            )
            for value in (-7, 300, 10**20, 2.5, True, "2", [[2]], [1, "2"], {"a": 1}, [None])
        ),
        ({"num_hidden_layers": 3}, r"model\.layers\.2\.input_layernorm\.weight"),
        ({"intermediate_size": 128}, r"model\.layers\.0\.mlp\.gate_proj\.weight has shape \(96, 64\)"),
        ({"mlp_bias": True}, r"model\.layers\.0\.mlp\.gate_proj\.bias"),
    ],
)
def test_unsupported_configs_are_refused(
    tiny_llama: Make, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ModelError, match=message):
        open_source(edited(tiny_llama(), tmp_path / "edited", **changes))


@pytest.mark.parametrize(
    ("options", "changes"),
    [
        ({}, {}),
        ({"rms_norm_eps": 1e-5}, {"norm": Norm(epsilon=1e-5)}),
        ({"tie_word_embeddings": True}, {"tied_head": True}),
        ({"hidden_act": "relu"}, {"feed_forward": FeedForward(activation="relu")}),
        ({"mlp_bias": True}, {"feed_forward": FeedForward(activation="silu", biases=("gate", "up", "down"))}),
        (
            {"attention_bias": True, "num_key_value_heads": 4, "head_dim": 24},
            {"attention": Attention(heads=4, kv_heads=4, head_dim=24, biases=("q", "k", "v", "o"))},
        ),
        ({"rope_parameters": LINEAR}, {}),
        ({"rope_parameters": LLAMA3}, {}),
    ],
)
def test_the_whole_architecture(tiny_llama: Make, options: dict[str, Any], changes: dict[str, Any]) -> None:
    """What is not said here is as in the plainest Llama; RoPE's frequencies are transformers'."""
    folder = tiny_llama(**options)
    found = open_source(folder).spec.architecture
    plain = Architecture(
        norm=Norm(epsilon=1e-6),
        positions=Positions(),
        attention=Attention(heads=4, kv_heads=2, head_dim=16),
        feed_forward=FeedForward(activation="silu"),
    )
    assert found == replace(plain, positions=found.positions, **changes)
    theirs = LlamaRotaryEmbedding(transformers.AutoConfig.from_pretrained(folder)).inv_freq.numpy()
    rotary = Rotary(frequencies=found.positions.rotary[0].frequencies)
    assert found.positions == Positions(rotary=(rotary,))
    assert rotary.frequencies == pytest.approx(theirs, rel=1e-5)


@pytest.mark.parametrize("name", ["qwen2", "qwen3", "qwen2 moe", "qwen3 moe"])
@pytest.mark.parametrize("bound", [2, None])
def test_windows_of_a_qwen(tiny_family: Make, tmp_path: Path, name: str, bound: int | None) -> None:
    """Where the file does not name the layers, as those from before transformers 5 do not."""
    fields = {"use_sliding_window": True, "sliding_window": 24, "max_window_layers": bound}
    folder = edited(tiny_family(name), tmp_path / "model", layer_types=None, **fields)
    config = transformers.AutoConfig.from_pretrained(folder)
    # A Qwen3-MoE has one mask for all layers.
    types = getattr(config, "layer_types", ["sliding_attention"] * config.num_hidden_layers)
    theirs = tuple(24 * (kind == "sliding_attention") for kind in types)
    windows = open_source(folder).spec.architecture.attention.windows
    assert (windows or (0,) * config.num_hidden_layers) == theirs
